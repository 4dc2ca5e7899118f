"""Grids for activations: uniform ones whose range is chosen among quantiles, and a logarithmic one for softmax outputs.

RepQ-ViT (Li, Xiao, Yang, Gu, ICCV 2023, arXiv 2212.08254) chooses the range [low, high] of a uniform grid with 2^b levels,
scale = (high - low) / (2^b - 1) and zero = round(-low / scale), among three: the 0.999, 0.9999 and 0.99999 quantiles and their
mirror images. The one with the least squared error is taken, the first of equals. Zero points are whole numbers in floating
point. They may lie outside the codes, because data that are all positive or all negative lie beside zero.

Where layers run in integers, every token has a symmetric grid of its own, found when it comes (`token_codes`).

The logarithmic grid of base √2 has the levels scale · √2^(-k), k = 0 .. 2^b - 1, and 0. Its scale is chosen in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.formats.grid import Grid

QUANTILES = (0.999, 0.9999, 0.99999)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where it has more precision: codes are computed in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The codes -128 .. 127 of every row of x [..., in], in float32, and the rows' steps [..., 1]: q = clamp(round(x / s)) with
    s = max |x| / 127.5, as the compressed-tensors package rounds a token. (vLLM divides by 127.) A row of zeros has step 1; one
    that is not finite has a step that is not either, and codes 0.
    """
    wide = x.float()
    step = wide.abs().amax(-1, keepdim=True) / 127.5
    step = torch.where(step == 0, torch.ones_like(step), step)
    codes = torch.round(wide / step).clamp(-128, 127)
    return torch.where(torch.isfinite(step), codes, torch.zeros_like(codes)), step


def round_tokens(x: Tensor) -> Tensor:
    """x moved to the nearest levels of its tokens' grids, in x's dtype. Gradients pass as if it were not."""
    codes, step = token_codes(x)
    rounded = (codes * step).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


@dataclass(frozen=True)
class LogGrid:
    """Levels scale · √2^(-k) and 0, for numbers that are not negative."""

    scale: Tensor  # []
    bits: int

    def quantize(self, x: Tensor) -> Tensor:
        """k of every element, in x's dtype; 2^bits stands for 0. What exceeds the scale has k = 0."""
        return torch.round(-2 * torch.log2(x / self.scale)).clamp(0, 2**self.bits)

    def dequantize(self, codes: Tensor) -> Tensor:
        half = torch.ceil(codes / 2)  # a shift, and √2 for odd codes
        value = self.scale * torch.exp2(-half) * (1 + (2**0.5 - 1) * (codes % 2))
        return torch.where(codes < 2**self.bits, value, torch.zeros_like(value))

    def round(self, x: Tensor) -> Tensor:
        return self.dequantize(self.quantize(x))


def fit_uniform(x: Tensor, bits: int, *, channel: int | None = None) -> Grid:
    """The uniform grid of x, or one for each index of the axis `channel`; scale and zero broadcast against x.

    A channel that is constant gets a grid that holds its value exactly.
    """
    x = at_least_float32(x.detach())
    rows = x.reshape(1, -1) if channel is None else x.movedim(channel, 0).flatten(1)  # [channels, elements]
    best = torch.full_like(rows[:, :1], float("inf"))
    scale, zero = torch.zeros_like(best), torch.zeros_like(best)
    whole = torch.stack(rows.aminmax(dim=1), 1)
    for n, ends in enumerate((*tail_quantiles(rows).unbind(1), whole)):
        grid = grid_of_range(ends[:, :1], ends[:, 1:], bits)
        error = (grid.round(rows) - rows).square().mean(1, keepdim=True)
        # A range of one point has step 0, so its error is NaN and never the smallest. The whole range is taken only for rows
        # where all ranges of quantiles are one point.
        better = error < (best if n < len(QUANTILES) else torch.where(torch.isinf(best), best, 0))
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, grid.scale, scale), torch.where(better, grid.zero, zero)
    constant = torch.isinf(best)
    if bool(constant.any()):
        scale, zero = _with_constant_rows(rows[:, :1], constant, scale, zero)
    if channel is None:
        return Grid(scale[0, 0], zero[0, 0], bits)
    shape = [1] * x.dim()
    shape[channel] = -1
    return Grid(scale.view(shape), zero.view(shape), bits)


def fit_logarithmic(x: Tensor, bits: int) -> LogGrid:
    """The logarithmic grid of x, which is not negative anywhere."""
    x = at_least_float32(x.detach())
    rows = x.reshape(1, -1)
    best, scale = torch.full_like(rows[0, 0], float("inf")), rows.amax()
    for high in tail_quantiles(rows)[0, :, 1]:
        grid = LogGrid(high, bits)
        error = (grid.round(x) - x).square().mean()
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, grid.scale, scale)
    return LogGrid(scale, bits)


def grid_of_range(low: Tensor, high: Tensor, bits: int) -> Grid:
    """The uniform grid of 2^bits levels from low to high, moved so that 0 is a level (or would be, where it lies outside)."""
    scale = (high - low) / (2**bits - 1)
    return Grid(scale, torch.round(-low / scale), bits)


def tail_quantiles(rows: Tensor) -> Tensor:
    """For each p of QUANTILES the (1 - p)- and the p-quantile of each row, [rows, 3, 2], interpolated linearly.

    Only the tails are sorted. Published numbers depend on how the place between two neighbours is computed: in the precision of
    the rows up to 2^24 elements, as torch.quantile does, and in double precision above, as numpy.percentile does.
    """
    last = rows.shape[1] - 1
    precision = rows.dtype if rows.shape[1] <= 2**24 else torch.float64
    tail = min(last + 1, int((1 - QUANTILES[0]) * last) + 3)
    smallest, largest = rows.topk(tail, largest=False).values, rows.topk(tail).values
    found = []
    for p in QUANTILES:
        for q, ordered, step in ((1 - p, smallest, 1), (p, largest, -1)):
            place = torch.tensor(q, dtype=precision) * last
            below = int(place)
            first, second = (n if step == 1 else last - n for n in (below, min(below + 1, last)))
            weight = (place - below).to(rows.dtype).to(rows.device)
            found.append(torch.lerp(ordered[:, first], ordered[:, second], weight))
    return torch.stack(found, 1).view(-1, len(QUANTILES), 2)


def _with_constant_rows(value: Tensor, constant: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Grids of rows that hold one `value` each: of the steps with that value as a level, the nearest to the other rows' mean."""
    usual = scale[~constant].mean() if bool((~constant).any()) else torch.ones_like(scale[0, 0])
    steps = torch.round(value.abs() / usual).clamp(min=1)
    own = torch.where(value == 0, usual, value.abs() / steps)
    return torch.where(constant, own, scale), torch.where(constant, -steps * value.sign(), zero)
