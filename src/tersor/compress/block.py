"""One block as a method sees it: its linear maps, the calls that run through it, and where the results go."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from tersor.calibrate.hessian import Hessian
from tersor.calibrate.lockstep import Call
from tersor.calibrate.statistics import CallOrder, call_order, gather_hessians
from tersor.compress.gptq_solver import Solution
from tersor.formats.grid import Stored
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.layers.linear_map import set_weight_matrix


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
    linears: Mapping[str, nn.Module]
    calls: Sequence[Call]
    stored: Stored | None
    hessian_dtype: torch.dtype
    packed: dict[str, QuantizedWeight] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)

    @cached_property
    def order(self) -> CallOrder:
        return call_order(self.linears, self.calls)

    def hessians(self, names: Sequence[str]) -> dict[str, Hessian]:
        """Statistics of these maps' inputs, from the block as it is now."""
        maps = {name: self.linears[name] for name in names}
        return gather_hessians(maps, self.calls, once=self.order.once, dtype=self.hessian_dtype)

    def replace(
        self, name: str, solution: Solution, group_size: int, *, tokens: int, started: float, note: str = ""
    ) -> None:
        """Put a solved weight in the place of the original: packed for the result, dense in the block that runs on."""
        module = self.linears[name]
        set_weight_matrix(module, solution.dequantize().to(next(module.parameters()).dtype))
        bits = solution.bits
        if bits != "ternary" or torch.equal(solution.scales, -solution.zeros):
            self.packed[name] = solution.pack(group_size, self.stored)
        width = 2 if bits == "ternary" else bits
        seconds = time.perf_counter() - started
        self.reports.append(LayerReport(name, width, group_size, solution.error, solution.damp, tokens, seconds, note))
