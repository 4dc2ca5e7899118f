"""A picture through a network in tiles, so that the memory does not grow with the picture, and without seams.

    large = in_tiles(network, picture)          # picture (H, W, 3), uint8 -> (scale H, scale W, 3), uint8

Tiles of TILE pixels a side overlap by OVERLAP. The outer MARGIN of a tile, where the network sees an end of the picture that
is none, does not count; over the rest of the overlap one tile's weight falls from 1 to 0 as the next one's rises. A network
that looks no farther than MARGIN pixels therefore gives the same as on the whole picture. Tiles begin at multiples of 64, so
that attention in windows of 8, 16, 32 or 64 pixels has the same windows as in the whole picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.errors import TersorError

TILE = 256
OVERLAP = 64
MARGIN = 16
RESULT_PIXELS = 1 << 28  # 16 times a photo of 16 million pixels


@dataclass(frozen=True)
class Span:
    """One tile along one side: pixels begin to end, and how much each counts."""

    begin: int
    end: int
    weights: Tensor  # (end - begin,)


def in_tiles(
    network: Callable[[Tensor], Tensor], picture: Any, *, progress: Callable[[int, int], None] | None = None
) -> Any:
    """network: (1, 3, h, w) in [0, 1] -> (1, 3, scale h, scale w). Raises TersorError where the result would be too
    large, or is no multiple of the picture. progress(done, total): after each tile."""
    height, width = picture.shape[:2]
    rows, columns = (spans(side) for side in (height, width))
    scale = done_tiles = 0
    result, band = np.empty((0, 0, 3), np.uint8), torch.empty(0)
    for row, below in zip(rows, [*rows[1:], None], strict=True):
        for column in columns:
            piece = picture[row.begin : row.end, column.begin : column.end]
            pixels = torch.from_numpy(piece.copy()).permute(2, 0, 1)[None].float() / 255
            made = network(pixels)[0].float().cpu()
            if not scale:
                scale = _scale_of(pixels[0], made)
                if height * width * scale**2 > RESULT_PIXELS:
                    raise TersorError(
                        f"{scale} times {width} x {height} pixels are more than the {RESULT_PIXELS:,} that are written at most"
                    )
                result = np.empty((height * scale, width * scale, 3), np.uint8)
                band = torch.zeros(3, (row.end - row.begin) * scale, width * scale)
            down, across = (each.weights.repeat_interleave(scale) for each in (row, column))
            band[:, :, column.begin * scale : column.end * scale] += made * down[:, None] * across
            done_tiles += 1
            if progress is not None:
                progress(done_tiles, len(rows) * len(columns))
        done = ((below.begin if below else height) - row.begin) * scale  # rows that no further tile touches
        ready = (band[:, :done].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        result[row.begin * scale : row.begin * scale + done] = ready.numpy()
        if below:
            more = (below.end - row.end) * scale
            band = F.pad(band[:, done:], (0, 0, 0, more))
    return result


def spans(length: int) -> list[Span]:
    """Tiles that cover `length`; at every pixel the weights of all add up to 1."""
    step = TILE - OVERLAP
    begins = list(range(0, max(length - OVERLAP, 1), step))
    found = []
    for begin in begins:
        end = min(begin + TILE, length)
        places = torch.arange(begin, end) + 0.5
        weights = torch.ones(end - begin)
        if begin > 0:
            weights *= _ramp(places - begin)
        if end < length:
            weights *= 1 - _ramp(places - (begin + step))
        found.append(Span(begin, end, weights))
    return found


def _ramp(places: Tensor) -> Tensor:
    """From 0 to 1 over an overlap that begins at 0, but for the margins at both its ends."""
    return ((places - MARGIN) / (OVERLAP - 2 * MARGIN)).clamp(0, 1)


def _scale_of(pixels: Tensor, made: Tensor) -> int:
    scale = made.shape[-1] // pixels.shape[-1]
    if scale < 1 or made.shape != (3, scale * pixels.shape[1], scale * pixels.shape[2]):
        raise TersorError(f"a picture {list(pixels.shape)} became {list(made.shape)}; a whole multiple is expected")
    return scale
