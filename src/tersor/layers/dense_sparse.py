"""A linear map whose weight is a sparse times a small dense matrix, block by block (DSFormer, arXiv 2312.13211).

    W_b ≈ S_b D_b        W_b [p, q] a block of W [out, in], D_b [k, q] dense, S_b [p, k] with s numbers in every row
    y = Σ_b S_b (D_b x_b)

Tensors: `basis` [blocks, k, q]; `values` [blocks, p, s]; `indices`, the places of the values in their rows, ⌈log2 k⌉ bits each,
packed into bytes without gaps, the lowest bit first; `bias` [out]. Blocks are numbered row by row of the matrix. Instead of p q
32-bit numbers a block takes k q + s p (1 + ⌈log2 k⌉ / 32).

S is made dense for a call, which then runs two dense products: k (q + p) multiplications a block, fewer than p q where
k < p q / (p + q).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.layers.exchange import exchangeable
from tersor.layers.linear_map import matrix_shape


@exchangeable
class DenseSparse(nn.Module):
    """Drop-in for nn.Linear and transformers' Conv1D: x [..., in] -> [..., out]. rows, columns: p, q; basis: k; nonzeros: s."""

    indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rows: int,
        columns: int,
        basis: int,
        nonzeros: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if out_features % rows or in_features % columns or not 1 <= nonzeros <= basis:
            raise TersorError(
                f"a weight of {out_features} x {in_features} has no blocks of {rows} x {columns} with {nonzeros} of {basis}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.rows, self.columns, self.k, self.nonzeros = rows, columns, basis, nonzeros
        down, across = out_features // rows, in_features // columns
        self.grid = (down, across)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.basis = nn.Parameter(torch.empty(down * across, basis, columns, **made))
        self.values = nn.Parameter(torch.empty(down * across, rows, nonzeros, **made))
        packed = -(-down * across * rows * nonzeros * index_bits(basis) // 8)
        self.register_buffer("indices", torch.zeros(packed, dtype=torch.uint8, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, **made)) if bias else None
        self._unpacked: tuple[Any, Tensor] | None = None

    def describe(self) -> dict[str, Any]:
        return {"rows": self.rows, "columns": self.columns, "basis": self.k, "nonzeros": self.nonzeros}

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> DenseSparse:
        out_features, in_features = matrix_shape(original)
        weight = original.weight
        assert isinstance(weight, Tensor)
        bias = getattr(original, "bias", None) is not None
        return cls(in_features, out_features, bias=bias, device=weight.device, dtype=weight.dtype, **described)

    @property
    def places(self) -> Tensor:
        """The unpacked indices [blocks, p, s], int64. They are cached until the packed ones change."""
        found = (self.indices.data_ptr(), self.indices._version, self.indices.device)
        if self._unpacked is None or self._unpacked[0] != found:
            shape = self.values.shape
            self._unpacked = (found, unpack_indices(self.indices, index_bits(self.k), shape.numel()).view(shape))
        return self._unpacked[1]

    @torch.no_grad()
    def set_factors(self, sparse: Tensor, basis: Tensor) -> None:
        """Take S [blocks, p, k], keeping the s largest numbers of every row, and D [blocks, k, q]."""
        places = largest(sparse.abs(), self.nonzeros)
        self.values.copy_(sparse.gather(-1, places))
        self.indices.copy_(pack_indices(places, index_bits(self.k)))
        self.basis.copy_(basis)

    def sparse(self) -> Tensor:
        """S as a dense tensor [blocks, p, k]."""
        shape = (*self.values.shape[:2], self.k)
        return self.values.new_zeros(shape).scatter(-1, self.places, self.values)

    @property
    def weight(self) -> Tensor:
        """W [out, in], a new tensor at every access, for code that looks at a layer's weight instead of calling it."""
        return joined_blocks(self.sparse() @ self.basis, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.grid
        if (down, across) == (1, 1):
            return nn.functional.linear(nn.functional.linear(x, self.basis[0]), self.sparse()[0], self.bias)
        sparse, basis = (each.view(down, across, *each.shape[1:]) for each in (self.sparse(), self.basis))
        h = torch.einsum("...cq,dckq->...dck", x.reshape(*x.shape[:-1], across, self.columns), basis)
        y = torch.einsum("...dck,dcpk->...dp", h, sparse).flatten(-2)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, blocks of {self.rows} x {self.columns}, {self.nonzeros} of {self.k}"


def index_bits(basis: int) -> int:
    """⌈log2 k⌉."""
    return (basis - 1).bit_length()


def largest(sizes: Tensor, count: int) -> Tensor:
    """[..., k] -> [..., count]: the places of the largest in every row, in rising order. Of equal ones the first are taken."""
    order = sizes.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return order.sort(-1).values


def pack_indices(places: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits, of any shape, as bytes [⌈n · bits / 8⌉]."""
    flat = (places.flatten()[:, None] >> torch.arange(bits, device=places.device)) & 1
    flat = nn.functional.pad(flat.flatten(), (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, device=places.device)).sum(-1).to(torch.uint8)


def unpack_indices(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers, int64 [count]."""
    flat = (packed.long()[:, None] >> torch.arange(8, device=packed.device)) & 1
    flat = flat.flatten()[: count * bits].view(count, bits)
    return (flat << torch.arange(bits, device=packed.device)).sum(-1)


def split_blocks(W: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix [out, in] as blocks [blocks, rows, columns], numbered row by row."""
    down, across = W.shape[0] // rows, W.shape[1] // columns
    return W.reshape(down, rows, across, columns).transpose(1, 2).flatten(0, 1)


def joined_blocks(blocks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inverse of `split_blocks`. grid: how many rows and columns of blocks the matrix has."""
    return blocks.reshape(*grid, *blocks.shape[1:]).transpose(1, 2).flatten(2).flatten(0, 1)
