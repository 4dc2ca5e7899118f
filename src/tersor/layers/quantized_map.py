"""A linear map whose input and weight are both on grids of integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.formats.activation_grid import at_least_float32
from tersor.formats.grid import Grid
from tersor.formats.packing import pack, packed_size, unpack
from tersor.layers.exchange import exchangeable
from tersor.layers.linear_map import matrix_shape


@exchangeable
class QuantizedMap(nn.Module):
    """In place of nn.Linear, transformers' Conv1D or nn.Conv2d: y = W x + bias, with x rounded to its grid.

    The arithmetic is that of floating-point numbers on those grids: it shows what integers would compute, in half the memory
    or less, and is not faster than the original.

    qweight: int32 [packed_size(in, w_bits), out], the codes of W seen as a matrix [out, in], packed along the input.
    scales, zeros: floating [out], W = scales · (codes - zeros). input_scale, input_zero: floating [], of the one grid of x with
    2^a_bits levels. Zero points are in floating point, for neither has to be a code, and input_zero no whole number.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    input_scale: Tensor
    input_zero: Tensor
    like: Tensor  # empty; of the dtype in which `weight` is shown, which follows the module's casts

    def __init__(self, original: nn.Module, *, w_bits: int, a_bits: int, bias: bool) -> None:
        super().__init__()
        dense = original.weight
        assert isinstance(dense, Tensor)
        self.w_bits, self.a_bits = w_bits, a_bits
        self.out_features, self.in_features = matrix_shape(original)
        self.packed_parameters = self.out_features * self.in_features
        words, exact = packed_size(self.in_features, w_bits), torch.promote_types(dense.dtype, torch.float32)
        self.register_buffer("qweight", torch.zeros(words, self.out_features, dtype=torch.int32, device=dense.device))
        for name in ("scales", "zeros"):
            self.register_buffer(name, torch.ones(self.out_features, dtype=exact, device=dense.device))
        for name in ("input_scale", "input_zero"):
            self.register_buffer(name, torch.ones((), dtype=exact, device=dense.device))
        self.register_buffer("like", torch.empty(0, dtype=dense.dtype, device="cpu"), persistent=False)
        empty = torch.zeros(self.out_features, dtype=dense.dtype, device=dense.device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None
        self.convolution: dict[str, Any] = {}
        if isinstance(original, nn.Conv2d):
            self.kernel = original.kernel_size
            self.convolution = {name: getattr(original, name) for name in ("stride", "padding", "dilation")}

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> nn.Module:
        return cls(original, **described)

    def describe(self) -> dict[str, Any]:
        return {"w_bits": self.w_bits, "a_bits": self.a_bits, "bias": self.bias is not None}

    def fill(self, codes: Tensor, weight: Grid, input: Grid, bias: Tensor | None) -> None:
        """codes [out, in] on the grids `weight`, scale and zero [out, 1]; the grid of x, scale and zero []."""
        self.qweight.copy_(pack(codes.t(), self.w_bits, dim=0))
        for mine, given in (
            (self.scales, weight.scale[:, 0]),
            (self.zeros, weight.zero[:, 0]),
            (self.input_scale, input.scale),
            (self.input_zero, input.zero),  # copies, for layers that read the same LayerNorm are given the same grid
        ):
            mine.copy_(given)
        if self.bias is not None and bias is not None:
            self.bias.data.copy_(bias)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the original's shape; a new tensor at every access."""
        codes = unpack(self.qweight, self.w_bits, self.in_features, dim=0).t().to(self.scales.dtype)
        matrix = (self.scales[:, None] * (codes - self.zeros[:, None])).to(self.like.dtype)
        return matrix.view(self.out_features, -1, *self.kernel) if self.convolution else matrix

    def forward(self, x: Tensor) -> Tensor:
        grid = Grid(self.input_scale, self.input_zero, self.a_bits)
        x, weight = grid.round(at_least_float32(x)).to(x.dtype), self.weight.to(x.dtype)
        if self.convolution:
            return nn.functional.conv2d(x, weight, self.bias, **self.convolution)
        return nn.functional.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, w_bits={self.w_bits}, a_bits={self.a_bits}"
