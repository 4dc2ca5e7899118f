"""LayerNorm and RMSNorm from integers in blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.formats.blocks import to_blocks
from tersor.layers.block_arithmetic import norm
from tersor.layers.block_map import VECTOR_BITS
from tersor.layers.block_tensor import BlockTensor
from tersor.layers.exchange import exchangeable


@exchangeable
class BlockNorm(nn.Module):
    """In place of a norm over the last axis: γ (x - mean) / sqrt(var + eps) + β; γ and β are stored in blocks of 8 bits."""

    def __init__(self, original: nn.Module, *, a_bits: int, columns: int, eps: float, center: bool, bias: bool) -> None:
        super().__init__()
        dense = original.weight
        assert isinstance(dense, Tensor)
        self.a_bits, self.columns, self.eps, self.center = a_bits, columns, eps, center
        self.gamma = BlockTensor(dense, bits=VECTOR_BITS, rows=1, columns=columns)
        self.beta = BlockTensor(dense, bits=VECTOR_BITS, rows=1, columns=columns) if bias else None
        self.like = nn.Parameter(dense.new_empty(0), requires_grad=False)

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> nn.Module:
        return cls(original, **described)

    def describe(self) -> dict[str, Any]:
        numbers = {"a_bits": self.a_bits, "columns": self.columns, "eps": self.eps}
        return {**numbers, "center": self.center, "bias": self.beta is not None}

    def fill(self, weight: Tensor, bias: Tensor | None) -> float:
        if self.beta is not None and bias is not None:
            self.beta.fill(bias)
        return self.gamma.fill(weight)

    @property
    def weight(self) -> Tensor:
        """γ; a new tensor at every access."""
        return self.gamma.dequantize().to(self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            tokens = to_blocks(
                x.reshape(-1, x.shape[-1]), self.a_bits, columns=self.columns, rows=1 if self.columns else 0
            )
            y = norm(tokens, eps=self.eps, center=self.center) * self.gamma.dequantize()
            if self.beta is not None:
                y = y + self.beta.dequantize()
            return y.view(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.gamma.shape[0]}, a_bits={self.a_bits}, eps={self.eps}, center={self.center}"
