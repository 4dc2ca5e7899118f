"""Second-order statistics of a linear map's inputs: H = 2/N · Σ x xᵀ over all tokens of N samples (GPTQ, section 3)."""

from __future__ import annotations

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
