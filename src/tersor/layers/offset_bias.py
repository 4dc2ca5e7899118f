"""Attention biases learned per head and per absolute offset (|dy|, |dx|) on a square grid, as LeViT introduced them.

A table is [heads, side * side]: entry |dy| * side + |dx|. Published checkpoints number the offsets by first appearance
over (query, key) pairs, which is the same, since the first query is the corner (0, 0).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def offset_index(side: int, stride: int = 1) -> Tensor:
    """Which table entry belongs to each pair: [queries, keys] of a grid `side` x `side`, every stride-th a query."""
    line = torch.arange(side, device="cpu")
    distance = (line[::stride, None] - line[None, :]).abs()  # (queries of a line, keys of a line)
    index = distance[:, None, :, None] * side + distance[None, :, None, :]  # (qy, qx, ky, kx)
    return rearrange(index, "qy qx ky kx -> (qy qx) (ky kx)")


def resize_table(table: Tensor, side: int) -> Tensor:
    """A table interpolated (bicubic) to another grid, so that a checkpoint runs at another image size."""
    old = round(table.shape[1] ** 0.5)
    if old == side or old * old != table.shape[1]:  # no table of such a grid: loading will say so
        return table
    square = rearrange(table, "heads (dy dx) -> 1 heads dy dx", dy=old)
    resized = torch.nn.functional.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    return rearrange(resized, "1 heads dy dx -> heads (dy dx)")
