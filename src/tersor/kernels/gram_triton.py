"""Σ x xᵀ on tensor cores: the products of 16-bit inputs are exact, sums of one call are float32, those over calls float64.

Only the lower triangle is computed: half of the arithmetic of a general matmul, and half of the float64 numbers to update,
which happens in the kernel that has the sums at hand.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, TOKENS = 128, 64  # columns on each side of a tile; tokens that are multiplied at once


def add_gram(total: Tensor, x: Tensor) -> None:
    """total += xᵀ x in the tiles of 128 x 128 on and below the diagonal. total float64 [columns, columns], x [tokens, columns],
    float16 or bfloat16."""
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, columns = x.shape
    if tokens == 0:
        return
    tiles = triton.cdiv(columns, TILE)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _add_gram[(tiles * (tiles + 1) // 2,)](
            total, x, tokens, columns, x.stride(0), tiles, TILE=TILE, TOKENS=TOKENS, BAND=8, num_warps=8, num_stages=4
        )


@triton.jit  # type: ignore[untyped-decorator]
def _add_gram(
    total_pointer: Any,  # float64 [columns, columns]
    x_pointer: Any,  # [tokens, columns], rows x_stride apart
    tokens: Any,
    columns: Any,
    x_stride: Any,
    tiles: Any,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    BAND: tl.constexpr,
) -> None:
    # Tiles in bands of BAND rows, column by column within a band: neighbours in time share their inputs in the L2 cache.
    # A band that begins at row r has BAND * r tiles left of its corner, and the corner's triangle.
    place = tl.program_id(0)
    first = place * 0
    rows = tl.minimum(BAND, tiles)
    size = rows * (rows + 1) // 2
    while place >= size:
        place -= size
        first += BAND
        rows = tl.minimum(BAND, tiles - first)
        size = rows * first + rows * (rows + 1) // 2
    if place < rows * first:
        row = first + place % rows
        column = place // rows
    else:
        place -= rows * first
        column = first
        height = rows
        while place >= height:
            place -= height
            height -= 1
            column += 1
        row = column + place
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
