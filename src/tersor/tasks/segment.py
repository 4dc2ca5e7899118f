"""Segmentation: cross-entropy at every pixel, and the classes of the user's picture as a mask and over the picture."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.checkpoint.preprocessing import preprocessor_config
from tersor.data.images import FILTERS, SUFFIXES, from_pixels, open_image
from tersor.data.masks import MaskConfig, load_masks, normalised, scaled
from tersor.errors import TersorError
from tersor.files import replacing
from tersor.models.config import checked_config
from tersor.progress import Progress, silent
from tersor.tasks.sheet import shown
from tersor.tasks.task import Sets, Task
from tersor.train.objectives import IGNORED, segmentation

SIZE = 512  # of the shorter side for official checkpoints, as ADE20K is evaluated
GOLDEN = 0.618034  # hues that far apart stay distinct, however many there are


@dataclass(frozen=True)
class Segments:
    """Which classes the pixels of a picture have."""

    path: Path
    mask: Path  # a picture of class numbers
    overlay: Path  # the picture, coloured by class
    numbers: tuple[int, ...]  # of the classes, the commonest first
    names: tuple[str, ...]  # likewise
    shares: tuple[float, ...]  # of the pixels, likewise

    def line(self) -> str:
        told = (f"{name} {100 * share:.1f}%" for name, share in zip(self.names, self.shares, strict=True))
        return f"{self.path}: {', '.join(told)}; {self.mask}, {self.overlay}"

    def as_dict(self) -> dict[str, Any]:
        files = {"path": str(self.path), "mask": str(self.mask), "overlay": str(self.overlay)}
        return files | {"numbers": list(self.numbers), "classes": list(self.names), "shares": list(self.shares)}


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    config = checked_config(MaskConfig, table, "data")
    classes = model.config.num_classes
    train = load_masks(data, config, classes=classes)
    held_out = load_masks(validation, config, classes=classes, chance=False) if validation else None
    settings = {name: getattr(config, name) for name in ("size", "mean", "std")}
    return Sets(train, held_out, preprocessing=preprocessor_config(settings))


@torch.no_grad()
def predict(
    module: nn.Module,
    path: Path,
    *,
    settings: Mapping[str, Any],
    labels: Mapping[int, str],
    out: Path | None,
    reference: Path | None,
    progress: Progress = silent,
) -> Segments:
    assert out is not None
    picture = open_image(path, upright=True)
    size = scaled(picture.width, picture.height, settings["size"])
    image = normalised(picture.resize(size, FILTERS.index("bilinear")), settings["mean"], settings["std"])[None]
    first = next(module.parameters())
    classes = winners(module(image.to(first.device, first.dtype)), (picture.height, picture.width))
    numbers, counts = np.unique(classes, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    mask, overlay = (out / f"{path.stem}_{kind}.png" for kind in ("mask", "overlay"))
    for file, values in ((mask, classes), (overlay, np.asarray(picture) // 2 + coloured(classes) // 2)):
        with replacing(file) as partial:
            from_pixels(values).save(partial, format="PNG")
    found = tuple(int(numbers[n]) for n in order)
    names = tuple(labels.get(number, f"class {number}") for number in found)
    return Segments(path, mask, overlay, found, names, tuple(float(counts[n]) / classes.size for n in order))


def winners(output: Any, size: tuple[int, int]) -> Any:
    """The class of each pixel of a picture (H, W), uint8 or from 256 classes on uint16, of logits (1, classes, h, w) or of
    classes (1, h, w).

    Only classes that win somewhere are enlarged, one after the other: all of them at once would take gigabytes.
    """
    if not isinstance(output, Tensor) or output.dim() not in (3, 4) or len(output) != 1:
        raise TersorError("the model gives neither logits [1, classes, height, width] nor classes [1, height, width]")
    if output.dim() == 3:
        best = F.interpolate(output[:, None].float(), size, mode="nearest")[0, 0]
    else:
        best, highest = (torch.full(size, value, device=output.device) for value in (0.0, -torch.inf))
        present: Tensor = torch.unique(output[0].argmax(0))
        for number in present.tolist():
            score = F.interpolate(output[:, number, None].float(), size, mode="bilinear", align_corners=False)[0, 0]
            best = torch.where(score > highest, number, best)
            highest = torch.maximum(score, highest)
    kind = np.uint8 if best.max() < 256 else np.uint16
    return best.cpu().numpy().astype(kind)


def colour(number: int) -> tuple[int, int, int]:
    """Of a class: the same in every picture, black for class 0."""
    if number == 0:
        return (0, 0, 0)
    r, g, b = colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.8, 1 - number % 3 / 6)
    return round(255 * r), round(255 * g), round(255 * b)


def coloured(classes: Any) -> Any:
    """The colour of each class (H, W) as a picture (H, W, 3)."""
    return np.array([colour(number) for number in range(int(classes.max()) + 1)], np.uint8)[classes]


def panels(sample: Mapping[str, Tensor], output: Tensor, sets: Sets) -> tuple[Any, Any, Any]:
    target = sample["target"].numpy()
    truth = coloured(target)
    truth[target == IGNORED] = 255  # white
    return shown(sample["image"], sets.preprocessing), truth, coloured(winners(output[None], target.shape))


TASK = Task(
    segmentation,
    load_data,
    predict,
    frozenset(SUFFIXES),
    writes=("_mask.png", "_overlay.png"),
    size=SIZE,
    panels=panels,
)
