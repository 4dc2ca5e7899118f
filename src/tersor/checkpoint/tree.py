"""The tensors of a module tree, by their full names: list them, get one, put one in place of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.layers.exchange import exchangeable_kinds


def state_of(module: nn.Module, prefix: str) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers by their full names; tied ones under each of their names."""
    start = f"{prefix}." if prefix else ""
    return [
        (start + name, tensor)
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    ]


def get_tensor(module: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    if leaf in holder._buffers:
        holder._buffers[leaf] = tensor
    else:
        holder._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def tied_parameters(module: nn.Module) -> dict[str, str]:
    """{tied name: the name that the checkpoint holds}."""
    declared = getattr(module, "all_tied_weights_keys", None)
    if isinstance(declared, dict):
        return dict(declared)
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            ties[name] = first[id(parameter)]
    return ties


def forget_weights(module: nn.Module) -> dict[str, Tensor]:
    """Put every tensor that a checkpoint holds on the meta device, so that all are read. Returns the buffers that the
    constructor had made elsewhere."""
    made: dict[str, Tensor] = {}
    moved: dict[int, nn.Parameter] = {}  # a parameter that several modules share stays one
    stored = dict(state_of(module, ""))
    for owner, each in module.named_modules():
        held: list[dict[str, Any]] = [each._parameters, each._buffers]
        for tensors in held:
            for leaf, tensor in tensors.items():
                name = f"{owner}.{leaf}" if owner else leaf
                if not isinstance(tensor, Tensor) or tensor.is_meta or id(stored.get(name)) != id(tensor):
                    continue
                if isinstance(tensor, nn.Parameter):
                    if id(tensor) not in moved:
                        moved[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
                    tensors[leaf] = moved[id(tensor)]
                else:
                    made[name] = tensor
                    tensors[leaf] = tensor.to("meta")
    return made


def initialize_buffer(module: nn.Module, name: str) -> bool:
    """Compute a persistent buffer that older checkpoints lack. False where the model cannot."""
    owner = module.get_submodule(name.rpartition(".")[0])
    root: Any = module
    if not hasattr(root, "_init_weights") or type(owner) in exchangeable_kinds():
        return False
    leaf = name.rpartition(".")[2]
    buffer = owner._buffers.get(leaf)
    if buffer is None:
        return False
    owner._buffers[leaf] = torch.zeros_like(buffer, device="cpu")
    root._init_weights(owner)
    return True
