"""TanQ, the grid for softmax outputs that is finest near 1 (DopQ-ViT, arXiv 2408.03291).

With 0 < k < π/2 and the largest value A, numbers are rounded to equal steps s of tan(k a), s = tan(k A) / (2^b - 1):

    q = clamp(round(tan(k a) / s), 0, 2^b - 1),    a = arctan(q s) / k.

As k goes to 0 this is the uniform grid with zero point 0. As k goes to π/2, all levels but 0 move to A. The paper's code is not
public; this form of its quantizer is our reading of the paper.

There are only 2^b levels, so a grid is a table of them and of the 2^b - 1 thresholds between codes, arctan((q + 1/2) s) / k. A
threshold is not the midpoint of its two levels. Both are computed once, in float64; afterwards no tan or arctan is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.formats.activation_grid import at_least_float32, tail_quantiles

LARGEST_K = math.pi / 2 - 1e-3
FOCUSES = tuple(LARGEST_K * n / 16 for n in range(1, 17))  # the values of k that are tried


@dataclass(frozen=True)
class TangentGrid:
    """Levels in a table."""

    table: Tensor  # [2^bits], rising
    thresholds: Tensor  # [2^bits - 1]; a number above q of them has code q

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of x, int64. What exceeds the largest level has its code."""
        return torch.bucketize(x, self.thresholds)

    def dequantize(self, codes: Tensor) -> Tensor:
        return self.table[codes]

    def round(self, x: Tensor) -> Tensor:
        return self.dequantize(self.quantize(x))


def tangent_grid(largest: Tensor, k: float, bits: int) -> TangentGrid:
    """The grid of [0, largest] with the focus k; in the dtype of `largest`, []."""
    A = largest.double()
    s = torch.tan(k * A) / (2**bits - 1)
    codes = torch.arange(2**bits, dtype=torch.float64, device=largest.device)
    table, thresholds = torch.atan(codes * s) / k, torch.atan((codes[:-1] + 0.5) * s) / k
    return TangentGrid(table.to(largest.dtype), thresholds.to(largest.dtype))


def fit_tangent(x: Tensor, bits: int, error: Callable[[Tensor], Tensor] | None = None) -> TangentGrid:
    """The grid of x in [0, 1] with the least error among the upper quantiles of RepQ-ViT for A and FOCUSES for k.

    error: of the rounded x, as one number; by default the mean squared difference to x.
    """
    x = at_least_float32(x.detach())
    measure = error or (lambda rounded: (rounded - x).square().mean())
    least, best = math.inf, None
    for largest in (*tail_quantiles(x.reshape(1, -1))[0, :, 1].unbind(), x.amax()):
        largest = largest.clamp(torch.finfo(x.dtype).tiny, 1)
        for k in FOCUSES:
            grid = tangent_grid(largest, k, bits)
            found = float(measure(grid.round(x)))
            if best is None or found < least:
                least, best = found, grid
    assert best is not None
    return best
