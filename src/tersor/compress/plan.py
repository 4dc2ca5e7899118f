"""Which linear maps of a model a job compresses, checked before anything is written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from tersor.calibrate.blocks import Unit, find_blocks, linear_maps
from tersor.compress.method import Method
from tersor.errors import TersorError
from tersor.formats.layouts import Layout
from tersor.layers.linear_map import is_conv1d

# A few outputs that choose experts: kept as they are.
ROUTERS = re.compile(r"(^|\.)(router|gate|shared_expert_gate|wg)$")


@dataclass(frozen=True)
class Plan:
    """blocks in tree order; linears: what is compressed in each, {block name: {full name: module}}; left: what is not."""

    blocks: list[Unit]
    linears: dict[str, dict[str, nn.Module]]
    left: list[str]

    def all_linears(self) -> dict[str, nn.Module]:
        return {name: module for each in self.linears.values() for name, module in each.items()}


def make_plan(
    model: nn.Module, method: Method, layout: Layout | None, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Plan:
    """All linear maps inside the repeated blocks but routers; `include` and `exclude` are patterns like `*.mlp.*`.

    Raises TersorError where a pattern matches nothing, nothing is left to compress, or the method refuses a layer.
    """
    everything = linear_maps(model)
    blocks = find_blocks(model)
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in everything):
            raise TersorError(f"the pattern {pattern!r} matches none of the {len(everything)} linear layers")
    tied = _tied_weights(model)
    chosen: dict[str, dict[str, nn.Module]] = {}
    for block in blocks:
        inside = {f"{block.name}.{n}" if block.name else n: m for n, m in linear_maps(block.module).items()}
        chosen[block.name] = {
            name: module
            for name, module in inside.items()
            if not ROUTERS.search(name)
            and id(module.weight) not in tied
            and (not include or any(fnmatchcase(name, pattern) for pattern in include))
            and not any(fnmatchcase(name, pattern) for pattern in exclude)
        }
    plan = Plan(blocks, chosen, [])
    taken = plan.all_linears()
    if not taken:
        raise TersorError("there is no linear layer to compress in this model's blocks")
    for name, module in taken.items():
        method.check_linear(name, *_shape(module), layout)
    return Plan(blocks, chosen, [name for name in everything if name not in taken])


def without(plan: Plan, names: set[str]) -> Plan:
    """The plan with these layers left as they are."""
    linears = {block: {n: m for n, m in each.items() if n not in names} for block, each in plan.linears.items()}
    return Plan(plan.blocks, linears, [*plan.left, *(name for name in plan.all_linears() if name in names)])


def _tied_weights(model: nn.Module) -> set[int]:
    """Weights that several modules share (an output head tied to the embedding): quantizing one would change the others."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {key for key, count in owners.items() if count > 1}


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    rows, columns = weight.shape[0], weight[0].numel()
    return (columns, rows) if is_conv1d(module) else (rows, columns)
