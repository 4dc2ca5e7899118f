"""Stochastic depth (arXiv 1603.09382): in training, a sample skips a residual branch with probability `rate`."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)  # keeps the expectation of eval mode

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def linear_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates that grow linearly from 0 at the first block to `rate` at the last, by stage."""
    last, first_of, rates = max(sum(depths) - 1, 1), 0, []
    for depth in depths:
        rates.append([rate * (first_of + i) / last for i in range(depth)])
        first_of += depth
    return rates
