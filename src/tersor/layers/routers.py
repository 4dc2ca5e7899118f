"""Which linear maps of a mixture choose the experts. They are found by where they stand, beside the experts, not by name.

A module that holds experts holds their router too: a map, or a small network, with one output per expert, and perhaps some more
for experts that compute nothing. Where all tokens share an expert, a map with one output weighs it. Other modules beside the
experts, such as attention, end with as many outputs as they have inputs.
"""

from __future__ import annotations

import re

from torch import nn

from tersor.layers.experts import expert_maps
from tersor.layers.linear_map import LinearMap, linear_maps, matrix_shape

# Names of maps that choose experts, which are left as they are. Other routers are found by where they stand.
ROUTERS = re.compile(r"(^|\.)(router(_\w+)?(\..+)?|gate|shared_expert_gate|wg)$")


def router_maps(model: nn.Module) -> set[str]:
    """The linear maps of all routers in `model`, by their full names."""
    found: set[str] = set()
    for owner, module in model.named_modules():
        children = dict(module.named_children())
        counts = {name: count for name, child in children.items() if (count := _experts_in(child)) > 1}
        for name, child in children.items():
            beside = [count for other, count in counts.items() if other != name]
            maps = {} if _is_mixture(child) else linear_maps(child)
            if maps and _chooses(maps, beside):
                found |= {".".join(filter(None, (owner, name, each))) for each in maps}
    return found


def _chooses(maps: dict[str, LinearMap], beside: list[int]) -> bool:
    _, inputs = matrix_shape(next(iter(maps.values())))
    outputs, _ = matrix_shape(next(reversed(maps.values())))
    weighs_all = "" in maps and outputs == 1
    return any(weighs_all or (count <= outputs < 2 * count and outputs != inputs) for count in beside)


def _experts_in(module: nn.Module) -> int:
    """How many experts `module` holds, or says that there are; 0 where there are none."""
    if expert_maps(module):
        return int(module.num_experts)  # type: ignore[arg-type]
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module) if _is_mixture(module) else 0
    said = [value for name, value in vars(module).items() if name.endswith("experts") and type(value) is int]
    return max(said, default=0)


def _is_mixture(module: nn.Module) -> bool:
    """Whether `module` is the experts: a fused stack, or several modules of one kind in a list."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        each = list(module.children())
        return len(each) > 1 and len({type(child) for child in each}) == 1 and bool(linear_maps(each[0]))
    return bool(expert_maps(module))
