"""Straight-through estimators: the value of one tensor, the gradient of another (Bengio et al., arXiv 1308.3432)."""

from __future__ import annotations

from torch import Tensor


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard`, the gradient of `soft`."""
    return hard.detach() + (soft - soft.detach())  # in this order the sum is `hard` to the bit


def round_through(x: Tensor) -> Tensor:
    """round(x), half to even, with the gradient of x."""
    return straight_through(x.round(), x)
