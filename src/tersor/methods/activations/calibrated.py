"""Layers while their grids are fitted. Each grid is fitted when the first batch reaches it, to the outputs of earlier layers.

A `CalibratedMap` or `CalibratedProducts` wraps a module of the model. With `enabled` off it computes what the module did before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tersor.formats.activation_grid import LogGrid, at_least_float32, fit_logarithmic, fit_uniform
from tersor.formats.grid import Grid
from tersor.layers.linear_map import call_with_matrix, input_matrix, weight_matrix
from tersor.layers.products import Products
from tersor.layers.quantized_map import QuantizedMap
from tersor.layers.quantized_products import OperandGrid, QuantizedProducts
from tersor.layers.straight_through import straight_through
from tersor.methods.weights.gptq_solver import solve_gptq

Fit = Callable[[Tensor], Grid]  # from an input to its grid
FitPair = Callable[[Tensor, Tensor], tuple[OperandGrid, OperandGrid]]  # from a product's operands to their grids


def rounded_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The values of `rounded`; the gradient passes to x as if nothing were rounded."""
    return straight_through(rounded, x) if x.requires_grad else rounded


def each_operand(fit: Callable[[Tensor], OperandGrid]) -> FitPair:
    """Fits the grids of two operands independently."""
    return lambda a, b: (fit(a), fit(b))


class InputGrid:
    """The grid of one input; the layers that read the same LayerNorm share it."""

    def __init__(self, bits: int, fit: Fit) -> None:
        self.bits, self.fit = bits, fit
        self.found: Grid | None = None

    def round(self, x: Tensor) -> Tensor:
        if self.found is None:
            with (
                torch._C.DisableTorchFunction()
            ):  # so that a `Products` around this layer does not see the products of fitting
                self.found = self.fit(x)
        return rounded_through(x, self.found.round(at_least_float32(x)).to(x.dtype))


class CalibratedMap(nn.Module):
    """A linear map on rounded inputs and weights. After a call it has `codes` [out, in] and `grid`, scale and zero [out, 1]."""

    def __init__(self, original: nn.Module, w_bits: int, input: InputGrid) -> None:
        super().__init__()
        self.original, self.w_bits, self.input = original, w_bits, input
        self.enabled, self.reconstruct, self.measure = True, False, False
        self.learned: Tensor | None = None  # the weight [out, in] to round, while it learns
        self.codes: Tensor | None = None
        self.grid: Grid | None = None
        self.error = 0.0  # ‖Q x̂ - W x‖² / ‖W x‖², with x from the quantized layers before

    @property
    def weight(self) -> Tensor:
        return self.original.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.original(x)  # type: ignore[no-any-return]
        rounded = self.input.round(x)
        if self.codes is None:
            with torch._C.DisableTorchFunction():
                self._fit_weight(rounded)
        assert self.codes is not None
        assert self.grid is not None
        if self.learned is None:
            matrix = self.grid.dequantize(self.codes.to(self.grid.scale.dtype)).to(x.dtype)
        else:
            matrix = rounded_through(self.learned, self.grid.round(self.learned)).to(x.dtype)
        y = call_with_matrix(self.original, rounded, matrix)
        if self.measure:
            wanted = call_with_matrix(self.original, x, weight_matrix(self.original))
            self.error = float((y - wanted).square().sum() / wanted.square().sum())
        return y

    def _fit_weight(self, rounded: Tensor) -> None:
        W = at_least_float32(weight_matrix(self.original).detach())
        self.grid = fit_uniform(W, self.w_bits, channel=0)
        if self.reconstruct:
            X, _ = input_matrix(self.original, at_least_float32(rounded))
            self.codes = reconstructed_codes(W, X.t() @ X, self.grid)
        else:
            self.codes = self.grid.quantize(W).to(torch.uint8)

    def freeze(self) -> QuantizedMap:
        """The layer as it is stored."""
        assert self.codes is not None
        assert self.grid is not None
        assert self.input.found is not None
        bias = self.original.bias
        assert bias is None or isinstance(bias, Tensor)
        frozen = QuantizedMap(self.original, w_bits=self.w_bits, a_bits=self.input.bits, bias=bias is not None)
        frozen.fill(self.codes, self.grid, self.input.found, bias)
        return frozen


class CalibratedProducts(nn.Module):
    """A module whose products of activations have rounded operands. grids: for each product, those of both operands."""

    def __init__(self, inner: nn.Module, bits: int, fit: FitPair) -> None:
        super().__init__()
        self.inner, self.bits, self.fit = inner, bits, fit
        self.enabled, self.measure = True, False
        self.grids: list[tuple[OperandGrid, OperandGrid]] = []
        self.error = 0.0  # of the operand that changed most, ‖x̂ - x‖² / ‖x‖²

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.inner(*args, **kwargs)
        count = 0

        def rounded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal count
            if count == len(self.grids):
                self.grids.append(self.fit(a, b))
            grids = self.grids[count]
            count += 1
            first, second = (
                rounded_through(x, g.round(at_least_float32(x)).to(x.dtype)) for g, x in zip(grids, (a, b), strict=True)
            )
            if self.measure:
                changed = ((first - a, a), (second - b, b))
                self.error = max(self.error, *(float(d.square().sum() / x.square().sum()) for d, x in changed))
            return first, second

        with Products(rounded):
            return self.inner(*args, **kwargs)

    def freeze(self) -> QuantizedProducts:
        """The module as it is stored."""
        return QuantizedProducts.of_grids(self.inner, self.bits, self.grids)


def reconstructed_codes(W: Tensor, H: Tensor, grid: Grid) -> Tensor:
    """Codes on `grid` for W [out, in]: for every row d of W - Q, the output error dᵀ H d is at most that of rounding.

    They are GPTQ's solution (columns in the order of falling diagonal), or rounding for the rows where that is better.
    H: Σ x xᵀ [in, in].
    """
    assert isinstance(grid.bits, int)
    nearest = grid.quantize(W)
    solved = solve_gptq(W, H, bits=grid.bits, grid=grid, desc_act=True).codes.to(W.dtype)

    def error(codes: Tensor) -> Tensor:
        d = W - grid.dequantize(codes)
        return ((d @ H) * d).sum(1, keepdim=True)

    return torch.where(error(solved) < error(nearest), solved, nearest).to(torch.uint8)


def fit_operand(x: Tensor, *, bits: int) -> Grid | LogGrid:
    """A logarithmic grid for the output of a softmax, a uniform one for other operands."""
    return fit_logarithmic(x, bits) if is_softmax(x) else fit_uniform(x, bits)


def is_softmax(x: Tensor) -> bool:
    """Whether x looks like a softmax over its last axis: nothing negative, and sums of one."""
    x = at_least_float32(x)
    return bool((x >= 0).all()) and torch.allclose(x.sum(-1), torch.ones_like(x[..., 0]), atol=1e-2)
