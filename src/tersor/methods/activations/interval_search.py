"""Steps of grids found by search: EasyQuant's alternation with the error weighted by squared gradients, as PTQ4ViT does it.

A layer's output for rounded operands, o^, is compared with its output for exact ones, o. The error is

    Σ over samples of the mean over the rest of (g (o - o^))²,       g = ∂ loss / ∂ o,

and a step is a multiple of its first value, I = f · I_0, f = low + i (high - low) / count for i = 0 .. count - 1, so `high`
itself is never tried (a slip in the published code). The least error wins; of equal ones the first. The two operands take turns,
`rounds` times: each is searched with the present steps of the other.

PTQ4ViT: Yuan et al., ECCV 2022, arXiv 2111.12293; EasyQuant: Wu et al., 2020, arXiv 2006.16669.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tersor.formats.activation_grid import at_least_float32
from tersor.formats.grid import Grid
from tersor.formats.twin_grid import GELU_MINIMUM, GeluGrid, SplitGrid
from tersor.layers.linear_map import call_with_matrix, weight_matrix
from tersor.layers.products import Multiply
from tersor.layers.quantized_map import channel_shares, round_channels

NO_STEP = 2.0**-23  # replaces a step of 0, where a channel holds only zeros
SPLITS = 20  # 1, 1/2, 1/4, ...: of PTQ4ViT's grid for softmax outputs
Error = Callable[[Tensor], Tensor]  # of steps


@dataclass(frozen=True)
class Search:
    """Which multiples of the first steps are tried, and how often the operands take turns."""

    low: float = 0.01
    high: float = 1.2
    count: int = 100
    rounds: int = 3

    def factors(self) -> list[float]:
        return [self.low + n * (self.high - self.low) / self.count for n in range(self.count)]


@dataclass
class Record:
    """One call of a layer, or one product: operands (x,) or (a, b), exact output, its gradient, and how it is computed."""

    operands: tuple[Tensor, ...]
    output: Tensor
    gradient: Tensor
    multiply: Multiply | None = None

    def squared(self, found: Tensor) -> Tensor:
        return (self.gradient * (self.output - found)).square()


def symmetric_steps(largest: Tensor, bits: int) -> Tensor:
    """The first steps of a signed grid with the levels -2^(bits-1) .. 2^(bits-1) - 1. largest: the largest magnitudes."""
    return _positive(largest / (2 ** (bits - 1) - 0.5))


def symmetric(steps: Tensor, bits: int) -> Grid:
    return Grid(steps, torch.full_like(steps, 2 ** (bits - 1)), bits)


def asymmetric(low: Tensor, high: Tensor, bits: int) -> Grid:
    """The grid of [low, high], widened to hold 0, so that the zero point is one of its codes."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _positive((high - low) / (2**bits - 1))
    return Grid(scale, torch.round(-low / scale), bits)


def overflows(low: Tensor, high: Tensor) -> int:
    """How many of these ranges do not hold 0, so that their zero point would lie outside the codes."""
    return int(((low > 0) | (high < 0)).sum())


def _positive(steps: Tensor) -> Tensor:
    return torch.where(steps == 0, torch.full_like(steps, NO_STEP), steps)


def best_steps(first: Tensor, present: Tensor, error: Error, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The steps with the least error and that error. first, present: [rows, parts]; the parts are searched one after another.

    error(steps): one number per row, [rows], or one for all rows together, [1].
    """
    steps = present.clone()
    least = steps.new_full((), float("inf"))
    for part in range(steps.shape[1]):
        least, chosen = steps.new_full((), float("inf")), steps[:, part]
        for factor in factors:
            trial = steps.clone()
            trial[:, part] = factor * first[:, part]
            found = error(trial)
            better = found < least
            least, chosen = torch.where(better, found, least), torch.where(better, trial[:, part], chosen)
        steps[:, part] = chosen
    return steps, least


@dataclass(frozen=True)
class MapGrids:
    """What a linear map's operands are rounded to."""

    weight: Tensor  # steps [row blocks, column blocks]
    input: Grid | GeluGrid  # scale and zero [1, channel blocks] or [channels, 1], or PTQ4ViT's grid for GELU outputs
    channelwise: bool  # whether they are [channels, 1]
    error: float = float("inf")


@dataclass
class MapProblem:
    """A linear map and its calls."""

    module: nn.Module
    records: list[Record]
    w_bits: int
    a_bits: int
    input_blocks: int = 1  # blocks of channels with a step each, where not every channel has its own
    W: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.W = at_least_float32(weight_matrix(self.module).detach())
        self.image = isinstance(self.module, nn.Conv2d)

    @property
    def groups(self) -> int | None:
        return self.module.groups if isinstance(self.module, nn.Conv2d) else None

    def ranges(self, *, channelwise: bool) -> tuple[Tensor, Tensor]:
        """The least and the largest input for each step: [1, blocks] or [channels, 1]."""
        ends = []
        for record in self.records:
            x = record.operands[0]
            rows = x.transpose(0, 1).flatten(1) if self.image else x.flatten(0, -2).t()  # [channels, values]
            ends.append(torch.stack(rows.aminmax(dim=1)))
        low, high = torch.stack([e[0] for e in ends]).amin(0), torch.stack([e[1] for e in ends]).amax(0)
        if channelwise:
            return low[:, None], high[:, None]
        return low.view(1, self.input_blocks, -1).amin(2), high.view(1, self.input_blocks, -1).amax(2)

    def first_input(self, *, channelwise: bool, zero_point: bool) -> Grid:
        low, high = self.ranges(channelwise=channelwise)
        if zero_point:
            return asymmetric(low, high, self.a_bits)
        return symmetric(symmetric_steps(torch.maximum(-low, high), self.a_bits), self.a_bits)

    def first_gelu(self) -> GeluGrid:
        _, high = self.ranges(channelwise=False)
        return GeluGrid(symmetric_steps(high.amax(), self.a_bits), self.a_bits)

    def weight_for(self, input: Grid | GeluGrid, *, channelwise: bool) -> Tensor:
        """The weight whose codes are stored [out, in]: with channels' grids, each channel has taken its share of their steps."""
        if not channelwise:
            return self.W
        dense = self.W.view(self.module.weight.shape) if self.image else self.W  # type: ignore[arg-type]
        return (dense * channel_shares(input.scale[:, 0], dense, self.groups)).flatten(1)

    def first_weight(self, W: Tensor, blocks: tuple[int, int]) -> Tensor:
        rows, columns = blocks
        return symmetric_steps(W.abs().view(rows, W.shape[0] // rows, columns, -1).amax((1, 3)), self.w_bits)

    def rounded_weight(self, W: Tensor, steps: Tensor) -> Tensor:
        return symmetric(_spread(steps, W), self.w_bits).round(W)

    def rounded_input(self, x: Tensor, input: Grid | GeluGrid, *, channelwise: bool) -> Tensor:
        """The input that the stored weight is multiplied with."""
        if isinstance(input, GeluGrid):
            return input.round(x)
        if channelwise:
            return round_channels(x, Grid(input.scale[:, 0], input.zero[:, 0], input.bits), image=self.image)
        if input.scale.numel() == 1:
            return Grid(input.scale.view(()), input.zero.view(()), input.bits).round(x)
        channels = x.shape[1] if self.image else x.shape[-1]
        scale, zero = (v[0].repeat_interleave(channels // v.shape[1]) for v in (input.scale, input.zero))
        shape = (-1, 1, 1) if self.image else (-1,)
        return Grid(scale.view(shape), zero.view(shape), input.bits).round(x)

    @torch.no_grad()
    def output(self, x: Tensor, matrix: Tensor) -> Tensor:
        return call_with_matrix(self.module, x, matrix)

    def errors(self, inputs: Sequence[Tensor], matrix: Tensor) -> Tensor:
        """The error of each output, [out], for rounded inputs."""
        total = torch.zeros(len(self.W), dtype=self.W.dtype, device=self.W.device)
        for record, x in zip(self.records, inputs, strict=True):
            each = record.squared(self.output(x, matrix))
            positions = each[0].numel() // len(total)
            total += (each.sum((0, 2, 3)) if self.image else each.flatten(0, -2).sum(0)) / positions
        return total

    def quantized(self, grids: MapGrids, x: Tensor) -> Tensor:
        """The map's output with both operands rounded."""
        W = self.weight_for(grids.input, channelwise=grids.channelwise)
        return self.output(
            self.rounded_input(x, grids.input, channelwise=grids.channelwise), self.rounded_weight(W, grids.weight)
        )

    def start(self, input: Grid | GeluGrid, *, channelwise: bool, blocks: tuple[int, int]) -> MapGrids:
        return MapGrids(self.first_weight(self.weight_for(input, channelwise=channelwise), blocks), input, channelwise)

    def search_weight(self, first: MapGrids, present: MapGrids, factors: Sequence[float]) -> MapGrids:
        W = self.weight_for(present.input, channelwise=present.channelwise)
        inputs = [
            self.rounded_input(r.operands[0], present.input, channelwise=present.channelwise) for r in self.records
        ]

        def error(steps: Tensor) -> Tensor:
            return self.errors(inputs, self.rounded_weight(W, steps)).view(steps.shape[0], -1).mean(1)

        steps, least = best_steps(first.weight, present.weight, error, factors)
        return replace(present, weight=steps, error=float(least.mean()))

    def search_input(self, first: MapGrids, present: MapGrids, factors: Sequence[float]) -> MapGrids:
        """Search one factor for all channels, as published, so that their shares stay the same."""
        W = self.weight_for(present.input, channelwise=present.channelwise)
        matrix = self.rounded_weight(W, present.weight)

        def grid(steps: Tensor) -> Grid | GeluGrid:
            return replace(present.input, scale=steps.view(present.input.scale.shape))

        def error(steps: Tensor) -> Tensor:
            inputs = [
                self.rounded_input(r.operands[0], grid(steps), channelwise=present.channelwise) for r in self.records
            ]
            return self.errors(inputs, matrix).mean().view(1)

        start, now = (g.input.scale.view(1, 1) if g.input.scale.dim() == 0 else g.input.scale for g in (first, present))
        steps, least = best_steps(start, now, error, factors)
        return replace(present, input=grid(steps), error=float(least.mean()))

    def rounds(self, first: MapGrids, present: MapGrids, search: Search) -> MapGrids:
        for _ in range(search.rounds):
            present = self.search_weight(first, present, search.factors())
            present = self.search_input(first, present, search.factors())
        return present


def _spread(steps: Tensor, W: Tensor) -> Tensor:
    """Steps of blocks, repeated so that they broadcast against W."""
    rows = steps.repeat_interleave(len(W) // len(steps), 0)
    return rows if rows.shape[1] == 1 else rows.repeat_interleave(W.shape[1] // rows.shape[1], 1)


@dataclass(frozen=True)
class ProductGrids:
    """The grids of both operands. Scale and zero are [heads, 1], those of a split grid []."""

    pair: tuple[Grid | SplitGrid, Grid | SplitGrid]
    error: float = float("inf")

    def shaped(self) -> tuple[Grid | SplitGrid, Grid | SplitGrid]:
        """The grids with scale and zero in shapes that broadcast against the operands: [heads, 1, 1] or []."""
        first, second = map(_shaped, self.pair)
        return first, second


def _shaped(grid: Grid | SplitGrid) -> Grid | SplitGrid:
    if isinstance(grid, SplitGrid):
        return grid
    shape = () if grid.scale.numel() == 1 else (-1, 1, 1)
    return Grid(grid.scale.view(shape), grid.zero.view(shape), grid.bits)


@dataclass
class ProductProblem:
    """A product of two activations, a [b, heads, n, d] and b [b, heads, d, m], or of fewer axes with one grid an operand."""

    records: list[Record]
    bits: tuple[int, int]
    heads: int = field(init=False)

    def __post_init__(self) -> None:
        shapes = [each.shape for record in self.records for each in (*record.operands, record.output)]
        heads = {shape[1] if len(shape) == 4 else 1 for shape in shapes}
        self.heads = heads.pop() if len(heads) == 1 else 1

    def ranges(self, operand: int) -> tuple[Tensor, Tensor]:
        """Least and largest [heads, 1]."""
        rows = [self._by_head(record.operands[operand]) for record in self.records]
        low, high = (torch.stack([getattr(each, end)(1) for each in rows]) for end in ("amin", "amax"))
        return low.amin(0)[:, None], high.amax(0)[:, None]

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1) if self.heads == 1 else x.transpose(0, 1).flatten(1)

    def first(self, operand: int, *, zero_point: bool) -> Grid:
        low, high = self.ranges(operand)
        bits = self.bits[operand]
        if zero_point:
            return asymmetric(low, high, bits)
        return symmetric(symmetric_steps(torch.maximum(-low, high), bits), bits)

    def quantized(self, grids: ProductGrids, record: Record) -> Tensor:
        assert record.multiply is not None
        a, b = (grid.round(x) for x, grid in zip(record.operands, grids.shaped(), strict=True))
        return record.multiply(a, b)

    def errors(self, grids: ProductGrids) -> Tensor:
        """The error of each head [heads]."""
        total = torch.zeros(self.heads, dtype=self.records[0].output.dtype, device=self.records[0].output.device)
        for record in self.records:
            each = record.squared(self.quantized(grids, record))
            total += self._by_head(each).sum(1) / (each[0].numel() / self.heads)
        return total

    def search(self, operand: int, first: Grid, present: ProductGrids, factors: Sequence[float]) -> ProductGrids:
        kept = present.pair[1 - operand]

        def pair(steps: Tensor) -> ProductGrids:
            grid = replace(first, scale=steps)
            return ProductGrids((grid, kept) if operand == 0 else (kept, grid))

        now = present.pair[operand].scale
        steps, least = best_steps(first.scale, now, lambda steps: self.errors(pair(steps)), factors)
        return replace(pair(steps), error=float(least.mean()))

    def rounds(self, first: Sequence[Grid | SplitGrid], present: ProductGrids, search: Search) -> ProductGrids:
        """The grids after all turns. first: the grids whose multiples are tried; a split grid stays as it is."""
        for _ in range(search.rounds):
            for operand, grid in enumerate(first):
                if isinstance(grid, Grid):
                    present = self.search(operand, grid, present, search.factors())
        return present

    def search_split(self, present: ProductGrids) -> ProductGrids:
        """Search the split of a softmax's output (the first operand) among the powers of two, one for all heads."""
        best = replace(present, error=float("inf"))
        for n in range(SPLITS):
            split = SplitGrid(torch.full_like(self.records[0].output.new_zeros(()), 2.0**-n), self.bits[0])
            trial = ProductGrids((split, present.pair[1]))
            found = float(self.errors(trial).mean())
            if found < best.error:
                best = replace(trial, error=found)
        return best


def looks_like_gelu(low: Tensor, high: Tensor) -> bool:
    """Whether numbers in this range can come from a GELU: the least is, about, the minimum of GELU."""
    return -GELU_MINIMUM - 1e-3 <= float(low.amin()) <= -0.15 and float(high.amax()) > 0
