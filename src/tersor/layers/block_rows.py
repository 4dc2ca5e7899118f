"""An embedding whose rows are stored in blocks with shifts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.layers.block_tensor import BlockTensor
from tersor.layers.exchange import exchangeable
from tersor.layers.quantized_embedding import scale_of, scaled


@exchangeable
class BlockRows(nn.Module):
    """In place of nn.Embedding: ids [...] -> [..., hidden]; only the rows asked for are unpacked."""

    embed_scale: Tensor | float | None

    def __init__(self, original: nn.Module, *, bits: int, rows: int, columns: int) -> None:
        super().__init__()
        assert isinstance(original, nn.Embedding)
        self.rows, self.columns = rows, columns
        self.num_embeddings, self.embedding_dim = original.weight.shape
        self.table = BlockTensor(original.weight, bits=bits, rows=rows, columns=columns)
        self.like = nn.Parameter(original.weight.new_empty(0), requires_grad=False)
        scale = scale_of(original)
        if isinstance(scale, Tensor):
            self.register_buffer("embed_scale", scale, persistent=False)
        else:
            self.embed_scale = scale

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> nn.Module:
        return cls(original, **described)

    def describe(self) -> dict[str, Any]:
        return {"bits": self.table.bits, "rows": self.rows, "columns": self.columns}

    @property
    def weight(self) -> Tensor:
        """The dequantized table [tokens, hidden]; a new tensor at every access."""
        return self.table.dequantize().to(self.like.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            rows = self.table.blocks(ids.flatten()).dequantize().to(self.like.dtype)
            return scaled(rows.view(*ids.shape, self.embedding_dim), self.embed_scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.table.bits}"
