"""Quantization grids: the levels that the numbers of a row, or of a group within a row, may take.

Uniform grid of `bits` bits, q = clamp(round(x / scale) + zero, 0, 2^bits - 1), x ≈ scale · (q - zero), rounding half to even.
Ternary grid: x becomes `scale` where x > scale/2, `zero` (a negative level) where x < zero/2, else 0; codes 2, 0 and 1. Source:
the GPTQ reference implementation (Frantar et al., ICLR 2023), with one difference: a symmetric range is always [-max |x|, max
|x|]. In a row without negative values the reference keeps the minimum at 0. Its zero point is in the middle all the same, so
the step is half of what it should be and the upper half of the row is clipped; pruned models have many such groups. As in the
reference, a row of zeros gets the range [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Bits = int | Literal["ternary"]


@dataclass(frozen=True)
class ClipSearch:
    """Shrink a grid's range step by step and keep the range with the least |error|^norm (GPTQ's `mse` option)."""

    norm: float = 2.4
    steps: int = 100  # candidates are 1, 1 - 1/steps, 1 - 2/steps, ...
    max_shrink: float = 0.8  # ... down to 1 - max_shrink


@dataclass(frozen=True)
class Stored:
    """What a file will keep of a grid: steps in `scale_dtype`, zero points of at least `min_zero`."""

    scale_dtype: torch.dtype
    min_zero: int = 0


@dataclass(frozen=True)
class Grid:
    """The grids of `rows` rows."""

    scale: Tensor  # [rows, 1]; of a ternary grid the positive level
    zero: Tensor  # [rows, 1]; of a ternary grid the negative level
    bits: Bits

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of x [rows, columns], in x's floating dtype."""
        return quantize(x, self.scale, self.zero, self.bits)

    def dequantize(self, codes: Tensor) -> Tensor:
        return dequantize(codes, self.scale, self.zero, self.bits)

    def round(self, x: Tensor) -> Tensor:
        """x moved to the nearest level."""
        return self.dequantize(self.quantize(x))


def levels_of(bits: Bits) -> int:
    """How many levels a grid has."""
    return 3 if bits == "ternary" else 2**bits


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: Bits) -> Tensor:
    if bits == "ternary":
        return 1 + (x > scale / 2).to(x.dtype) - (x < zero / 2).to(x.dtype)
    return torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, bits: Bits) -> Tensor:
    if bits == "ternary":
        return torch.where(codes == 2, scale, torch.where(codes == 0, zero, torch.zeros_like(scale)))
    return scale * (codes - zero)


def fit_grid(
    x: Tensor,
    bits: Bits,
    *,
    sym: bool,
    clip_search: ClipSearch | None = None,
    stored: Stored | None = None,
    weights: Tensor | None = None,
    as_published: bool = False,
    best: Callable[[Tensor, Tensor, Tensor, Bits, Tensor | None], Tensor] | None = None,
) -> Grid:
    """Fit one grid per row of x [rows, columns] (floating).

    weights [columns]: the cost of an error in each column, for the search; None: all cost the same.
    best(x, scales, zeros, bits, weights): which of the candidates [rows, candidates] to take for each row, [rows, 1]; None: found
    here, by clip_search's norm.
    as_published: use the reference's half range for symmetric rows without negative values, to compare with its numbers.
    stored: make a grid that the file format can hold, so that a solver that compensates errors sees the levels that a reader of
    the file will see; None keeps the grid exact.
    """
    low = x.amin(1, keepdim=True).clamp(max=0)
    high = x.amax(1, keepdim=True).clamp(min=0)
    if sym:
        high = torch.maximum(low.abs(), high)
        # A ternary grid that goes into no file is the reference's: without negative values it has no negative level.
        one_sided = as_published or (bits == "ternary" and stored is None)
        low = torch.where(low < 0, -high, low) if one_sided else -high
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    grid = _grid_of_range(low, high, bits, sym, stored)
    if clip_search is None:
        return grid

    keeps = [1 - step / clip_search.steps for step in range(int(clip_search.max_shrink * clip_search.steps))]
    if best is not None:
        kept = torch.tensor(keeps, dtype=x.dtype, device=x.device)
        found = _grid_of_range(kept * low, kept * high, bits, sym, stored)
        chosen = best(x, found.scale, found.zero, bits, weights)
        return Grid(found.scale.gather(1, chosen), found.zero.gather(1, chosen), bits)
    best_error = torch.full_like(low, float("inf"))
    best_scale, best_zero = grid.scale, grid.zero
    for keep in keeps:
        candidate = _grid_of_range(keep * low, keep * high, bits, sym, stored)
        error = (candidate.round(x) - x).abs().pow(clip_search.norm)
        error = (error if weights is None else error * weights).sum(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, candidate.scale, best_scale)
        best_zero = torch.where(better, candidate.zero, best_zero)
    return Grid(best_scale, best_zero, bits)


def _grid_of_range(low: Tensor, high: Tensor, bits: Bits, sym: bool, stored: Stored | None) -> Grid:
    if bits == "ternary":
        return Grid(as_stored(high, stored), as_stored(low, stored), bits)
    largest = 2**bits - 1
    scale = as_stored((high - low) / largest, stored)
    if sym:
        return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)), bits)
    zero = torch.round(-low / scale).clamp(0, largest)
    if stored is not None and stored.min_zero > 0:
        # All-positive rows: give up the levels below zero, so that every reader can read the file.
        too_low = zero < stored.min_zero
        scale = torch.where(too_low, as_stored(high / (largest - stored.min_zero), stored), scale)
        zero = zero.clamp(min=stored.min_zero)
    return Grid(scale, zero, bits)


def as_stored(scale: Tensor, stored: Stored | None) -> Tensor:
    """The value that a reader of the file gets back. Never 0: a step that underflows becomes the smallest positive number."""
    if stored is None:
        return scale
    tiny, largest = torch.finfo(stored.scale_dtype).smallest_normal, torch.finfo(stored.scale_dtype).max
    magnitude = scale.abs().clamp(tiny, largest).to(stored.scale_dtype).to(scale.dtype)
    return torch.where(scale < 0, -magnitude, torch.where(scale == 0, torch.zeros_like(scale), magnitude))
