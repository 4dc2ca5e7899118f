"""One block as a method sees it: its linear maps, the calls that run through it, and where the results go."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.hessian import Hessian, shrink_towards_mean
from tersor.calibrate.lockstep import Call
from tersor.calibrate.parallel import combine
from tersor.calibrate.routing import Routing, routed
from tersor.calibrate.statistics import (
    CallOrder,
    Original,
    call_order,
    gather_hessians,
    gather_means,
    is_expert,
    kind_of,
)
from tersor.formats.grid import Stored
from tersor.formats.packed_weight import PackedWeight
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.layers.experts import ExpertMap
from tersor.layers.linear_map import LinearMap, columns_of, matrix_shape, round_inputs, set_weight_matrix, weight_matrix
from tersor.methods.method import Report
from tersor.methods.solution import AnySolution
from tersor.methods.solved_apart import Solved, agree_on_order, solve_apart

STATISTICS_MEMORY = 8 * 2**30  # bytes; of the experts' Hessians that are gathered at once


@dataclass(frozen=True)
class LayerReport(Report):
    """How one linear map was solved."""

    bits: float  # of a number in the result
    group_size: int
    error: float  # the method's own measure
    damp: float
    tokens: int  # of the samples that reached it
    seconds: float
    note: str = ""  # what was unusual
    condition: float | None = None  # a lower bound of the damped Hessian's condition number; None: not factorized
    sparsity: float | None = None  # share of the weights that are zero; None: the method does not prune

    def row(self) -> dict[str, Any]:
        found = asdict(self)
        if self.sparsity is None:
            del found["sparsity"]
        return found


@dataclass(frozen=True)
class Statistics:
    """What the calibration says of one map."""

    hessian: Tensor  # H
    tokens: int  # that it was gathered from
    # 2/N · Σ (x₀ - x) xᵀ, where x₀ are the original model's inputs; None where it was not asked for or these cannot be compared
    deviation: Tensor | None = None


Solver = Callable[[str], tuple[AnySolution, str]]  # from a map's name to its solution, and a note of what was unusual


@dataclass
class Block:
    """A block while it is compressed."""

    name: str
    module: nn.Module
    linears: Mapping[str, LinearMap]  # the maps to compress, by full name
    calls: Sequence[Call]  # of the calibration samples to this block
    stored: Stored | None  # what the file format will keep of a grid; None: everything
    hessian_dtype: torch.dtype
    routing: Routing  # which experts the samples visit while statistics are gathered
    packed: dict[str, PackedWeight] = field(default_factory=dict)  # the finished layers, by full name
    reports: list[LayerReport] = field(default_factory=list)
    original: Original | None = None  # where a method compares with it
    outputs: Mapping[str, Tensor] = field(default_factory=dict)  # H_O of maps by full name, where a method asks

    def part(self, names: Sequence[str]) -> Block:
        """The same block with only some of its linear maps; results go to the same place."""
        return replace(self, linears={name: self.linears[name] for name in names})

    @cached_property
    def order(self) -> CallOrder:
        return agree_on_order(self.name, call_order(self.linears, self.calls))

    @property
    def device(self) -> torch.device:
        return weight_matrix(next(iter(self.linears.values()))).device

    def hessians(self, names: Sequence[str]) -> Iterator[dict[str, Statistics]]:
        """The statistics of the maps, turn by turn. Each turn runs the block as it is then, with what was solved before.

        An expert's Hessian is moved towards the mean of its layer's. Experts take several turns where their statistics do not fit
        into STATISTICS_MEMORY together.
        """
        turns = list(self._turns(names))
        means = self._means(names) if len(turns) > 1 else {}
        for turn in turns:
            yield self._statistics(turn, means)

    def _means(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Σ x xᵀ over the tokens of all experts of a kind, divided by their number."""
        experts = {name: each for name in names if isinstance(each := self.linears[name], ExpertMap)}
        with routed(self.module, self.routing) as rows:
            own = gather_means(experts, self.calls, rows, self.hessian_dtype)
        return {kind: each.total / (each.weight or 1) for kind, each in combine(own, self.device).items()}

    def _statistics(self, names: Sequence[str], layer_means: Mapping[str, Tensor]) -> dict[str, Statistics]:
        maps = {name: self.linears[name] for name in names}
        with routed(self.module, self.routing) as rows:
            own = gather_hessians(
                maps, self.calls, rows, once=self.order.once, dtype=self.hessian_dtype, original=self.original
            )
        gathered = combine(own, self.device)
        experts: dict[str, dict[str, Hessian]] = defaultdict(dict)
        for name in filter(is_expert, names):
            experts[kind_of(name)][name] = gathered[name]
        others = {id(each): each for name, each in gathered.items() if not is_expert(name)}
        means = {key: each.matrix for key, each in others.items()}  # maps that share a Hessian share its matrix
        matrices = {name: means[id(each)] for name, each in gathered.items() if not is_expert(name)}
        apart = {key: each.mean_deviation for key, each in others.items()}
        for kind, mates in experts.items():
            matrices |= shrink_towards_mean(mates, layer_means.get(kind))
        return {name: Statistics(matrices[name], each.tokens, apart.get(id(each))) for name, each in gathered.items()}

    def _turns(self, names: Sequence[str]) -> Iterator[list[str]]:
        turn: list[str] = []
        size = 0
        for name in names:
            needed = columns_of(self.linears[name]) ** 2 * (torch.float64.itemsize + self.hessian_dtype.itemsize)
            if turn and is_expert(name) and size + needed > STATISTICS_MEMORY:
                yield turn
                turn, size = [], 0
            turn.append(name)
            size += needed if is_expert(name) else 0
        if turn:
            yield turn

    def solve(self, solver: Solver, statistics: Mapping[str, Statistics] | None = None) -> None:
        """Replace each map that has statistics, or without these every map, by solver(name). Several processes share the maps."""
        names = self.linears if statistics is None else statistics
        shapes = {name: matrix_shape(self.linears[name]) for name in names}
        costs = {name: columns**2 * (rows + columns) for name, (rows, columns) in shapes.items()}

        def timed(name: str) -> Solved:
            started = time.perf_counter()
            solution, note = solver(name)
            return Solved(solution, note, time.perf_counter() - started)

        for name, solved in solve_apart(costs, timed, self.device):
            self.replace(name, solved, tokens=statistics[name].tokens if statistics else 0)

    def replace(self, name: str, solved: Solved, *, tokens: int) -> None:
        """Replace a weight by its solution: packed for the result, dense in the block, which goes on running."""
        solution = solved.solution
        set_weight_matrix(self.linears[name], solution.dequantize())
        packed = solution.pack(self.stored)
        if isinstance(packed, QuantizedWeight) and packed.a_bits is not None:
            round_inputs(self.linears[name])
        if packed is not None:
            self.packed[name] = packed
        told = solution.error, solution.damp, tokens, solved.seconds, solved.note, solution.condition, solution.sparsity
        self.reports.append(LayerReport(name, solution.width, solution.group_size, *told))
