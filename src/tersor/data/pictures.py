"""Pictures to learn super-resolution from: crops of a folder's pictures, and the same crops made small.

    data = load_pictures("DIV2K/train", PictureConfig(size=64), scale=4)
    data[0]             # {"image": (3, 64, 64) in [0, 1], "target": (3, 256, 256) in [0, 1]}

Each picture gives `crops` samples an epoch. Their places, and whether they are mirrored, are drawn from the seed, the epoch and
the sample alone; without `chance` there is one crop a picture, from its middle. The small one is Pillow's bicubic
reduction of the crop, which widens the filter by the scale as papers do.
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

from tersor.data.images import FILTERS, SIZE, open_image, picture_files
from tersor.data.seeding import mixed_seed
from tersor.errors import TersorError
from tersor.untrusted import check_seed


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    size: int = 64  # of a crop's sides when it is small
    crops: int = 16  # of each picture an epoch
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.size <= SIZE:
            raise TersorError(f"the size of crops is {self.size}, it must be positive and at most {SIZE}")
        if not 1 <= self.crops <= 1 << 20:
            raise TersorError(f"the crops of a picture are {self.crops}, at least 1 and at most {1 << 20} are taken")
        check_seed(self.seed)
        if self.seed < 0:
            raise TersorError(f"the seed of crops is {self.seed}, it must not be negative")


class Pictures(Dataset[dict[str, Tensor]]):
    def __init__(self, files: Sequence[Path], config: PictureConfig, *, scale: int, chance: bool) -> None:
        self.files, self.config, self.scale, self.chance = files, config, scale, chance
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Cut at other places; the trainer calls it at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.files) * (self.config.crops if self.chance else 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path = self.files[index % len(self.files)]
        picture, side = open_image(path, upright=True), self.config.size * self.scale
        if min(picture.size) < side:
            raise TersorError(
                f"{path} has {picture.width} x {picture.height} pixels, crops for {self.scale} times {self.config.size} "
                f"need {side}; --set data.size={max(1, min(picture.size) // self.scale)}"
            )
        right, down, mirror = 0.5, 0.5, 1.0
        if self.chance:
            generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, self.epoch, index))
            right, down, mirror = torch.rand(3, generator=generator).tolist()
        left, top = int(right * (picture.width - side + 1)), int(down * (picture.height - side + 1))
        large = picture.crop((left, top, left + side, top + side))
        small = large.resize((self.config.size, self.config.size), FILTERS.index("bicubic"))
        image, target = pixels(small), pixels(large)
        if mirror < 0.5:
            image, target = image.flip(2), target.flip(2)
        return {"image": image, "target": target}


def load_pictures(path: str | Path, config: PictureConfig, *, scale: int, chance: bool = True) -> Pictures:
    return Pictures(picture_files(Path(path).expanduser()), config, scale=scale, chance=chance)


def pixels(picture: Any) -> Tensor:
    """An RGB image of Pillow as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture, np.float32) / 255).permute(2, 0, 1).contiguous()
