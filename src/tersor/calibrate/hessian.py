"""Second-order statistics of a linear map's inputs: H = 2/N · Σ x xᵀ over all tokens of N samples (GPTQ, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Hessian:
    """Running mean over samples; the same whatever the batch sizes. `matrix` is [columns, columns]."""

    def __init__(self, columns: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.matrix = torch.zeros(columns, columns, device=device, dtype=dtype)
        self.samples = 0
        self.tokens = 0

    def add(self, x: Tensor, samples: int) -> None:
        """Take in inputs x [tokens, columns] that belong to `samples` samples."""
        self.tokens += x.shape[0]
        self.samples += samples
        x = x.to(self.matrix.dtype)
        self.matrix.addmm_(x.t(), x, beta=(self.samples - samples) / self.samples, alpha=2 / self.samples)

    def sum(self) -> Tensor:
        """Σ x xᵀ over all tokens."""
        return self.matrix * (self.samples / 2)


def shrink_towards_mean(hessians: Mapping[str, Hessian]) -> dict[str, Tensor]:
    """Hessians per token, each moved towards the mean of all: what experts that saw few tokens are solved with.

    The mean counts as much as `columns` tokens would: H = (S + columns · M) / (tokens + columns), with S an expert's own sum of
    x xᵀ and M the mean over all tokens of all experts of the layer.
    """
    tokens = sum(each.tokens for each in hessians.values())
    mean = sum(each.sum() for each in hessians.values()) / max(tokens, 1)
    return {
        name: 2 * (each.sum() + each.matrix.shape[0] * mean) / (each.tokens + each.matrix.shape[0])
        for name, each in hessians.items()
    }
