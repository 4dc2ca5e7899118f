"""One block as a method sees it: its linear maps, the calls that run through it, and where the results go."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tersor.calibrate.hessian import Hessian, shrink_towards_mean
from tersor.calibrate.lockstep import Call
from tersor.calibrate.statistics import CallOrder, call_order, gather_hessians, is_expert, kind_of
from tersor.compress.gptq_solver import Solution
from tersor.formats.grid import Stored
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.layers.linear_map import LinearMap, columns_of, set_weight_matrix

STATISTICS_MEMORY = 8 * 2**30  # bytes of experts' Hessians that are gathered at once


@dataclass(frozen=True)
class LayerReport:
    """How one linear map was solved. error: the method's own measure; tokens: how many calibrated it; note: what was unusual."""

    name: str
    bits: float
    group_size: int
    error: float
    damp: float
    tokens: int
    seconds: float
    note: str = ""

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Block:
    """linears: the maps to compress, by full name; calls: the calibration samples' calls to this block.

    stored: what the file format will keep of a grid (None: everything). packed: the finished layers, by full name.
    """

    name: str
    linears: Mapping[str, LinearMap]
    calls: Sequence[Call]
    stored: Stored | None
    hessian_dtype: torch.dtype
    packed: dict[str, QuantizedWeight] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)

    def part(self, names: Sequence[str]) -> Block:
        """The same block with only some of its linear maps; results go to the same place."""
        return replace(self, linears={name: self.linears[name] for name in names})

    @cached_property
    def order(self) -> CallOrder:
        return call_order(self.linears, self.calls)

    def hessians(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor, int]]:
        """(name, H, tokens) of each map, from the block as it is when its turn comes.

        The Hessian of an expert is moved towards the mean of its layer's. More experts than fit the memory set aside for
        statistics take turns, each with passes of its own.
        """
        for some in self._turns(names):
            maps = {name: self.linears[name] for name in some}
            gathered = gather_hessians(maps, self.calls, once=self.order.once, dtype=self.hessian_dtype)
            matrices = {name: hessian.matrix for name, hessian in gathered.items()}
            experts: dict[str, dict[str, Hessian]] = defaultdict(dict)
            for name in some:
                if is_expert(name):
                    experts[kind_of(name)][name] = gathered[name]
            for mates in experts.values():
                matrices |= shrink_towards_mean(mates)
            for name in some:
                yield name, matrices.pop(name), gathered[name].tokens

    def _turns(self, names: Sequence[str]) -> Iterator[list[str]]:
        turn: list[str] = []
        size = 0
        for name in names:
            needed = columns_of(self.linears[name]) ** 2 * self.hessian_dtype.itemsize
            if turn and is_expert(name) and size + needed > STATISTICS_MEMORY:
                yield turn
                turn, size = [], 0
            turn.append(name)
            size += needed if is_expert(name) else 0
        if turn:
            yield turn

    def replace(
        self, name: str, solution: Solution, group_size: int, *, tokens: int, started: float, note: str = ""
    ) -> None:
        """Put a solved weight in the place of the original: packed for the result, dense in the block that runs on."""
        module = self.linears[name]
        set_weight_matrix(module, solution.dequantize())
        bits = solution.bits
        if bits != "ternary" or torch.equal(solution.scales, -solution.zeros):
            self.packed[name] = solution.pack(group_size, self.stored)
        width = 2 if bits == "ternary" else bits
        seconds = time.perf_counter() - started
        self.reports.append(LayerReport(name, width, group_size, solution.error, solution.damp, tokens, seconds, note))
