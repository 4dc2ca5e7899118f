"""Numbers in small blocks that share a power of two: integers of b bits and one shift of 8 bits a block.

With M the largest magnitude of a block and L = 2^(b-1) - 1, the largest code:

    e = the largest shift with M · 2^e <= L, from -128 to 127; 0 for a block of zeros
    q = round(x · 2^e),  x̂ = q · 2^-e

Nothing saturates (but for M above L · 2^128), so |x - x̂| <= 2^-(e+1). A tensor [..., R, C] is cut into tiles of `rows` x
`columns`; 0 stands for all. Tiles at the ends are smaller. Storage: b + 8/N bits a number, N = rows · columns.
Source: BCT (arXiv 2304.01483), of which only the description was public.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHIFTS = (-128, 127)  # what 8 bits hold


@dataclass(frozen=True)
class Blocks:
    """Numbers in blocks that share a shift."""

    codes: Tensor  # int8 (int16 above 8 bits) [..., R, C]
    shifts: Tensor  # int8 [..., ceil(R/rows), ceil(C/columns)]
    bits: int
    rows: int
    columns: int

    @property
    def limit(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1) - 1)

    def each_shift(self) -> Tensor:
        """The shift of every number, int8 [..., R, C]."""
        R, C = self.codes.shape[-2:]
        spread = self.shifts.repeat_interleave(self.rows or R, -2)[..., :R, :]
        return spread.repeat_interleave(self.columns or C, -1)[..., :C]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.codes.to(dtype) * power_of_two(-self.each_shift().to(torch.int32), dtype)


def to_blocks(x: Tensor, bits: int, *, columns: int, rows: int = 1) -> Blocks:
    """x [..., R, C], floating and finite, in blocks; a vector counts as one row. Its codes keep x's shape."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    matrix = x[None] if x.dim() == 1 else x
    shifts = shifts_of(_largest(matrix, rows, columns), bits)
    whole = Blocks(matrix, shifts, bits, rows, columns)
    codes = torch.round(matrix * power_of_two(whole.each_shift().to(torch.int32), x.dtype))
    codes = codes.clamp(-whole.limit, whole.limit).to(torch.int8 if bits <= 8 else torch.int16)
    return (
        Blocks(codes[0], shifts[0], bits, rows, columns) if x.dim() == 1 else Blocks(codes, shifts, bits, rows, columns)
    )


def shifts_of(largest: Tensor, bits: int) -> Tensor:
    """The shift for each largest magnitude, int8: exact, by the exponents of the numbers and not by logarithms."""
    part, exponent = torch.frexp(largest)  # largest = part · 2^exponent, part in [1/2, 1)
    shift = bits - 1 - exponent
    shift = shift - (part * 2 ** (bits - 1) > 2 ** (bits - 1) - 1).to(shift.dtype)
    return torch.where(largest > 0, shift, 0).clamp(*SHIFTS).to(torch.int8)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent exactly, for whole exponents."""
    return torch.ldexp(torch.ones_like(exponent, dtype=dtype), exponent)


def _largest(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The largest magnitude of every tile."""
    R, C = matrix.shape[-2:]
    rows, columns = rows or R, columns or C
    size = matrix.abs()
    if R % rows or C % columns:
        size = torch.nn.functional.pad(size, (0, -C % columns, 0, -R % rows))
    tiles = size.reshape(*size.shape[:-2], -(-R // rows), rows, -(-C // columns), columns)
    return tiles.amax((-1, -3))
