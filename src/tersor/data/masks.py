"""Pictures with a class number for every pixel, to learn segmentation from.

    data = load_masks("streets/train", MaskConfig(size=512), classes=19)
    data[0]             # {"image": (3, 512, 512), normalised, "target": (512, 512), class numbers}

A folder with `images/` and `masks/`: for each picture a PNG of the same name, one channel or a palette, whose values are the
classes; 255 is for pixels that have none. Picture and mask are scaled (bilinear, nearest) until the shorter side is `size`,
and a square is cut out: with `chance` somewhere along the longer side and mirrored or not, which depends on the seed, the
epoch and the index alone; without, in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tersor.data.images import FILTERS, ImageConfig, from_pixels, open_image, open_mask, picture_files
from tersor.data.seeding import mixed_seed
from tersor.errors import TersorError

NO_CLASS = 255
LONGEST = 4  # the longer side is at most so many times the size


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    size: int = 512
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    seed: int = 0

    def __post_init__(self) -> None:
        ImageConfig(size=self.size, mean=self.mean, std=self.std, seed=self.seed)  # the same limits


class Masks(Dataset[dict[str, Tensor]]):
    def __init__(self, files: Sequence[tuple[Path, Path]], config: MaskConfig, *, classes: int, chance: bool) -> None:
        self.files, self.config, self.classes, self.chance = files, config, classes, chance
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Cut other squares; the trainer calls it at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path, mask_path = self.files[index]
        picture, numbers = open_image(path, upright=True), open_mask(mask_path)
        if numbers.shape != (picture.height, picture.width):
            raise TersorError(
                f"{mask_path} has {numbers.shape[1]} x {numbers.shape[0]} pixels, its picture "
                f"{picture.width} x {picture.height}"
            )
        self._check(mask_path, numbers)
        size = self.config.size
        width, height = scaled(picture.width, picture.height, size, least=True)
        picture = picture.resize((width, height), FILTERS.index("bilinear"))
        mask = from_pixels(numbers.astype(np.uint8)).resize((width, height), FILTERS.index("nearest"))
        right, down, mirror = 0.5, 0.5, 1.0
        if self.chance:
            generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, self.epoch, index))
            right, down, mirror = torch.rand(3, generator=generator).tolist()
        left, top = int(right * (width - size + 1)), int(down * (height - size + 1))
        square = (left, top, left + size, top + size)
        image = normalised(picture.crop(square), self.config.mean, self.config.std)
        target = torch.from_numpy(np.array(mask.crop(square), np.int64))
        if mirror < 0.5:
            image, target = image.flip(2), target.flip(1)
        return {"image": image, "target": target}

    def _check(self, path: Path, numbers: Any) -> None:
        wrong = numbers[((numbers >= self.classes) & (numbers != NO_CLASS)) | (numbers < 0)]
        if wrong.size:
            raise TersorError(
                f"{path} holds the class {wrong.max()}, the model has num_classes {self.classes}; "
                f"--set model.num_classes={wrong.max() + 1}, or {NO_CLASS} in the mask for pixels without a class"
            )


def load_masks(path: str | Path, config: MaskConfig, *, classes: int, chance: bool = True) -> Masks:
    """Raises TersorError where a picture has no mask, or the model has more classes than a mask can hold."""
    if classes > NO_CLASS:
        raise TersorError(f"masks have a byte a pixel, for {NO_CLASS} classes at most; the model has {classes}")
    path = Path(path).expanduser()
    files = []
    for picture in picture_files(path / "images"):
        mask = (path / "masks" / picture.relative_to(path / "images")).with_suffix(".png")
        if not mask.is_file():
            raise TersorError(f"{picture} has no mask: there is no {mask}")
        files.append((picture, mask))
    return Masks(files, config, classes=classes, chance=chance)


def scaled(width: int, height: int, size: int, *, least: bool = False) -> tuple[int, int]:
    """Width and height with the shorter side `size`, but the longer at most LONGEST times that; least: whatever it is."""
    scale = size / min(width, height)
    if not least:
        scale = min(scale, LONGEST * size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def normalised(picture: Any, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An RGB image of Pillow as (3, H, W)."""
    values = (np.array(picture, np.float32) / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()
