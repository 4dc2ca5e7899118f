"""Positions of tokens: sinusoids, rotary embeddings, and learned grids brought to another size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def sinusoids(length: int, d: int, *, base: float = 10_000.0, interleaved: bool = True) -> Tensor:
    """(length, d), float32: sin and cos of t / base^(2i/d). Interleaved: column 2i is a sine, 2i + 1 its cosine; else all
    sines come first. With an odd d the last cosine is left out. It is a constant, made on the CPU whatever the default device."""
    pairs = math.ceil(d / 2)
    rates = torch.exp(torch.arange(pairs, dtype=torch.float32, device="cpu") * 2 * (-math.log(base) / d))
    angles = torch.arange(length, dtype=torch.float32, device="cpu")[:, None] * rates  # (length, pairs)
    parts = (angles.sin(), angles.cos())
    table = torch.stack(parts, -1).flatten(1) if interleaved else torch.cat(parts, -1)
    return table[:, :d]


def rotary_table(length: int, d: int, *, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin (length, d / 2), float32, of the angles t / base^(2i/d)."""
    rates = base ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), rates)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """x (..., length, d) turned by its position. Pairs are (i, i + d/2), as in LLaMA; interleaved: (2i, 2i + 1)."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def resize_grid(
    table: Tensor, old: Sequence[int], new: Sequence[int], *, extra: int = 0, mode: str = "bicubic"
) -> Tensor:
    """A learned table (1, extra + prod(old), C) for another grid: the first `extra` rows (class tokens) stay as they are."""
    if tuple(old) == tuple(new):
        return table
    kept, rows = table[:, :extra], table[:, extra:]
    channels = rows.shape[-1]
    image = rows.reshape(1, *old, channels).movedim(-1, 1)
    image = F.interpolate(image, size=tuple(new), mode=mode, align_corners=False)
    return torch.cat((kept, image.flatten(2).transpose(1, 2)), 1)
