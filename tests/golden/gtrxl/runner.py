from typing import Any

import torch
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models

TRANSFORMERS_RL = {
    "gate_bias": 0.1,
    "gate_bias_learned": False,
    "gate_linear_bias": True,
    "relu_before_gate": False,
}
DI_ENGINE = {"query_norm": False, "attention_bias": True, "memory_starts": "zeros"}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    model = tersor.models.load("gtrxl", case.state_dict(), **config_of(case))
    check_parameters(case, model)
    inputs, memory, given, outputs = case.inputs(), None, [], {}
    steps = model.config.memory_len
    for i in range(len(inputs)):
        y, memory = model.stream(inputs[f"seg{i}"], memory)
        given.append(y)
        outputs[f"logits{i}"] = outputs[f"logit{i}"] = y
    last = torch.cat(given)[-steps:]  # the published memories also have the last layer's results
    if case.name.startswith("ding"):
        missing = steps - len(last)
        last = torch.cat((last.new_zeros(missing, *last.shape[1:]), last))
    outputs |= {"memory_input": memory[0], "memory_last_layer": last}
    outputs["memory_after"] = torch.cat((memory, last[None])) if len(last) == memory.shape[1] else last
    return {name: outputs[name] for name in case.outputs}


def config_of(case: Case) -> dict[str, Any]:
    given = {**case.config}
    if "d_input" in given:
        return TRANSFORMERS_RL | {
            "d_model": given["d_input"],
            "layers": given["n_layers"],
            "heads": given["n_heads"],
            "d_head": given["d_head_inner"],
            "d_ff": given["d_ff_inner"],
            "memory_len": given["mem_len"],
            "dropout": given.get("dropout", 0.1),
            "memory_norm": case.name.startswith("paper"),
        }
    d = given.get("embedding_dim", 256)
    config = DI_ENGINE | {
        "input_dim": given["input_dim"] if given.get("use_embedding_layer", True) else 0,
        "d_model": d,
        "layers": given.get("layer_num", 3),
        "heads": given.get("head_num", 2),
        "d_head": given.get("head_dim", 128),
        "d_ff": d,
        "mlp_layers": given.get("mlp_num", 2),
        "memory_len": given.get("memory_len", 64),
        "dropout": given.get("dropout_ratio", 0.0),
        "gate_bias": given.get("gru_bias", 2.0),
    }
    return config if given.get("gru_gating", True) else config | {"gate": "none"}
