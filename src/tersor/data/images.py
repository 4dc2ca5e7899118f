"""Labelled images for classification, from a folder or from one packed file.

    data = load_images("imagenet/train", ImageConfig(size=224))
    data[0]             # {"image": (3, 224, 224), normalised, "target": class number}

Folder: one subfolder a class, CLASS/*.jpg (or .jpeg, .png, .webp, .bmp), classes numbered in alphabetical order.
Packed: an .npz with `bytes` (the encoded files one after the other, uint8), `offsets` (n + 1) and `labels` (n).

Every image is made RGB, its shorter side scaled to `size` (bicubic), its centre cut out and normalised per channel.
With `augment` it is also mirrored or not and shifted by up to an eighth, by chance that depends on the seed, the epoch
and the image alone: an interrupted training goes on with the same images, with any number of workers.
"""

from __future__ import annotations

import importlib
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from tersor.data.seeding import mixed_seed
from tersor.errors import TersorError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    augment: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise TersorError(f"the size of images is {self.size}, it must be positive")
        if self.seed < 0:
            raise TersorError(f"the seed of images is {self.seed}, it must not be negative")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise TersorError(f"images need three means and three positive stds, not {self.mean} and {self.std}")


class Images(Dataset[dict[str, Tensor]]):
    """Encoded images (paths, or the bytes themselves) and their labels; decoded when asked for."""

    def __init__(
        self, encoded: Sequence[Path | bytes], labels: Sequence[int], classes: Sequence[str], config: ImageConfig
    ) -> None:
        self.encoded, self.labels, self.classes, self.config = encoded, labels, tuple(classes), config
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Other chances for the augmentation; the trainer calls it at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self._decode(self.encoded[index])
        if self.config.augment:
            chance = torch.Generator().manual_seed(mixed_seed(self.config.seed, self.epoch, index))
            image = flip_and_shift(image, chance)
        return {"image": image, "target": torch.tensor(self.labels[index])}

    def _decode(self, encoded: Path | bytes) -> Tensor:
        image_module = _pillow()
        size = self.config.size
        try:
            with image_module.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as opened:
                image = opened.convert("RGB")
        except OSError as error:  # also Pillow's UnidentifiedImageError
            name = encoded if isinstance(encoded, Path) else "an image of the packed file"
            raise TersorError(f"{name} cannot be decoded: {error}") from None
        if min(image.size) != size:
            scale = size / min(image.size)
            width, height = (max(size, round(side * scale)) for side in image.size)
            image = image.resize((width, height), image_module.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        pixels = np.array(image.crop((left, top, left + size, top + size)), np.float32) / 255  # (H, W, 3)
        pixels = (pixels - np.array(self.config.mean, np.float32)) / np.array(self.config.std, np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def load_images(path: str | Path, config: ImageConfig | None = None) -> Images:
    """Open a folder of classes or a packed .npz. Raises TersorError where there are no images."""
    path, config = Path(path).expanduser(), config or ImageConfig()
    _pillow()
    if path.is_dir():
        return _open_folder(path, config)
    if path.suffix == ".npz" and path.is_file():
        return _open_packed(path, config)
    raise TersorError(f"no images at {path}: neither a folder with one subfolder a class nor an .npz file")


def flip_and_shift(image: Tensor, chance: torch.Generator) -> Tensor:
    """image (C, H, W) mirrored with chance 1/2 and moved by up to an eighth of its size, zeros where nothing is."""
    H, W = image.shape[1:]
    flip, down, right = torch.rand(3, generator=chance).tolist()
    if flip < 0.5:
        image = image.flip(2)
    high, wide = H // 8, W // 8
    top, left = int(down * (2 * high + 1)), int(right * (2 * wide + 1))
    return F.pad(image, (wide, wide, high, high))[:, top : top + H, left : left + W]


def _open_folder(path: Path, config: ImageConfig) -> Images:
    classes = sorted(each.name for each in path.iterdir() if each.is_dir())
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise TersorError(f"{path} holds no images: one subfolder a class is expected, with .jpg or .png files in it")
    return Images([file for file, _ in files], [label for _, label in files], classes, config)


def _open_packed(path: Path, config: ImageConfig) -> Images:
    try:
        with np.load(path) as arrays:
            data, offsets, labels = (arrays[name] for name in ("bytes", "offsets", "labels"))
    except (KeyError, OSError, ValueError) as error:
        raise TersorError(f"{path} is not a packed image file (bytes, offsets, labels): {error}") from None
    if len(offsets) != len(labels) + 1 or len(labels) == 0 or offsets[-1] != len(data):
        raise TersorError(f"{path}: {len(labels)} labels and {len(data)} bytes do not go with {len(offsets)} offsets")
    encoded = [data[begin:end].tobytes() for begin, end in itertools.pairwise(offsets)]
    return Images(encoded, labels.tolist(), [str(n) for n in range(int(labels.max()) + 1)], config)


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError:
        raise TersorError("reading images needs Pillow: pip install 'tersor[images]'") from None
