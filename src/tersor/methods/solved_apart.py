"""Several processes solve the linear maps of a block, each map by one of them. A single process solves all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tersor import processes
from tersor.calibrate.statistics import CallOrder
from tersor.errors import TersorError
from tersor.methods.solution import AnySolution


@dataclass(frozen=True)
class Solved:
    """A solved map."""

    solution: AnySolution
    note: str  # what was unusual
    seconds: float  # that its process took


def agree_on_order(block: str, order: CallOrder) -> CallOrder:
    """The first process's order of calls. `once` holds only where it holds on every process."""
    found = processes.gather((block, order))
    for rank, (other, _) in enumerate(found):
        if other != found[0][0]:
            raise TersorError(
                f"the samples of process {rank} take another path through the model ({other}) than those of process 0 "
                f"({found[0][0]}); use one process"
            )
    return CallOrder(found[0][1].groups, all(each.once for _, each in found))


def assign(costs: Mapping[str, int], workers: int) -> dict[str, int]:
    """{name: worker}. The costliest come first, each to the worker with the least to do so far."""
    load = [0] * workers
    owner: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owner[name] = min(range(workers), key=lambda worker: load[worker])
        load[owner[name]] += costs[name]
    return owner


def solve_apart(
    costs: Mapping[str, int], solve: Callable[[str], Solved], device: torch.device
) -> Iterator[tuple[str, Solved]]:
    """Each name's solution, in the order of `costs`. One process solves it, and all get it."""
    if processes.processes() == 1:
        yield from ((name, solve(name)) for name in costs)
        return
    owner = assign(costs, processes.processes())
    mine = {name: solve(name) for name in costs if owner[name] == processes.rank()}
    outlines = processes.gather({name: _outline(solved) for name, solved in mine.items()})
    for name in costs:
        source = owner[name]
        outline, note, seconds = outlines[source][name]
        own = mine.pop(name).solution if name in mine else None
        yield name, Solved(_send(outline, own, source, device), note, seconds)


@dataclass(frozen=True)
class _Shape:
    """Stands for a tensor that has not arrived yet."""

    shape: torch.Size
    dtype: torch.dtype


def _outline(solved: Solved) -> tuple[AnySolution, str, float]:
    """A solution without the numbers in its tensors."""
    known: Any = solved.solution
    values = {each.name: getattr(known, each.name) for each in fields(known)}
    shapes = {name: _Shape(v.shape, v.dtype) for name, v in values.items() if isinstance(v, Tensor)}
    return replace(known, **shapes), solved.note, solved.seconds


def _send(outline: Any, solution: AnySolution | None, source: int, device: torch.device) -> AnySolution:
    values = {}
    for name, value in ((each.name, getattr(outline, each.name)) for each in fields(outline)):
        if isinstance(value, _Shape):
            own = getattr(solution, name, None)
            empty = torch.empty(value.shape, dtype=value.dtype, device=device)
            values[name] = empty if own is None else own.to(device).contiguous()
            processes.send(values[name], source)
    sent: AnySolution = replace(outline, **values)
    return sent
