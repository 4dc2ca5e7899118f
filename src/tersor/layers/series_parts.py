"""What forecasters are built of: instance normalization that is undone at the end, and trend plus remainder.

norm = InstanceScale.of(x); z = norm.apply(x); forecast = norm.undo(model(z))       x (B, L, N)
seasonal, trend = decompose(x, kernel=25)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class InstanceScale:
    """Mean and standard deviation over time, per sample and variate: (B, 1, N) each."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, x: Tensor, *, eps: float = 1e-5, through_std: bool = True) -> InstanceScale:
        """Of x (B, L, N). The gradient is stopped through the mean; through the std too unless `through_std`."""
        mean = x.mean(1, keepdim=True).detach()
        std = (x.var(1, keepdim=True, correction=0) + eps).sqrt()
        return cls(mean, std if through_std else std.detach())

    def apply(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def undo(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


def decompose(x: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """(x - trend, trend) of x (B, L, N): the trend is a moving average of odd width `kernel` whose ends repeat the first
    and the last value (Autoformer, arXiv 2106.13008, eq. 1)."""
    half = (kernel - 1) // 2
    padded = torch.cat((x[:, :1].expand(-1, half, -1), x, x[:, -1:].expand(-1, half, -1)), 1)
    trend = F.avg_pool1d(padded.transpose(1, 2), kernel, stride=1).transpose(1, 2)
    return x - trend, trend
