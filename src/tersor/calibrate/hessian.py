"""Second-order statistics of a linear map's inputs: H = 2/N · Σ x xᵀ over all tokens of N samples (GPTQ, section 3).

Each sample's x xᵀ is computed in float32 and added up in float64. Numbers of 24 bits have room there to be added without
rounding, as long as none is 2²² times another, so that the sum does not depend on the order of the samples, nor on how many
processes they were shared out to. On a GPU, inputs of 16 bits are multiplied as they are, on tensor cores: their products are
exact in float32 all the same, in which up to 2048 of them are added up (benchmarks/gpu_quantize.py shows the difference).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tersor.kernels import gram


class Hessian:
    """The mean over samples. `total` is Σ x xᵀ so far, `matrix` is H; both are [columns, columns].

    deviation: Σ (x₀ - x) xᵀ, where x₀ are the inputs of the original model; None where they are not compared.
    """

    def __init__(self, columns: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._total = torch.zeros(columns, columns, device=device, dtype=torch.float64)
        self._half = False  # whether what lies above the diagonal is out of date
        self.deviation: Tensor | None = None
        self.dtype = dtype  # of the products, and of H
        self.samples = 0
        self.tokens = 0
        self.weight = 0.0  # of all tokens together

    def add(self, x: Tensor, samples: int, weights: Tensor | None = None) -> None:
        """Take in inputs x [tokens, columns] that belong to `samples` samples; weights [tokens]: how much each counts."""
        self.samples += samples
        if weights is None:
            self.tokens += x.shape[0]
            self.weight += x.shape[0]
            if self.dtype == torch.float32 and gram.has_kernel(x):
                gram.add_gram(self._total, x)
                self._half = True
                return
            x = x.to(self.dtype)
        else:
            x = x.to(self.dtype)
            weights = weights.to(self.dtype)
            self.tokens += int(weights.count_nonzero())
            self.weight += float(weights.double().sum())
            x = x * weights.sqrt()[:, None]
        self.total += x.t() @ x

    def compare(self, original: Tensor, x: Tensor) -> None:
        """Take in by how much the original's inputs [tokens, columns] differ from x, which `add` took in."""
        if self.deviation is None:
            self.deviation = torch.zeros_like(self._total)
        x = x.to(self.dtype)
        self.deviation += (original.to(self.dtype) - x).t() @ x

    @property
    def total(self) -> Tensor:
        if self._half:
            gram.mirror(self._total)
            self._half = False
        return self._total

    @total.setter
    def total(self, value: Tensor) -> None:
        self._total, self._half = value, False

    @property
    def matrix(self) -> Tensor:
        return self._mean(self.total)

    @property
    def mean_deviation(self) -> Tensor | None:
        """The deviation on the scale of H."""
        return None if self.deviation is None else self._mean(self.deviation)

    def _mean(self, total: Tensor) -> Tensor:
        found = torch.empty(total.shape, dtype=self.dtype, device=total.device)
        return torch.mul(total, 2 / max(self.samples, 1), out=found)


def shrink_towards_mean(hessians: Mapping[str, Hessian], mean: Tensor | None = None) -> dict[str, Tensor]:
    """Hessians per token, each moved towards the mean of all: what experts that saw few tokens are solved with.

    The mean counts as much as `columns` tokens would: H = (S + columns · M) / (tokens + columns), with S an expert's own sum of
    x xᵀ and M the mean over all tokens of all experts of the layer: `mean` where these are only some of them. Tokens that
    count in part do so here too.
    """
    if mean is None:
        weight = sum(each.weight for each in hessians.values())
        mean = sum((each.total for each in hessians.values()), torch.zeros(())) / (weight or 1)
    return {
        name: (2 * (each.total + len(each.total) * mean) / (each.weight + len(each.total))).to(each.dtype)
        for name, each in hessians.items()
    }
