"""A linear map with packed weights. Its input is rounded to a grid that is fitted to this input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.formats.activation_grid import at_least_float32
from tersor.formats.clipped_grid import Codes, symmetric
from tersor.formats.packing import pack, packed_size, unpack
from tersor.layers.exchange import exchangeable
from tersor.layers.linear_map import matrix_shape

UNROUNDED = 32  # bits of activations that stay as they are


@exchangeable
class DynamicMap(nn.Module):
    """In place of nn.Linear or transformers' Conv1D: y = W x̂ + bias, x̂ on the symmetric grid of formats/clipped_grid.py.

    It computes in floating point with numbers on those grids. This shows what integers would give, takes a fraction of the
    memory, and is not faster than the original.

    qweight: int32 [packed_size(in, w_bits), out], the codes packed along the input. steps, lows: floating [rows], where rows is
    1 (one grid in all) or out (one an output): W = lows + steps · codes. clip: what |x| is limited to; 0: nothing.
    """

    qweight: Tensor
    steps: Tensor
    lows: Tensor
    like: Tensor  # empty; the dtype of `weight`, which follows the module's casts

    def __init__(
        self, original: nn.Module, *, w_bits: int, a_bits: int, clip: float, per_output: bool, bias: bool
    ) -> None:
        super().__init__()
        dense = original.weight
        assert isinstance(dense, Tensor)
        self.w_bits, self.a_bits, self.clip, self.per_output = w_bits, a_bits, clip, per_output
        self.out_features, self.in_features = matrix_shape(original)
        self.packed_parameters = self.out_features * self.in_features
        words, exact = packed_size(self.in_features, w_bits), torch.promote_types(dense.dtype, torch.float32)
        self.register_buffer("qweight", torch.zeros(words, self.out_features, dtype=torch.int32, device=dense.device))
        for name in ("steps", "lows"):
            rows = self.out_features if per_output else 1
            self.register_buffer(name, torch.zeros(rows, dtype=exact, device=dense.device))
        self.register_buffer("like", torch.empty(0, dtype=dense.dtype, device="cpu"), persistent=False)
        empty = torch.zeros(self.out_features, dtype=dense.dtype, device=dense.device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> nn.Module:
        return cls(original, **described)

    def describe(self) -> dict[str, Any]:
        numbers = {"w_bits": self.w_bits, "a_bits": self.a_bits, "clip": self.clip}
        return {**numbers, "per_output": self.per_output, "bias": self.bias is not None}

    def fill(self, found: Codes, bias: Tensor | None) -> None:
        """found: codes [out, in], step and low [rows, 1]."""
        self.qweight.copy_(pack(found.codes.t(), self.w_bits, dim=0))
        self.steps.copy_(found.step.flatten())
        self.lows.copy_(found.low.flatten())
        if self.bias is not None and bias is not None:
            self.bias.data.copy_(bias)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in]; a new tensor at every access."""
        codes = unpack(self.qweight, self.w_bits, self.in_features, dim=0).t()
        return Codes(codes, self.steps[:, None], self.lows[:, None]).dequantize().to(self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.a_bits != UNROUNDED:
            x = symmetric(at_least_float32(x), self.a_bits, self.clip).to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, w_bits={self.w_bits}, a_bits={self.a_bits}, clip={self.clip}"
