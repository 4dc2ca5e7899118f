"""An embedding of packed codes: each row has a grid of its own, with any step and any lowest level."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.formats.clipped_grid import Codes
from tersor.formats.packing import pack, packed_size, unpack
from tersor.layers.exchange import exchangeable


@exchangeable
class PackedRows(nn.Module):
    """In place of nn.Embedding: ids [...] -> [..., hidden]. Only the rows that are asked for are unpacked.

    qweight: int32 [tokens, packed_size(hidden, bits)]. steps, lows: floating [tokens]; row i is lows[i] + steps[i] · codes[i].
    """

    qweight: Tensor
    steps: Tensor
    lows: Tensor
    like: Tensor  # empty; the dtype of the rows, which follows the module's casts

    def __init__(self, original: nn.Module, *, bits: int) -> None:
        super().__init__()
        dense = original.weight
        assert isinstance(dense, Tensor)
        self.bits = bits
        self.num_embeddings, self.embedding_dim = dense.shape
        self.packed_parameters = dense.numel()
        shape, exact = (len(dense), packed_size(dense.shape[1], bits)), torch.promote_types(dense.dtype, torch.float32)
        self.register_buffer("qweight", torch.zeros(shape, dtype=torch.int32, device=dense.device))
        for name in ("steps", "lows"):
            self.register_buffer(name, torch.zeros(len(dense), dtype=exact, device=dense.device))
        self.register_buffer("like", torch.empty(0, dtype=dense.dtype, device="cpu"), persistent=False)

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> nn.Module:
        return cls(original, **described)

    def describe(self) -> dict[str, Any]:
        return {"bits": self.bits}

    def fill(self, found: Codes) -> None:
        """found: codes [tokens, hidden], step and low [tokens, 1]."""
        self.qweight.copy_(pack(found.codes, self.bits, dim=1))
        self.steps.copy_(found.step[:, 0])
        self.lows.copy_(found.low[:, 0])

    @property
    def weight(self) -> Tensor:
        """The dequantized table [tokens, hidden]; a new tensor at every access."""
        return self.forward(torch.arange(self.num_embeddings, device=self.qweight.device))

    def forward(self, ids: Tensor) -> Tensor:
        codes = unpack(self.qweight[ids], self.bits, self.embedding_dim, dim=-1)
        return Codes(codes, self.steps[ids][..., None], self.lows[ids][..., None]).dequantize().to(self.like.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"
