"""Labelled images for classification, from a folder or from one packed file.

    data = load_images("imagenet/train", ImageConfig(size=224))
    data[0]             # {"image": (3, 224, 224), normalised, "target": class number}

Folder: one subfolder a class, CLASS/*.jpg (or .jpeg, .png, .webp, .bmp), classes numbered in alphabetical order.
Packed: an .npz with `bytes` (the encoded files one after the other, uint8), `offsets` (n + 1) and `labels` (n).

Hidden folders and files, and `__MACOSX`, are no classes and no images. Where the model has names for its classes and the
folders have the same names, the model's numbers are the labels.

Every image is made RGB (16 bits scaled to 8), its shorter side scaled to `size` (bicubic), its centre cut out and normalised
per channel; a model whose preprocessor says otherwise gives a `prepare` of its own.
With `augment` it is also mirrored or not and shifted by up to an eighth, by chance that depends on the seed, the epoch
and the image alone: an interrupted training goes on with the same images, with any number of workers.
"""

from __future__ import annotations

import importlib
import io
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
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
from tersor.untrusted import check_seed, first_words, read_npz, readable

PIXELS = 1 << 26  # of one image: more is no photograph
SIDES = 100  # the longer side may be so many times the shorter: scaling it would take what the picture has not
SIZE = 1 << 13
LABELS = 1 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # no others are tried, whatever a file is called
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's numbers
Prepare = Callable[[Any], Tensor]  # an RGB image of Pillow -> (3, H, W)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    augment: bool = False
    seed: int = 0
    resize: int | tuple[int, ...] | None = None  # the shorter side, or both (H, W); None: the shorter to `size`
    filter: str = "bicubic"  # nearest, bilinear, bicubic, lanczos, box or hamming

    def __post_init__(self) -> None:
        if not 1 <= self.size <= SIZE:
            raise TersorError(f"the size of images is {self.size}, it must be positive and at most {SIZE}")
        sides = self.resize if isinstance(self.resize, tuple) else (self.resize or self.size,)
        if len(sides) > 2 or not all(isinstance(side, int) and self.size <= side <= 2 * SIZE for side in sides):
            raise TersorError(f"images are resized to {self.resize}; from {self.size} to {2 * SIZE} pixels can be cut")
        if self.filter not in FILTERS:
            raise TersorError(f"the filter of images is {self.filter!r}, not one of {', '.join(FILTERS)}")
        check_seed(self.seed)
        if self.seed < 0:
            raise TersorError(f"the seed of images is {self.seed}, it must not be negative")
        numbers = all(isinstance(each, int | float) and math.isfinite(each) for each in (*self.mean, *self.std))
        if len(self.mean) != 3 or len(self.std) != 3 or not numbers or min(self.std) <= 0:
            raise TersorError(f"images need three means and three positive stds, not {self.mean} and {self.std}")


class Images(Dataset[dict[str, Tensor]]):
    """Encoded images (paths, or the bytes themselves) and their labels; decoded when asked for."""

    def __init__(
        self,
        encoded: Sequence[Path | bytes],
        labels: Sequence[int],
        classes: Sequence[str],
        config: ImageConfig,
        prepare: Prepare | None = None,
    ) -> None:
        self.encoded, self.labels, self.classes, self.config = encoded, labels, tuple(classes), config
        self.prepare: Prepare = prepare or (lambda image: prepared(image, config))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation anew; the trainer calls it at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.prepare(open_image(self.encoded[index]))
        if self.config.augment:
            chance = torch.Generator().manual_seed(mixed_seed(self.config.seed, self.epoch, index))
            image = flip_and_shift(image, chance)
        return {"image": image, "target": torch.tensor(self.labels[index])}


def open_image(encoded: Path | bytes, *, upright: bool = False) -> Any:
    """An RGB image of Pillow. Raises TersorError where the file is no image, or says that it is larger than any photograph.

    upright: turned as the camera was held; otherwise the pixels are as they are stored.
    """

    def convert(opened: Any) -> Any:
        return _to_rgb(importlib.import_module("PIL.ImageOps").exif_transpose(opened) if upright else opened)

    return _opened(encoded, convert)


def open_frames(path: Path, most: int) -> list[Any]:
    """At most the first `most` frames of a picture, as RGB images of Pillow; a picture that does not move has one."""

    return [image for _, image in open_timed_frames(path, most)]


def open_timed_frames(
    path: Path, most: int, stride: int = 1, make: Callable[[Any], Any] = lambda image: image
) -> list[tuple[float, Any]]:
    """Of the first `most` frames of a picture every stride-th: its time in seconds, and what `make` makes of it as an RGB image
    of Pillow. A frame that says no time is shown for a tenth of a second."""

    def frames(opened: Any) -> list[tuple[float, Any]]:
        found, seconds = [], 0.0
        for number in range(min(most, getattr(opened, "n_frames", 1))):
            opened.seek(number)
            if number % stride == 0:
                found.append((seconds, make(_to_rgb(opened.copy()))))
            seconds += (opened.info.get("duration") or 100) / 1000
        return found

    found: list[tuple[float, Any]] = _opened(path, frames)
    return found


def alpha_cut(path: Path, *, margin: float = 0.1) -> Any:
    """An RGB image of Pillow. Of a file with an alpha channel: the part that is not transparent, on a white square with a
    margin of that share of its longer side on each side. Others stay as they are."""

    def cut(opened: Any) -> Any:
        if "A" not in opened.getbands():
            return _to_rgb(opened)
        image = opened.convert("RGBA")
        box = image.getchannel("A").getbbox()
        if box is None:
            raise TersorError(f"{path} is transparent everywhere")
        image = image.crop(box)
        side = round(max(image.size) * (1 + 2 * margin))
        square = _pillow().new("RGBA", (side, side), (255, 255, 255, 255))
        square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square.convert("RGB")

    return _opened(path, cut)


def open_with_alpha(path: Path) -> Any:
    """An RGBA image of Pillow, turned as the camera was held."""

    def convert(opened: Any) -> Any:
        image = importlib.import_module("PIL.ImageOps").exif_transpose(opened)
        clear = "A" in image.getbands() or "transparency" in image.info
        return image.convert("RGBA") if clear else _to_rgb(image).convert("RGBA")

    return _opened(path, convert)


def open_mask(path: Path) -> Any:
    """The numbers of a picture of one channel as they are stored, of a palette the colours' numbers: (H, W), int64."""

    def numbers(opened: Any) -> Any:
        if len(opened.getbands()) != 1 or opened.mode == "F":
            raise TersorError(f"{path} is a picture of {opened.mode}; a mask has one channel, of the classes' numbers")
        return np.asarray(opened).astype(np.int64)

    return _opened(path, numbers)


def from_pixels(values: Any) -> Any:
    """An image of Pillow of a numpy array (H, W, 3) or (H, W)."""
    return _pillow().fromarray(values)


def _opened(encoded: Path | bytes, convert: Callable[[Any], Any]) -> Any:
    image_module = _pillow()
    name = encoded if isinstance(encoded, Path) else "an image of the packed file"
    source = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's words on large images: below they are refused
            with image_module.open(source, formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > PIXELS or max(width, height) > SIDES * min(width, height):
                    raise TersorError(f"{name} says it is {width} x {height} pixels, which is no photograph")
                return convert(opened)
    except TersorError:
        raise
    except Exception as error:  # decoders raise errors of all kinds
        raise TersorError(f"{name} cannot be decoded: {first_words(error)}") from None


def _to_rgb(image: Any) -> Any:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = _pillow().fromarray(((values + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def prepared(image: Any, config: ImageConfig) -> Tensor:
    """An RGB image of Pillow, resized, cut and normalised: (3, size, size)."""
    size, resize = config.size, config.resize or config.size
    if isinstance(resize, int):
        scale = resize / min(image.size)
        width, height = (max(resize, int(side * scale + 1e-9)) for side in image.size)
    else:
        height, width = resize
    if image.size != (width, height):
        image = image.resize((width, height), FILTERS.index(config.filter))
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.array(image.crop((left, top, left + size, top + size)), np.float32) / 255  # (H, W, 3)
    pixels = (pixels - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def load_images(
    path: str | Path,
    config: ImageConfig | None = None,
    *,
    prepare: Prepare | None = None,
    classes: Sequence[str] | None = None,
) -> Images:
    """Open a folder of classes or a packed .npz. Raises TersorError where there are no images.

    prepare: makes a tensor of an image, in place of what `config` says. classes: the model's names, by number.
    """
    path, config = Path(path).expanduser(), config or ImageConfig()
    _pillow()
    with readable(path):
        if path.is_dir():
            return _open_folder(path, config, prepare, classes)
        is_file = path.is_file()
    if path.suffix == ".npz" and is_file:
        return _open_packed(path, config, prepare)
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


def _open_folder(path: Path, config: ImageConfig, prepare: Prepare | None, classes: Sequence[str] | None) -> Images:
    names = sorted(each.name for each in path.iterdir() if each.is_dir() and not _is_hidden(each.name))
    numbers = _numbers(path, names, classes)
    files = [
        (file, numbers[name])
        for name in names
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES and file.is_file() and not any(map(_is_hidden, file.relative_to(path).parts))
    ]
    if not files:
        raise TersorError(f"{path} holds no images: one subfolder a class is expected, with .jpg or .png files in it")
    return Images([file for file, _ in files], [label for _, label in files], classes or names, config, prepare)


def picture_files(path: Path) -> list[Path]:
    """The pictures in a folder and below it; what is hidden is passed over. Raises TersorError where there are none."""
    with readable(path):
        inside = sorted(path.rglob("*")) if path.is_dir() else []
    shown = [each for each in inside if not any(map(_is_hidden, each.relative_to(path).parts))]
    files = [each for each in shown if each.suffix.lower() in SUFFIXES and each.is_file()]
    if not files:
        raise TersorError(f"{path} is no folder with pictures ({', '.join(sorted(SUFFIXES))}) in it")
    return files


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that lie in a folder itself; what is hidden is passed over."""
    inside = sorted(each for each in folder.iterdir() if not _is_hidden(each.name))
    return [each for each in inside if each.suffix.lower() in SUFFIXES and each.is_file()]


def folders_of_pictures(folder: Path) -> list[Path]:
    """The folder and those below it in which pictures lie; what is hidden is passed over."""
    inside = [folder, *sorted(folder.rglob("*"))]
    shown = [each for each in inside if not any(map(_is_hidden, each.relative_to(folder).parts))]
    return [each for each in shown if each.is_dir() and pictures_in(each)]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _numbers(path: Path, names: Sequence[str], classes: Sequence[str] | None) -> dict[str, int]:
    """The label of each folder: the model's own where it has these names, else in alphabetical order.

    Raises TersorError where only some of the names are the model's, or the folders are too few for the order to be the model's.
    """
    in_order = {name: n for n, name in enumerate(names)}
    if not classes:
        return in_order
    known: dict[str, int] = {}
    for n, said in enumerate(classes):  # "tench, Tinca tinca" is one class by either name
        for each in (said, *said.split(",")):
            known.setdefault(_plain(each), n)
    found = {name: known[_plain(name)] for name in names if _plain(name) in known}
    if len(found) == len(names):
        return found
    if all(name.isdecimal() and int(name) < len(classes) for name in names):
        return {name: int(name) for name in names}
    if found or len(names) != len(classes):
        odd = next(name for name in names if name not in found)
        raise TersorError(
            f"{path} has a folder {odd}, which is none of the model's {len(classes)} classes ({', '.join(classes[:4])}, ...); "
            "name the folders after them, or after their numbers"
        )
    return in_order


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


def _open_packed(path: Path, config: ImageConfig, prepare: Prepare | None) -> Images:
    try:
        data, offsets, labels = read_npz(path, ("bytes", "offsets", "labels")).values()
    except TersorError as error:
        raise TersorError(f"{path} is not a packed image file (bytes, offsets, labels): {error}") from None
    if any(each.ndim != 1 for each in (data, offsets, labels)) or data.dtype != np.uint8:
        raise TersorError(f"{path}: bytes must be uint8, and bytes, offsets and labels of one dimension")
    if offsets.dtype.kind not in "iu" or labels.dtype.kind not in "iu":
        raise TersorError(f"{path}: offsets are {offsets.dtype} and labels {labels.dtype}; whole numbers are expected")
    if len(offsets) != len(labels) + 1 or len(labels) == 0 or offsets[-1] != len(data):
        raise TersorError(f"{path}: {len(labels)} labels and {len(data)} bytes do not go with {len(offsets)} offsets")
    if offsets[0] != 0 or bool((offsets[1:] < offsets[:-1]).any()):
        raise TersorError(f"{path}: its offsets do not rise from 0")
    if int(labels.min()) < 0 or int(labels.max()) >= LABELS:
        raise TersorError(f"{path}: its labels reach from {labels.min()} to {labels.max()}; 0 to {LABELS - 1} are read")
    encoded = [data[begin:end].tobytes() for begin, end in itertools.pairwise(offsets.tolist())]
    names = [str(n) for n in range(int(labels.max()) + 1)]
    return Images(encoded, labels.tolist(), names, config, prepare)


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError:
        raise TersorError("reading images needs Pillow: pip install 'tersor[images]'") from None
