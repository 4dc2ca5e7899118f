"""Macro influence, fused linear maps, and a group that learns (every config key of the sheet: modes, biases, fusions)."""

from typing import Any

import torch
from golden.harness import Case
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from tersor.methods.structure import fusegpt
from tersor.methods.structure.block_choice import macro_influence
from tersor.methods.structure.block_stack import Stack
from tersor.methods.structure.fused_linear import FusedLinear

SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_hidden_layers",
    "rms_norm_eps",
)


def run(case: Case) -> dict[str, Tensor]:
    if "in_features" in case.config:
        return one_map(case)
    return learning(case) if "fuse_index" in case.config else influence(case)


@torch.no_grad()
def one_map(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config["bias"])
    fused = FusedLinear(linear, mode=config["mode"], rank=config.get("lora_rank", 128), chance=torch.Generator())
    before = fused.effective_weight()
    for n in range(config["fusions"]):
        fused.fuse(inputs[f"add_weight{n}"], inputs.get(f"add_bias{n}"))
    assert torch.equal(fused.effective_weight(), before)
    assert sum(p.numel() for p in fused.parameters()) == case.parameters
    fused.load_state_dict(case.state_dict())
    return {"y": fused(inputs["x"]), "effective_weight": fused.effective_weight()}


def stack_of(case: Case, dtype: torch.dtype) -> Stack:
    config = LlamaConfig(
        **{name: case.config[name] for name in SIZES},
        vocab_size=8,
        rope_parameters={"rope_type": "default", "rope_theta": case.config["rope_theta"]},
        attn_implementation="eager",
    )
    model = LlamaModel(config).eval()
    weights = {name: tensor for name, tensor in case.state_dict().items() if name.startswith("layers.")}
    model.load_state_dict({**model.state_dict(), **weights})
    assert sum(p.numel() for p in model.layers.parameters()) == case.parameters
    return Stack(model.to(dtype).requires_grad_(False))


@torch.no_grad()
def influence(case: Case) -> dict[str, Tensor]:
    stack = stack_of(case, torch.float32)
    recorded = stack.record([{"inputs_embeds": hidden} for hidden in case.inputs()["hidden"]])
    similarity = macro_influence(stack, recorded)
    final = stack.run(recorded[0], range(len(stack)), recorded[0].hidden)
    order = similarity.argsort(descending=True, stable=True)
    return {"similarity": similarity, "order": order, "final0": final}


def learning(case: Case) -> dict[str, Tensor]:
    config, place = case.config, case.config["fuse_index"]
    dtype = getattr(torch, config.get("dtype", "float64"))
    stack = stack_of(case, dtype)
    recorded = stack.record([{"inputs_embeds": hidden} for hidden in case.inputs()["hidden"].to(dtype)])
    lesson = fusegpt.lesson_of(stack, recorded, range(len(stack)), config.get("loss", "batch"))
    maps = fusegpt.alike_maps(stack)
    for n, block in enumerate(stack.blocks):
        if n != place:
            how: Any = (config.get("mode", "lora"), config.get("lora_rank", 128), torch.Generator())
            fusegpt.fuse(stack.blocks[place], block, maps, *how)
    stack.remove(place, recorded)
    blocks = nn.ModuleDict({"layers": nn.ModuleList(stack.blocks)})
    marked = {n.removeprefix("fused."): t for n, t in case.state_dict().items() if n.startswith("fused.")}
    state = blocks.state_dict()
    assert marked.keys() <= state.keys()
    blocks.load_state_dict({**state, **{name: tensor.to(dtype) for name, tensor in marked.items()}})

    found = {"target0": lesson.targets[0], "before0": stack.run(recorded[0], lesson.group, lesson.inputs[0]).detach()}
    fusegpt.trained_parameters(stack.blocks)
    loss = lesson.loss(stack, 0)
    loss.backward()
    found["loss_before"] = loss.detach().view(1)
    for name in case.outputs:
        if name.startswith("grad_norm/"):
            gradient = blocks.get_parameter(name.removeprefix("grad_norm/")).grad
            assert gradient is not None
            found[name] = gradient.norm().view(1)
    lesson.learn(stack, config["epochs"], config["coef_lr"], config["base_lr"], "", lambda *_: None)
    with torch.no_grad():
        found["loss_after"] = lesson.loss(stack, 0).view(1)
        found["after0"] = stack.run(recorded[0], lesson.group, lesson.inputs[0])
        for name in case.outputs:
            if name.endswith("/effective_weight"):
                module = blocks.get_submodule(name.removesuffix("/effective_weight"))
                assert isinstance(module, FusedLinear)
                found[name] = module.effective_weight()
    return found
