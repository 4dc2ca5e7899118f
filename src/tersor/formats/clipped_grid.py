"""Grids whose range is that of the numbers themselves, after they were clipped: no statistics, no calibration.

The quantizers of TernaryBERT and of Teacher Intervention (arXiv 2302.11812). All first limit x to [-c, c]; c = 0 here
stands for no limit. With the statistics over the axes `over` (all, where None):

    ternary      t = 0.7 mean|x|, a = mean of |x| over |x| > t; a sign(x) where |x| > t, else 0
    symmetric    s = (2^(b-1) - 1) / max|x|; round(x s) / s
    asymmetric   d = max - min + 1e-8; round((x - min) / d (2^b - 1)) / (2^b - 1) d + min

The gradient goes straight through, and is 0 where |x| >= c. Two cases differ from the published code, which divides by zero
there: numbers that are all 0 stay 0, and so do numbers of one magnitude where no |x| exceeds t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Weights = int | Literal["ternary"]
THRESHOLD = 0.7  # of the mean magnitude, above which a ternary weight is not 0


@dataclass(frozen=True)
class Codes:
    """Numbers low + step · codes."""

    codes: Tensor  # uint8, of the numbers' shape
    step: Tensor  # broadcasts against it, as does `low`
    low: Tensor

    def dequantize(self) -> Tensor:
        return self.codes.to(self.step.dtype) * self.step + self.low


def bits_of(weights: Weights) -> int:
    """Bits that a code takes."""
    return 2 if weights == "ternary" else int(weights)


def codes_of(x: Tensor, weights: Weights, clip: float, over: tuple[int, ...] | None = None) -> Codes:
    """x on the ternary grid, or on the asymmetric one of so many bits."""
    x = limited(x.detach(), clip)
    axes = tuple(range(x.dim())) if over is None else over
    if weights == "ternary":
        size = x.abs()
        large = size > THRESHOLD * size.mean(axes, keepdim=True)
        step = (size * large).sum(axes, keepdim=True) / large.sum(axes, keepdim=True).clamp(min=1)
        return Codes((1 + x.sign() * large).to(torch.uint8), step, -step)
    low = x.amin(axes, keepdim=True)
    span, levels = x.amax(axes, keepdim=True) - low + 1e-8, 2**weights - 1
    return Codes(torch.round((x - low) / span * levels).clamp(0, levels).to(torch.uint8), span / levels, low)


def symmetric(x: Tensor, bits: int, clip: float, over: tuple[int, ...] | None = None) -> Tensor:
    """x rounded on the symmetric grid, in x's dtype and without a gradient."""
    x = limited(x.detach(), clip)
    axes = tuple(range(x.dim())) if over is None else over
    largest = x.abs().amax(axes, keepdim=True) if x.numel() else x
    s = (2 ** (bits - 1) - 1) / torch.where(largest > 0, largest, 1)
    return torch.round(x * s).div(s)


def limited(x: Tensor, clip: float) -> Tensor:
    return x.clamp(-clip, clip) if clip else x


def inside(x: Tensor, clip: float) -> Tensor:
    """x, with a gradient only where it is not limited."""
    return torch.where(x.abs() < clip, x, x.detach()) if clip else x
