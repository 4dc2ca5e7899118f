"""Accuracy of an image classifier: the share of images whose likeliest class is their label's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.load import load
from tersor.checkpoint.preprocessing import class_names, image_processor, image_settings
from tersor.checkpoint.source import Openable, open_checkpoint
from tersor.data.images import ImageConfig, load_images
from tersor.devices import DType
from tersor.errors import TersorError
from tersor.evaluate.measures import class_logits
from tersor.progress import Progress


@dataclass(frozen=True)
class Accuracy:
    """How many images a classifier gets right."""

    top1: float  # percent of `images`
    images: int
    half_width: float  # of the 95 % confidence interval of top1, in percentage points

    def __float__(self) -> float:
        return self.top1


@torch.no_grad()
def accuracy(
    model: Openable | nn.Module,
    images: str | Path | tuple[Tensor, Tensor],
    *,
    batch_size: int = 100,
    max_images: int | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Accuracy:
    """model: a name or directory that says how it wants its images, or a module. images: a folder with one subfolder a class or a
    packed .npz (see `tersor.data.images`); for a module, the normalised images [n, 3, H, W] and their labels [n].

    Raises TersorError where there are no images, or the model is no classifier of them.
    """
    if isinstance(model, nn.Module):
        if not isinstance(images, tuple):
            raise TersorError("a module does not say how it wants its images: give (images, labels) as tensors")
        module, (pixels, labels) = model, images
    else:
        model = open_checkpoint(model)
        pixels, labels = read_images(model, images, limit=max_images) if not isinstance(images, tuple) else images
        module = load(model, dtype=dtype, device=device)
    pixels, labels = pixels[:max_images], labels[:max_images]
    if len(pixels) == 0:
        raise TersorError("there are no images to evaluate on")
    first = next(module.parameters())
    right = 0
    module.eval()
    for n, (batch, wanted) in enumerate(_batches(pixels, labels, batch_size), 1):
        logits = class_logits(module, batch.to(first.device, first.dtype))
        if int(labels.max()) >= logits.shape[1]:
            raise TersorError(f"a label is {int(labels.max())}, but the model has only {logits.shape[1]} classes")
        right += int((logits.argmax(-1) == wanted.to(logits.device)).sum())
        if progress is not None:
            progress("evaluating", n, math.ceil(len(pixels) / batch_size))
    share = right / len(pixels)
    return Accuracy(100 * share, len(pixels), 196 * math.sqrt(share * (1 - share) / len(pixels)))


def read_images(model: Openable, images: str | Path, *, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images as the model wants them, [n, 3, H, W], and their labels [n]."""
    if limit is not None and limit < 1:
        raise TersorError(f"max_images {limit} leaves nothing to evaluate; use at least 1")
    checkpoint = open_checkpoint(model)
    prepare = image_processor(checkpoint)
    config = ImageConfig() if prepare is not None else ImageConfig(**image_settings(checkpoint))
    data = load_images(images, config, prepare=prepare, classes=class_names(checkpoint))
    items: list[dict[str, Any]] = [data[n] for n in range(min(len(data), limit or len(data)))]
    return torch.stack([item["image"] for item in items]), torch.stack([item["target"] for item in items])


def _batches(pixels: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(pixels), size):
        yield pixels[first : first + size], labels[first : first + size]
