"""A module that rounds both operands of a product of activations, each to a grid that is fitted to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tersor.formats.activation_grid import at_least_float32
from tersor.formats.clipped_grid import inside, symmetric
from tersor.layers.exchange import exchangeable
from tersor.layers.products import Products
from tersor.layers.straight_through import straight_through


@exchangeable
class DynamicProducts(nn.Module):
    """Runs `inner`, an attention or a mere a @ b, with both operands of each product rounded to symmetric grids of `bits` bits.

    The gradient goes straight through the rounding. clip: what the operands are limited to; 0: nothing.
    """

    def __init__(self, inner: nn.Module, *, bits: int, clip: float) -> None:
        super().__init__()
        self.inner, self.bits, self.clip = inner, bits, clip

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> nn.Module:
        return cls(original, **described)

    def describe(self) -> dict[str, Any]:
        return {"bits": self.bits, "clip": self.clip}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def rounded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return rounded_through(a, self.bits, self.clip), rounded_through(b, self.bits, self.clip)

        with Products(rounded):
            return self.inner(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, clip={self.clip}"


def rounded_through(x: Tensor, bits: int, clip: float) -> Tensor:
    """x on its symmetric grid. The gradient passes where x is not clipped."""
    rounded = symmetric(at_least_float32(x), bits, clip).to(x.dtype)
    return straight_through(rounded, inside(x, clip)) if x.requires_grad else rounded
