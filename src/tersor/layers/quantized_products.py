"""A module that rounds both operands of a product of activations to grids of integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.formats.activation_grid import LogGrid, at_least_float32
from tersor.formats.grid import Grid
from tersor.formats.tangent_grid import TangentGrid
from tersor.formats.twin_grid import SplitGrid
from tersor.layers.exchange import exchangeable
from tersor.layers.products import Products

OperandGrid = Grid | LogGrid | SplitGrid | TangentGrid
KINDS: dict[type, str] = {Grid: "uniform", LogGrid: "logarithmic", SplitGrid: "split", TangentGrid: "tangent"}


@exchangeable
class QuantizedProducts(nn.Module):
    """Runs `inner`, an attention or a mere a @ b, with both operands of each product rounded to their grids.

    kinds: for each product in the order of computing, the kinds of grid of its first and its second operand, as in KINDS.
    scales, zeros: [products, 2], or [products, 2, heads] where every head (the second of four axes) has a grid of its own; only
    a uniform grid has a zero, and a tangent one no scale either. tables, thresholds: of the tangent grids in their order,
    [grids, 2^bits] and [grids, 2^bits - 1].
    """

    scales: Tensor
    zeros: Tensor
    tables: Tensor
    thresholds: Tensor

    def __init__(
        self,
        inner: nn.Module,
        *,
        bits: int,
        kinds: Sequence[Sequence[str]],
        heads: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.inner = inner
        self.bits, self.kinds, self.heads = bits, [list(map(str, each)) for each in kinds], heads
        unknown = {kind for pair in self.kinds for kind in pair} - set(KINDS.values())
        if unknown:
            raise TersorError(
                f"a product's grid of the kind {min(unknown)!r} is unknown; known: {', '.join(KINDS.values())}"
            )
        for name in ("scales", "zeros"):
            shape = (len(self.kinds), 2) if heads == 1 else (len(self.kinds), 2, heads)
            self.register_buffer(name, torch.ones(shape, dtype=dtype, device=device))
        tangents = sum(kind == "tangent" for pair in self.kinds for kind in pair)
        if tangents:
            self.register_buffer("tables", torch.ones(tangents, 2**bits, dtype=dtype, device=device))
            self.register_buffer("thresholds", torch.ones(tangents, 2**bits - 1, dtype=dtype, device=device))

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> nn.Module:
        like = next(original.parameters(), torch.empty(0, device="meta"))
        exact = torch.promote_types(like.dtype, torch.float32)
        flags = described.pop("logarithmic", None)  # the form of models saved before there were other kinds
        if flags is not None:
            described["kinds"] = [["logarithmic" if flag else "uniform" for flag in pair] for pair in flags]
        return cls(original, **described, dtype=exact, device=like.device)

    @classmethod
    def of_grids(
        cls, inner: nn.Module, bits: int, grids: Sequence[tuple[OperandGrid, OperandGrid]], *, heads: int = 1
    ) -> QuantizedProducts:
        """grids: of both operands of each product; their scale and zero are [] or [heads, 1, 1]."""
        kinds = [[KINDS[type(grid)] for grid in pair] for pair in grids]
        first = grids[0][0]
        like = first.table if isinstance(first, TangentGrid) else first.scale
        made = cls(inner, bits=bits, kinds=kinds, heads=heads, dtype=like.dtype, device=like.device)
        tangents = 0
        for n, pair in enumerate(grids):
            for m, grid in enumerate(pair):
                if isinstance(grid, TangentGrid):
                    made.tables[tangents], made.thresholds[tangents] = grid.table, grid.thresholds
                    tangents += 1
                    continue
                made.scales[n, m] = grid.scale.flatten() if heads > 1 else grid.scale
                if isinstance(grid, Grid):
                    made.zeros[n, m] = grid.zero.flatten() if heads > 1 else grid.zero
        return made

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"bits": self.bits, "kinds": self.kinds}
        return described if self.heads == 1 else described | {"heads": self.heads}

    def grid(self, product: int, operand: int) -> OperandGrid:
        kind = self.kinds[product][operand]
        if kind == "tangent":
            before = [kind for pair in self.kinds for kind in pair][: 2 * product + operand].count("tangent")
            return TangentGrid(self.tables[before], self.thresholds[before])
        scale, zero = self.scales[product, operand], self.zeros[product, operand]
        if self.heads > 1:
            scale, zero = scale.view(-1, 1, 1), zero.view(-1, 1, 1)
        if kind == "uniform":
            return Grid(scale, zero, self.bits)
        return LogGrid(scale, self.bits) if kind == "logarithmic" else SplitGrid(scale, self.bits)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        count = 0

        def rounded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal count
            if count == len(self.kinds):
                raise TersorError(
                    f"{type(self.inner).__name__} computes more than the {count} products that it was calibrated with"
                )
            grids = self.grid(count, 0), self.grid(count, 1)
            count += 1
            return tuple(g.round(at_least_float32(x)).to(x.dtype) for g, x in zip(grids, (a, b), strict=True))  # type: ignore[return-value]

        with Products(rounded):
            return self.inner(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, kinds={self.kinds}"
