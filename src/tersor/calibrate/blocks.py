"""Find the repeated blocks of any model, and the other parts that own weights, in the module tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from tersor.layers.linear_map import is_linear_map, linear_maps

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class Unit:
    """A part of the model that is run, and held in memory, as one. Blocks are what the methods compress."""

    name: str
    module: nn.Module
    is_block: bool


def find_units(model: nn.Module) -> list[Unit]:
    """The blocks, and every module outside them that owns parameters and whose children own none, in tree order.

    Parameters that belong directly to a module with weighted children (a class token, say) are in no unit.
    """
    return list(_units("", model))


def units_of(model: nn.Module) -> list[Unit]:
    """The units of a model; the whole model as one block where nothing is repeated."""
    found = find_units(model)
    return found if any(unit.is_block for unit in found) else [Unit("", model, True)]


def find_blocks(model: nn.Module) -> list[Unit]:
    """The repeated blocks; the model itself where nothing is repeated."""
    return [unit for unit in units_of(model) if unit.is_block]


def _units(name: str, module: nn.Module) -> Iterator[Unit]:
    repeated = _repeated_children(module)
    children = list(module.named_children())
    if name and not any(_has_weights(child) for _, child in children):
        if _has_weights(module):
            yield Unit(name, module, False)
        return
    for child_name, child in children:
        path = f"{name}.{child_name}" if name else child_name
        if child_name in repeated:
            yield Unit(path, child, True)
        else:
            yield from _units(path, child)


def _repeated_children(module: nn.Module) -> set[str]:
    """The children of a list that are blocks: at least two of one class, and each holds a linear map. In a ModuleList a single
    one counts too (a model cut down to one layer)."""
    if not isinstance(module, CONTAINERS):
        return set()
    weighted = {n: c for n, c in module.named_children() if not isinstance(c, CONTAINERS) and _holds_linear_map(c)}
    kinds = Counter(type(child) for child in weighted.values())
    if any(count > 1 for count in kinds.values()) or (isinstance(module, nn.ModuleList) and weighted):
        return {name for name, child in weighted.items() if not is_linear_map(child)}
    return set()


def _holds_linear_map(module: nn.Module) -> bool:
    return bool(linear_maps(module))


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
