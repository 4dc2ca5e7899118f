"""Grids with two ranges, for the outputs of GELU and softmax: PTQ4ViT's twin uniform quantization.

Yuan et al., ECCV 2022, arXiv 2111.12293. With Q = 2^(bits - 1), one bit of a code says in which of two ranges the other bits
count.

GELU outputs reach far above 0, but only to -0.17 below it. x >= 0 has Q levels with the step `scale`; x < 0 has Q + 1 levels
between that minimum and 0.

Softmax outputs are many small numbers and few large ones. As published, the value is the sum of two parts: x clipped to
[split, 1] on Q levels in [0, 1], and x clipped to [0, split] on Q levels in [0, split]. So the first part is 0 for a small x
only where split < 1 / (2 (Q - 1)); a larger split moves all values up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GELU_MINIMUM = 0.16997124254703522  # of -gelu(x)


@dataclass(frozen=True)
class GeluGrid:
    """scale: [], the step above 0."""

    scale: Tensor
    bits: int

    def round(self, x: Tensor) -> Tensor:
        half: int = 2 ** (self.bits - 1)
        step = GELU_MINIMUM / half
        above = torch.round(x / self.scale).clamp(0, half - 1) * self.scale
        below: Tensor = torch.round(x / step).clamp(-half, 0) * step
        return above + below


@dataclass(frozen=True)
class SplitGrid:
    """scale: [], the split: a power of two, at most 1."""

    scale: Tensor
    bits: int

    def round(self, x: Tensor) -> Tensor:
        largest: int = 2 ** (self.bits - 1) - 1
        high = torch.round(torch.maximum(x, self.scale).clamp(max=1) * largest) / largest
        step = self.scale / largest
        low: Tensor = torch.round(torch.minimum(x, self.scale).clamp(min=0) / step).clamp(0, largest) * step
        return high + low
