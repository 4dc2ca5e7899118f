"""Super-resolution: the L1 distance on crops of pictures made small, and the user's picture enlarged into a PNG."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.data.images import SUFFIXES, from_pixels, open_image
from tersor.data.pictures import PictureConfig, load_pictures
from tersor.errors import TersorError
from tersor.evaluate.fidelity import Fidelity, fidelity
from tersor.files import replacing
from tersor.models.config import checked_config
from tersor.progress import Progress, silent
from tersor.tasks.sheet import levels
from tersor.tasks.task import Sets, Task
from tersor.tasks.tiles import in_tiles
from tersor.train.objectives import restoration


@dataclass(frozen=True)
class Enlarged:
    """An enlarged picture."""

    path: Path
    out: Path  # where it was written
    scale: int
    size: tuple[int, int]  # width and height
    fidelity: Fidelity | None  # how near it is to the reference, if there was one

    def line(self) -> str:
        told = f"{self.path}: {self.out}, {self.size[0]} x {self.size[1]}"
        if self.fidelity is None:
            return told
        return f"{told}, PSNR {self.fidelity.psnr:.2f} dB, SSIM {self.fidelity.ssim:.4f}"

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"path": str(self.path), "out": str(self.out), "scale": self.scale}
        found["size"] = list(self.size)
        if self.fidelity is not None:  # JSON has no infinity: equal pictures have no PSNR
            psnr = self.fidelity.psnr
            found |= {"psnr": psnr if math.isfinite(psnr) else None, "ssim": self.fidelity.ssim}
        return found


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    config = checked_config(PictureConfig, table, "data")
    scale = scale_of(model)
    train = load_pictures(data, config, scale=scale)
    held_out = load_pictures(validation, config, scale=scale, chance=False) if validation else None
    return Sets(train, held_out)


@torch.no_grad()
def scale_of(model: Any) -> int:
    """How many times larger a model makes pictures. It is run to find out, which works for every model."""
    image = model.example_inputs(1)["image"]
    was_training = model.training
    made = model.eval()(image)
    model.train(was_training)
    return int(made.shape[-1] // image.shape[-1])


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
) -> Enlarged:
    assert out is not None
    picture = np.asarray(open_image(path, upright=True))
    first = next(module.parameters())
    large = in_tiles(
        functools.partial(_enlarged, module, first), picture, progress=functools.partial(progress, path.name)
    )
    scale = len(large) // len(picture)
    near = None if reference is None else _compared(large, reference, scale)
    file = out / f"{path.stem}_x{scale}.png"
    with replacing(file) as partial:
        from_pixels(large).save(partial, format="PNG")
    return Enlarged(path, file, scale, (large.shape[1], large.shape[0]), near)


def _enlarged(module: nn.Module, like: Tensor, pixels: Tensor) -> Tensor:
    made = module(pixels.to(like.device, like.dtype))
    if not isinstance(made, Tensor) or made.dim() != 4:
        raise TersorError(f"{type(module).__name__} gives no picture for a picture")
    return made


def _compared(large: Any, reference: Path, scale: int) -> Fidelity:
    """Fidelity to the reference, without its rows and columns beyond a multiple of the scale, which its small copy left out."""
    original = np.asarray(open_image(reference, upright=True))
    height, width = large.shape[:2]
    if not all(0 <= found - made < scale for found, made in zip(original.shape, (height, width), strict=False)):
        raise TersorError(
            f"{reference} has {original.shape[1]} x {original.shape[0]} pixels, the result {width} x {height}: "
            "it is no reference for it"
        )
    return fidelity(large, original[:height, :width], border=scale)


def panels(sample: Mapping[str, Tensor], made: Tensor, sets: Sets) -> tuple[Any, Any, Any]:
    return levels(sample["image"]), levels(sample["target"]), levels(made)


TASK = Task(
    restoration,
    load_data,
    predict,
    frozenset(SUFFIXES),
    writes=("_x[0-9]*.png",),
    compares=True,
    normalises=False,
    panels=panels,
)
