from typing import Any

import torch
from golden.harness import Case, check_parameters
from torch import Tensor

import tersor.models

WITHOUT_EFFECT = ("is_gpt", "pretrain", "freeze", "num_nodes")


def run(case: Case) -> dict[str, Tensor]:
    config = {name: value for name, value in case.config.items() if name not in WITHOUT_EFFECT}
    model = tersor.models.load("tempo", case.state_dict(), **config)
    L, D = model.config.seq_len, model.config.d_model
    never_called = 4 + 4 + L * L + L  # mul_season, two RevINs, map_resid
    if config.get("pool") and config.get("prompt", 1):
        never_called += 3 * (D * D + D)  # prompt_layer_*
    case.parameters -= never_called
    check_parameters(case, model)
    kept: dict[str, Any] = {}
    for name, module in (("local_trend", model.map_trend), ("local_season", model.map_season)):
        module.register_forward_hook(lambda _module, _inputs, result, name=name: kept.update({name: result}))
    model.gpt2_trend.register_forward_hook(
        lambda _module, inputs, result: kept.update({"gpt_input": inputs[0], "gpt_output": result})
    )
    inputs = case.inputs()
    inputs["x_enc"] = inputs.pop("x")
    with torch.no_grad():
        result = model(**inputs)
    if "trend" in inputs:
        result, loss = result
        kept["loss_local"] = loss.reshape(1)
    if isinstance(result, tuple):
        names = ("mu", "sigma", "nu") if len(result) == 3 else ("mu", "alpha")
        kept |= {name: each.squeeze() for name, each in zip(names, result, strict=True)}  # published without axes of 1
    else:
        kept["forecast"] = result
    return {name: kept[name] for name in case.outputs}
