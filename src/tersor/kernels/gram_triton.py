"""Σ x xᵀ on tensor cores: the products of 16-bit inputs are exact, sums of one call are float32, those over calls float64.

Only the lower triangle is computed: half of the arithmetic of a general matmul, and half of the float64 numbers to update. The
same kernel computes the float32 sums and adds them to the float64 numbers.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, TOKENS = 128, 64  # columns on each side of a tile; tokens that are multiplied at once
TOGETHER = 2048  # tokens whose sums stay in float32: a tensor core rounds these towards zero, so that errors add up
BAND = 8  # rows of tiles


def add_gram(total: Tensor, x: Tensor) -> None:
    """total += xᵀ x in the tiles of 128 x 128 on and below the diagonal. total float64 [columns, columns], x [tokens, columns],
    float16 or bfloat16."""
    if x.stride(1) != 1:
        x = x.contiguous()
    columns = x.shape[1]
    order = _order(triton.cdiv(columns, TILE), x.device)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        for part in torch.split(x, TOGETHER):
            _add_gram[(len(order),)](
                total, part, len(part), columns, x.stride(0), order, TILE=TILE, TOKENS=TOKENS, num_warps=8, num_stages=4
            )


@functools.lru_cache(maxsize=16)
def _order(tiles: int, device: torch.device) -> Tensor:
    """Row and column of the tiles on and below the diagonal, int32 [tiles (tiles + 1) / 2, 2], in the order of computing.

    In bands of a few rows, column by column within a band: neighbours in time share their inputs in the L2 cache.
    """
    order = [
        (row, column)
        for first in range(0, tiles, BAND)
        for column in range(min(first + BAND, tiles))
        for row in range(max(first, column), min(first + BAND, tiles))
    ]
    return torch.tensor(order, dtype=torch.int32, device=device)


@triton.jit  # type: ignore[untyped-decorator]
def _add_gram(
    total_pointer: tl.tensor,  # float64 [columns, columns]
    x_pointer: tl.tensor,  # [tokens, columns], rows x_stride apart
    tokens: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    order_pointer: tl.tensor,  # int32 [tiles, 2]
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    row = tl.load(order_pointer + 2 * tl.program_id(0))
    column = tl.load(order_pointer + 2 * tl.program_id(0) + 1)
    i = row * TILE + tl.arange(0, TILE)
    j = column * TILE + tl.arange(0, TILE)
    t = tl.arange(0, TOKENS)
    sums = tl.zeros((TILE, TILE), dtype=tl.float32)
    left = x_pointer + t[:, None].to(tl.int64) * x_stride + i[None, :]
    right = x_pointer + t[:, None].to(tl.int64) * x_stride + j[None, :]
    for start in range(0, tokens, TOKENS):
        there = (start + t < tokens)[:, None]
        a = tl.load(left, mask=there & (i < columns)[None, :], other=0.0)
        b = tl.load(right, mask=there & (j < columns)[None, :], other=0.0)
        sums = tl.dot(tl.trans(a), b, sums)
        left += TOKENS * x_stride
        right += TOKENS * x_stride
    target = total_pointer + i[:, None].to(tl.int64) * columns + j[None, :]
    inside = (i < columns)[:, None] & (j < columns)[None, :]
    tl.store(target, tl.load(target, mask=inside) + sums.to(tl.float64), mask=inside)
