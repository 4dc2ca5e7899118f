"""A tensor of parameters that is stored in blocks with shifts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.formats.blocks import Blocks, to_blocks
from tersor.formats.packing import pack, packed_size, unpack


class BlockTensor(nn.Module):
    """A matrix [R, C] or a vector [C]. codes: int8 of that shape at 8 bits, else int32 [R, packed_size(C, bits)], codes + 2^(bits
    - 1) packed along a row. shifts: int8, one a block."""

    codes: Tensor
    shifts: Tensor

    def __init__(self, like: Tensor, *, bits: int, rows: int, columns: int) -> None:
        super().__init__()
        self.bits, self.shape = bits, tuple(like.shape)
        R, C = (1, *like.shape)[-2:]
        self.rows, self.columns = rows, columns
        self.packed_parameters = R * C
        width, dtype = (C, torch.int8) if bits == 8 else (packed_size(C, bits), torch.int32)
        self.register_buffer("codes", torch.zeros(*self.shape[:-1], width, dtype=dtype, device=like.device))
        tiles = (-(-R // (rows or R)), -(-C // (columns or C)))
        self.register_buffer("shifts", torch.zeros(tiles[-len(self.shape) :], dtype=torch.int8, device=like.device))

    def fill(self, x: Tensor) -> float:
        """Store x; ‖x̂ - x‖² / ‖x‖²."""
        found = to_blocks(x, self.bits, columns=self.columns, rows=self.rows)
        codes = found.codes
        if self.bits != 8:
            codes = pack(codes.to(torch.int32) + 2 ** (self.bits - 1), self.bits, dim=-1)
        self.codes.copy_(codes)
        self.shifts.copy_(found.shifts)
        wide = x.float()
        return float((self.dequantize() - wide).square().sum() / wide.square().sum().clamp(min=1e-30))

    def blocks(self, index: Tensor | None = None) -> Blocks:
        """All blocks, or those of the rows with these numbers [n]. These are blocks of one row, each with the shifts of its
        tile."""
        codes, shifts, rows = self.codes, self.shifts, self.rows
        if codes.dim() == 1:
            codes, shifts = codes[None], shifts[None]
        if index is not None:
            codes, shifts, rows = codes[index], shifts[index // (rows or len(codes))], 1
        if self.bits != 8:
            codes = (unpack(codes, self.bits, self.shape[-1], dim=-1).to(torch.int16) - 2 ** (self.bits - 1)).to(
                torch.int8
            )
        return Blocks(codes, shifts, self.bits, rows, self.columns)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.blocks().dequantize(dtype).view(self.shape)
