"""Arithmetic of integers on blocks with shifts: products, tables of functions, softmax, norms. See formats/blocks.py.

Every function takes blocks and returns wide numbers (float32); the next reader puts these into blocks again. The tensors hold
whole numbers wherever an integer machine would. A tile of a product is summed without rounding: in float32 as long as its sums
stay below 2^24, in float64 above. Functions are tables over the codes. A softmax adds integers of 15 bits. A norm adds up
integers and their squares in 64 bits. The sum of two tensors on their grids needs no function here: two codes of 8 bits whose
shifts differ by at most 16 have an exact sum in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tersor.formats.blocks import Blocks, power_of_two, to_blocks

MASKED = -1e4  # scores at or below it are hidden by a mask and get no code
TABLE_BITS = 15  # of the entries of the softmax's table
SPAN = 16  # bits by which the shifts of one token's blocks may differ before the finer block is rounded


def matmul(a: Blocks, b: Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """a [..., M, K] times the transpose of b [..., N, K] -> [..., M, N], in dtype; both have blocks of the same columns.

    Each pair of tiles is multiplied in integers; its result has the shift e_a + e_b, and tiles are added up in `dtype`.
    """
    K = a.codes.shape[-1]
    columns = a.columns or K
    exact = torch.float32 if min(columns, K) * a.limit * b.limit < 2**24 else torch.float64
    M, N = a.codes.shape[-2], b.codes.shape[-2]
    steps_a = power_of_two(-a.shifts.to(torch.int32), dtype).repeat_interleave(a.rows or M, -2)[..., :M, :]
    steps_b = power_of_two(-b.shifts.to(torch.int32), dtype).repeat_interleave(b.rows or N, -2)[..., :N, :]
    total: Tensor | None = None
    for n, start in enumerate(range(0, K, columns)):
        left, right = (each.codes[..., start : start + columns].to(exact) for each in (a, b))
        tile = (left @ right.mT).to(dtype) * steps_a[..., n, None] * steps_b[..., None, :, n]
        total = tile if total is None else total.add_(tile)
    assert total is not None
    return total


def weighted_sum(weights: Tensor, values: Blocks) -> Tensor:
    """weights [..., N, M] times values [..., M, D], whose blocks lie inside a token (a row), -> [..., N, D].

    The tokens' shifts are multiplied into the weights before these are put into blocks. So tiles over tokens are summed as
    integers, and no token changes how another's values are rounded: a causal model stays causal.
    """
    columns = values.columns or values.codes.shape[-1]
    found = []
    for n, codes in enumerate(torch.split(values.codes, columns, -1)):
        steps = power_of_two(
            -values.shifts[..., n].to(torch.int32), torch.float32
        )  # [..., M], or 1 in place of M where all share one
        steps = steps.expand(codes.shape[:-1]) * (codes != 0).any(-1)  # a token of zeros must not set its block's shift
        left = to_blocks(weights.float() * steps[..., None, :], values.bits, columns=values.columns, rows=values.rows)
        whole = codes.mT.contiguous()
        tiles = (*whole.shape[:-1], left.shifts.shape[-1])
        shifts = torch.zeros(tiles, dtype=torch.int8, device=codes.device)
        found.append(matmul(left, Blocks(whole, shifts, values.bits, 1, values.columns)))
    return torch.cat(found, -1)


def through_table(function: Callable[[Tensor], Tensor], x: Blocks) -> Tensor:
    """function(x̂), read from one table of 2^b - 1 entries for each shift that occurs."""
    shifts, which = torch.unique(x.shifts, return_inverse=True)
    codes = torch.arange(-x.limit, x.limit + 1, device=x.codes.device)
    table = function(codes * power_of_two(-shifts.to(torch.int32), torch.float32)[:, None])  # [shifts, 2^b - 1]
    row = Blocks(x.codes, which, x.bits, x.rows, x.columns).each_shift()
    return table.flatten()[row * len(codes) + x.codes + x.limit]


def softmax(scores: Tensor, bits: int) -> Tensor:
    """scores [..., N], masked ones at most -1e4, -> their softmax over the last axis.

    A row has one shift e. exp(-k · 2^-e), k codes below the largest, is a table of integers of 15 bits; these are added up, and
    each is divided by the sum. Rows that are hidden as a whole give 0.
    """
    hidden = scores <= MASKED
    x = to_blocks(scores.masked_fill(hidden, 0.0), bits, columns=0)
    lowest = -x.limit - 1
    codes = x.codes.to(torch.int32).masked_fill(hidden, lowest)
    below = (codes.amax(-1, keepdim=True) - codes).clamp(max=2 * x.limit)
    shifts, which = torch.unique(x.shifts, return_inverse=True)
    k = torch.arange(2 * x.limit + 1, device=scores.device)
    table = torch.round(2**TABLE_BITS * torch.exp(-k * power_of_two(-shifts.to(torch.int32), torch.float32)[:, None]))
    weights = table.to(torch.int32).flatten()[which * len(k) + below].masked_fill(hidden, 0)
    return weights.float() / weights.sum(-1, keepdim=True).clamp(min=1).float()


def norm(x: Blocks, *, eps: float, center: bool) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the last axis; without `center` x / sqrt(mean of squares + eps).

    The blocks of a token are brought to one shift s, and the sums of codes and of squares are those of integers.
    """
    each = x.each_shift().to(torch.int64)
    used = x.codes != 0
    coarsest = torch.where(used, each, 127).amin(-1, keepdim=True)
    s = torch.minimum(torch.where(used, each, -128).amax(-1, keepdim=True), coarsest + SPAN)
    move = (s - each).clamp(-62, 62)
    codes = x.codes.to(torch.int64)
    half = torch.where(move < 0, 1 << (-move - 1).clamp(min=0), 0)
    Q = torch.where(move >= 0, codes << move.clamp(min=0, max=SPAN), (codes + half) >> (-move).clamp(min=0))
    Q = torch.where(used, Q, 0)
    count = Q.shape[-1]
    mean = Q.sum(-1, keepdim=True).double() / count if center else torch.zeros((), device=Q.device)
    variance = (Q * Q).sum(-1, keepdim=True).double() / count - mean * mean
    scaled = eps * power_of_two(2 * s.clamp(-128, 127), torch.float64)
    return ((Q - mean) * (variance + scaled).rsqrt()).float()
