"""A linear map whose input and weight are both on grids of integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.formats.activation_grid import at_least_float32
from tersor.formats.grid import Grid
from tersor.formats.packing import pack, packed_size, unpack
from tersor.formats.twin_grid import GeluGrid
from tersor.layers.exchange import exchangeable
from tersor.layers.linear_map import matrix_shape


@exchangeable
class QuantizedMap(nn.Module):
    """In place of nn.Linear, transformers' Conv1D or nn.Conv2d: y = W x + bias, with x rounded to its grid.

    It computes in floating point with numbers on those grids. This shows what integers would give, takes half the memory or
    less, and is not faster than the original.

    qweight: int32 [packed_size(in, w_bits), out], the codes of W seen as a matrix [out, in], packed along the input.
    scales, zeros: floating [out], W = scales · (codes - zeros). input_scale, input_zero: floating [], of the one grid of x with
    2^a_bits levels. Zero points are in floating point: neither has to be a code, and input_zero need not be a whole number.

    input_grids: the number of grids of x where each channel has its own, s_i and z_i in input_scale and input_zero [channels]
    (1: one grid for all). The codes are then those of W_oi s_i / s̃ with s̃ = mean(s), and y = s̃ · Σ_i (that weight) (q_i -
    z_i): integers of one weight grid an output, as without. gelu: x has PTQ4ViT's grid for GELU outputs.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    input_scale: Tensor
    input_zero: Tensor
    like: Tensor  # empty; the dtype of `weight`, which follows the module's casts

    def __init__(
        self, original: nn.Module, *, w_bits: int, a_bits: int, bias: bool, input_grids: int = 1, gelu: bool = False
    ) -> None:
        super().__init__()
        dense = original.weight
        assert isinstance(dense, Tensor)
        self.w_bits, self.a_bits, self.input_grids, self.gelu = w_bits, a_bits, input_grids, gelu
        self.out_features, self.in_features = matrix_shape(original)
        self.packed_parameters = self.out_features * self.in_features
        words, exact = packed_size(self.in_features, w_bits), torch.promote_types(dense.dtype, torch.float32)
        self.register_buffer("qweight", torch.zeros(words, self.out_features, dtype=torch.int32, device=dense.device))
        for name in ("scales", "zeros"):
            self.register_buffer(name, torch.ones(self.out_features, dtype=exact, device=dense.device))
        for name in ("input_scale", "input_zero"):
            shape = () if input_grids == 1 else (input_grids,)
            self.register_buffer(name, torch.ones(shape, dtype=exact, device=dense.device))
        self.register_buffer("like", torch.empty(0, dtype=dense.dtype, device="cpu"), persistent=False)
        empty = torch.zeros(self.out_features, dtype=dense.dtype, device=dense.device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None
        self.convolution: dict[str, Any] = {}
        if isinstance(original, nn.Conv2d):
            self.kernel = original.kernel_size
            self.convolution = {name: getattr(original, name) for name in ("stride", "padding", "dilation", "groups")}

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> nn.Module:
        return cls(original, **described)

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"w_bits": self.w_bits, "a_bits": self.a_bits, "bias": self.bias is not None}
        if self.input_grids != 1:
            described["input_grids"] = self.input_grids
        if self.gelu:
            described["gelu"] = True
        return described

    def fill(self, codes: Tensor, weight: Grid, input: Grid | GeluGrid, bias: Tensor | None) -> None:
        """codes [out, in] on the grids `weight`, scale and zero [out, 1]; the grid of x, scale and zero [] or [channels]."""
        self.qweight.copy_(pack(codes.t(), self.w_bits, dim=0))
        self.scales.copy_(weight.scale[:, 0])
        self.zeros.copy_(weight.zero[:, 0])
        self.input_scale.copy_(input.scale)  # a copy, because layers behind one LayerNorm get the same grid
        if isinstance(input, Grid):
            self.input_zero.copy_(input.zero)
        if self.bias is not None and bias is not None:
            self.bias.data.copy_(bias)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the original's shape; a new tensor at every access."""
        codes = unpack(self.qweight, self.w_bits, self.in_features, dim=0).t().to(self.scales.dtype)
        matrix = self.scales[:, None] * (codes - self.zeros[:, None])
        matrix = self._in_shape(matrix)
        if self.input_grids != 1:
            matrix = matrix / channel_shares(self.input_scale, matrix, self.convolution.get("groups"))
        return matrix.to(self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_grids == 1:
            grid = Grid(self.input_scale, self.input_zero, self.a_bits)
            rounded = (GeluGrid(self.input_scale, self.a_bits) if self.gelu else grid).round(at_least_float32(x))
            weight = self.weight
        else:
            rounded = round_channels(at_least_float32(x), self._channel_grid(), image=bool(self.convolution))
            codes = unpack(self.qweight, self.w_bits, self.in_features, dim=0).t().to(self.scales.dtype)
            weight = self._in_shape(self.scales[:, None] * (codes - self.zeros[:, None]))
        x, weight = rounded.to(x.dtype), weight.to(x.dtype)
        if self.convolution:
            return nn.functional.conv2d(x, weight, self.bias, **self.convolution)
        return nn.functional.linear(x, weight, self.bias)

    def _channel_grid(self) -> Grid:
        return Grid(self.input_scale, self.input_zero, self.a_bits)

    def _in_shape(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.out_features, -1, *self.kernel) if self.convolution else matrix

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, w_bits={self.w_bits}, a_bits={self.a_bits}"


def round_channels(x: Tensor, grid: Grid, *, image: bool) -> Tensor:
    """s̃ (q_i - z_i): x on its channels' grids, scale and zero [channels], every channel divided by its share s_i / s̃.

    image: whether channels are the second axis, [b, channels, h, w], or the last one.
    """
    scale, zero = ((v.view(-1, 1, 1) if image else v) for v in (grid.scale, grid.zero))
    codes = Grid(scale, zero, grid.bits).quantize(x)
    return grid.scale.mean() * (codes - zero)


def channel_shares(scale: Tensor, weight: Tensor, groups: int | None) -> Tensor:
    """s_i / s̃ of the channel that each weight multiplies, broadcasting against it.

    scale: [channels]; weight [out, in], or a convolution's [out, in / groups, h, w].
    """
    share = scale / scale.mean()
    if groups is None:
        return share
    out, own = weight.shape[:2]
    return share.view(groups, 1, own).expand(groups, out // groups, own).reshape(out, own, 1, 1)
