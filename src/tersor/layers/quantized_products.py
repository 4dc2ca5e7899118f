"""A module whose products of two activations are computed on grids of integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.formats.activation_grid import LogGrid, at_least_float32
from tersor.formats.grid import Grid
from tersor.layers.exchange import exchangeable
from tersor.layers.products import Products


@exchangeable
class QuantizedProducts(nn.Module):
    """Runs `inner`, an attention or a mere a @ b, with both operands of each product rounded to their grids.

    logarithmic: for each product in the order of computing, whether its first and its second operand have the grid for softmax
    outputs; the others' is uniform. scales, zeros: [products, 2]; a logarithmic grid has no zero.
    """

    scales: Tensor
    zeros: Tensor

    def __init__(
        self,
        inner: nn.Module,
        *,
        bits: int,
        logarithmic: Sequence[Sequence[bool]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.inner = inner
        self.bits, self.logarithmic = bits, [list(map(bool, each)) for each in logarithmic]
        for name in ("scales", "zeros"):
            self.register_buffer(name, torch.ones(len(self.logarithmic), 2, dtype=dtype, device=device))

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> nn.Module:
        like = next(original.parameters(), torch.empty(0, device="meta"))
        exact = torch.promote_types(like.dtype, torch.float32)
        return cls(original, **described, dtype=exact, device=like.device)

    def describe(self) -> dict[str, Any]:
        return {"bits": self.bits, "logarithmic": self.logarithmic}

    def grid(self, product: int, operand: int) -> Grid | LogGrid:
        scale = self.scales[product, operand]
        if self.logarithmic[product][operand]:
            return LogGrid(scale, self.bits)
        return Grid(scale, self.zeros[product, operand], self.bits)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        count = 0

        def rounded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal count
            if count == len(self.logarithmic):
                raise TersorError(
                    f"{type(self.inner).__name__} computes more than the {count} products that it was calibrated with"
                )
            grids = self.grid(count, 0), self.grid(count, 1)
            count += 1
            return tuple(g.round(at_least_float32(x)).to(x.dtype) for g, x in zip(grids, (a, b), strict=True))  # type: ignore[return-value]

        with Products(rounded):
            return self.inner(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, logarithmic={self.logarithmic}"
