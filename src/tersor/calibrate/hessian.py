"""Second-order statistics of a linear map's inputs: H = 2/N · Σ x xᵀ over all tokens of N samples (GPTQ, section 3).

Each sample's x xᵀ is computed in float32, and the samples are added up in float64. A float32 has 24 bits, so float64 adds them
without rounding as long as none is 2²² times another. The sum then depends neither on the order of the samples nor on how many
processes share them. On a GPU, inputs of 16 bits are multiplied as they are, on tensor cores. Their products are exact in
float32, and up to 2048 of them are added up in float32 (benchmarks/gpu_quantize.py shows the difference).
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
        self._half = False  # whether the part above the diagonal is out of date
        self.deviation: Tensor | None = None
        self.dtype = dtype  # of the products, and of H
        self.samples = 0
        self.tokens = 0
        self.weight = 0.0  # the sum of the tokens' weights

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
        """Add how much the original's inputs [tokens, columns] differ from x, which `add` has taken in."""
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
        """The deviation, scaled like H."""
        return None if self.deviation is None else self._mean(self.deviation)

    def _mean(self, total: Tensor) -> Tensor:
        found = torch.empty(total.shape, dtype=self.dtype, device=total.device)
        return torch.mul(total, 2 / max(self.samples, 1), out=found)


def shrink_towards_mean(hessians: Mapping[str, Hessian], mean: Tensor | None = None) -> dict[str, Tensor]:
    """Hessians per token, each moved towards the mean of all, so that experts that saw few tokens can be solved too.

    The mean counts as much as `columns` tokens: H = (S + columns · M) / (tokens + columns), where S is an expert's own sum of x
    xᵀ and M the mean over all tokens of all experts of the layer. mean: M, where `hessians` are only some of the experts. A
    token with a weight counts by it.
    """
    if mean is None:
        weight = sum(each.weight for each in hessians.values())
        mean = sum((each.total for each in hessians.values()), torch.zeros(())) / (weight or 1)
    return {
        name: (2 * (each.total + len(each.total) * mean) / (each.weight + len(each.total))).to(each.dtype)
        for name, each in hessians.items()
    }
