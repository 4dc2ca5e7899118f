"""A linear map whose weight and input are blocks of integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.formats.blocks import to_blocks
from tersor.layers.block_arithmetic import matmul
from tersor.layers.block_tensor import BlockTensor
from tersor.layers.exchange import exchangeable
from tersor.layers.linear_map import matrix_shape

VECTOR_BITS = 8  # of biases and of the parameters of norms, at least


@exchangeable
class BlockMap(nn.Module):
    """In place of nn.Linear or transformers' Conv1D: y = W x + bias. W in tiles of `rows` outputs and `columns` inputs, x in
    blocks of `columns` channels of one token (rows 0 or columns 0: one block in all).

    like: an empty parameter, so that a model without others still has a dtype and a device; `weight` has its dtype.
    """

    def __init__(self, original: nn.Module, *, bits: int, a_bits: int, rows: int, columns: int, bias: bool) -> None:
        super().__init__()
        dense = original.weight
        assert isinstance(dense, Tensor)
        self.out_features, self.in_features = matrix_shape(original)
        self.a_bits, self.rows, self.columns = a_bits, rows, columns
        shape = torch.empty(self.out_features, self.in_features, device="meta")
        self.table = BlockTensor(_on(dense, shape), bits=bits, rows=rows, columns=columns)
        vector = _on(dense, shape[:, 0])
        self.offset = BlockTensor(vector, bits=max(bits, VECTOR_BITS), rows=1, columns=columns) if bias else None
        self.like = nn.Parameter(dense.new_empty(0), requires_grad=False)

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> nn.Module:
        return cls(original, **described)

    def describe(self) -> dict[str, Any]:
        numbers = {"bits": self.table.bits, "a_bits": self.a_bits, "rows": self.rows, "columns": self.columns}
        return {**numbers, "bias": self.offset is not None}

    def fill(self, W: Tensor, bias: Tensor | None) -> float:
        if self.offset is not None and bias is not None:
            self.offset.fill(bias)
        return self.table.fill(W)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in]; a new tensor at every access."""
        return self.table.dequantize().to(self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # so that a scope around this layer does not see its products
            tokens = to_blocks(
                x.reshape(-1, self.in_features), self.a_bits, columns=self.columns, rows=1 if self.columns else 0
            )
            y = matmul(tokens, self.table.blocks())
            if self.offset is not None:
                y = y + self.offset.dequantize()
            return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.table.bits}, a_bits={self.a_bits}"


def _on(dense: Tensor, shape: Tensor) -> Tensor:
    """An uninitialized tensor with the shape of `shape`, on the device of `dense`."""
    return torch.empty_like(shape, device=dense.device)
