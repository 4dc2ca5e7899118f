"""Calibration samples from a folder or packed file of labelled images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.data.images import ImageConfig, flip_and_shift, load_images


def is_images(path: str | Path) -> bool:
    """Whether samples at this path are images: a folder, or a packed file."""
    return Path(path).is_dir() or Path(path).suffix == ".npz"


def image_batches(
    path: str | Path,
    settings: dict[str, Any],
    *,
    samples: int,
    seed: int,
    prepare: Callable[[Any], Tensor] | None = None,
    classes: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """`samples` images drawn at random without repetition (all, where there are fewer), in one batch each:
    {"image": [1, 3, H, W], "target": [1]}. settings: as `checkpoint.preprocessing.image_settings` gives them; prepare, classes:
    as `load_images` takes them."""
    data = load_images(path, ImageConfig(**settings), prepare=prepare, classes=classes)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:samples]
    items = [data[n] for n in chosen.tolist()]
    return [{name: value[None] for name, value in item.items()} for item in items]


def augmented(images: Tensor, chance: torch.Generator) -> Tensor:
    """images [B, C, H, W], each mirrored at random and moved by up to an eighth, as in training."""
    return torch.stack([flip_and_shift(image, chance) for image in images])
