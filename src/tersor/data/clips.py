"""Short videos as files: frames (T, C, H, W) in [-1, 1], C 1 or 3, from and to pictures (the extra `images`) or .npy."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.data.images import from_pixels, open_frames
from tersor.errors import TersorError

MILLISECONDS = 120  # a frame of a GIF


def read_clip(path: Path, most: int) -> list[Any]:
    """At most the first `most` frames of a GIF, APNG or WebP, or the one frame of a picture, as RGB images of Pillow."""
    return open_frames(path, most)


def from_frames(images: Sequence[Any], *, side: int, channels: int) -> Tensor:
    """(T, C, side, side) in [-1, 1] of Pillow's images, resized where they are of another size."""
    mode = {1: "L", 3: "RGB"}[channels]
    bicubic = importlib.import_module("PIL.Image").Resampling.BICUBIC
    found = []
    for image in images:
        image = image if image.size == (side, side) else image.resize((side, side), bicubic)
        values = np.array(image.convert(mode), np.float32).reshape(side, side, channels)
        found.append(torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1))
    return torch.stack(found)


def write_clip(clip: Tensor, path: Path, *, kind: str) -> None:
    """kind ".gif": a moving picture; ".png": the frames side by side; ".npy": the numbers as they are, float32."""
    if kind == ".npy":
        with path.open("wb") as file:
            np.save(file, clip.numpy().astype(np.float32))
        return
    levels = ((clip.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()  # (T, H, W, C)
    levels = levels[..., 0] if levels.shape[-1] == 1 else levels
    if kind == ".png":
        from_pixels(np.concatenate(list(levels), 1)).save(path, format="PNG")
    elif kind == ".gif":
        first, *rest = [from_pixels(frame) for frame in levels]
        first.save(path, format="GIF", save_all=True, append_images=rest, duration=MILLISECONDS, loop=0)
    else:
        raise TersorError(f"clips are written as .gif, .png or .npy, not as {kind}")
