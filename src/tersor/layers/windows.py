"""Windows of a grid in any number of dimensions: partition, merge, shifted windows' masks, relative positions.

x (B, *grid, C) with grid = (H, W), (T, H, W), ...; a window has the size `window`, one number a dimension.

    windows = partition(x, window)                  (B * number of windows, tokens a window, C)
    x = merge(windows, window, grid)                its inverse
    mask = shift_mask(grid, window, shift)          (number of windows, tokens, tokens), 0 or -100: added to the logits
    index = relative_index(window)                  (tokens, tokens) into a table of prod(2 w - 1) rows

Shifted windows (Liu et al., arXiv 2103.14030): roll x by -shift, attend in windows under the mask, roll back. Tokens
that were not neighbours before the roll do not see each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

HIDDEN = -100.0  # the published models' "minus infinity"


def partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """x (B, *grid, C), each side a multiple of the window's -> (B * windows, prod(window), C), windows row by row."""
    batch, *grid, channels = x.shape
    n = len(window)
    split = [part for side, w in zip(grid, window, strict=True) for part in (side // w, w)]
    order = [0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1]  # which window, then where in it
    return x.reshape(batch, *split, channels).permute(order).reshape(-1, math.prod(window), channels)


def merge(windows: Tensor, window: Sequence[int], grid: Sequence[int]) -> Tensor:
    """(B * windows, prod(window), C) -> (B, *grid, C)."""
    n, channels = len(window), windows.shape[-1]
    counts = [side // w for side, w in zip(grid, window, strict=True)]
    order = [0, *(each for i in range(n) for each in (1 + i, 1 + n + i)), 2 * n + 1]
    return windows.reshape(-1, *counts, *window, channels).permute(order).reshape(-1, *grid, channels)


def shift_mask(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int], *, device: torch.device | None = None
) -> Tensor:
    """(windows, tokens, tokens): 0 where both tokens come from the same region of the rolled grid, else -100."""
    region = torch.zeros(1, *grid, 1, device=device)
    parts: list[tuple[slice, ...]] = [
        (slice(-w), slice(-w, -s), slice(-s, None)) if s else (slice(None),) for w, s in zip(window, shift, strict=True)
    ]
    for number, where in enumerate(product(*parts)):
        region[(slice(None), *where)] = number
    rows = partition(region, window).squeeze(-1)  # (windows, tokens)
    differs = rows[:, None, :] != rows[:, :, None]
    return torch.zeros(differs.shape, device=region.device).masked_fill(differs, HIDDEN)


def relative_index(window: Sequence[int]) -> Tensor:
    """(tokens, tokens): the row of query minus key in a table that holds every offset, the last dimension fastest. On the
    CPU, whatever the device in force: a constant."""
    axes = torch.meshgrid(*(torch.arange(w, device="cpu") for w in window), indexing="ij")
    places = torch.stack(axes).flatten(1)  # (n, tokens)
    offsets = places[:, :, None] - places[:, None, :]
    index = torch.zeros(offsets.shape[1:], dtype=torch.int64, device="cpu")
    for offset, w in zip(offsets, window, strict=True):
        index = index * (2 * w - 1) + offset + w - 1
    return index


def fit_window(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[list[int], list[int]]:
    """A window is never larger than the grid; where it is the whole side, it is not shifted."""
    pairs = [(g, 0) if g <= w else (w, s) for g, w, s in zip(grid, window, shift, strict=True)]
    return [w for w, _ in pairs], [s for _, s in pairs]


def pad_to(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """x (B, *grid, C) with zeros behind each side up to the next multiple."""
    padding = [0, 0]  # of the channels: torch counts from the last dimension
    for side, m in zip(reversed(x.shape[1:-1]), reversed(multiple), strict=True):
        padding += [0, -side % m]
    return torch.nn.functional.pad(x, padding) if any(padding) else x
