"""Clips of videos: frames of MP4 and other files (the extra `video`), moving GIFs, PNGs and WebPs, and folders of pictures.

    data = load_videos("drivers/train", VideoConfig(frames=16, size=112))
    data[0]             # {"clip": (3, 16, 112, 112), normalised, "target": class number}

Every `stride`-th frame is looked at, scaled until its shorter side is `size`. A video in a folder of labelled ones is
CLASS/NAME.mp4 (or .gif, ...), or CLASS/NAME/ with its frames as pictures, in the order of their names. In training the clip
starts anywhere in its video, and a square is cut out anywhere along the longer side, which depends on the seed, the
epoch and the index alone; otherwise both are in the middle. Clips are not mirrored: a left hand is not a right one.
"""

from __future__ import annotations

import collections
import importlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tersor.data.images import (
    FILTERS,
    PIXELS,
    ImageConfig,
    folders_of_pictures,
    open_image,
    open_timed_frames,
    pictures_in,
)
from tersor.data.masks import scaled
from tersor.data.seeding import mixed_seed
from tersor.errors import TersorError
from tersor.untrusted import first_words, readable, regular_file

VIDEOS = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"})  # by PyAV
MOVING = frozenset(
    {".gif", ".apng"}
)  # by Pillow; .png and .webp too where one is named, but in a folder they are frames
SUFFIXES = VIDEOS | MOVING
MOST = 1 << 12  # frames of a moving picture
Frame = tuple[float, Tensor]  # seconds from the beginning, and (h, w, 3) of uint8


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    frames: int = 32  # of a clip
    stride: int = 2  # one of so many frames of the video is taken
    size: int = 224  # pixels of the shorter side
    rate: float = 25.0  # frames a second of a folder, whose pictures say no times
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    seed: int = 0

    def __post_init__(self) -> None:
        ImageConfig(size=self.size, mean=self.mean, std=self.std, seed=self.seed)  # the same limits
        if not 1 <= self.frames <= MOST or not 1 <= self.stride <= MOST:
            raise TersorError(f"clips of {self.frames} frames, one of {self.stride}: both are from 1 to {MOST}")
        if not 0 < self.rate <= 1000:
            raise TersorError(f"the rate of frames is {self.rate} a second, it must be positive and at most 1000")


def frames_of(path: Path, config: VideoConfig) -> Iterator[Frame]:
    """Every stride-th frame with its time, scaled. Raises TersorError where the file is no video."""
    if path.is_dir():
        pictures = pictures_in(path)
        if not pictures:
            raise TersorError(f"{path} holds no pictures")
        for number in range(0, len(pictures), config.stride):
            yield number / config.rate, _small(open_image(pictures[number]), config.size)
    elif path.suffix.lower() in VIDEOS:
        yield from _decoded(path, config)
    else:
        yield from open_timed_frames(path, MOST, config.stride, lambda image: _small(image, config.size))


def _decoded(path: Path, config: VideoConfig) -> Iterator[Frame]:
    try:
        av: Any = importlib.import_module("av")
    except ImportError:
        raise TersorError(
            f"{path.name} needs the package av: pip install 'tersor[video]'; a folder of frames or a GIF needs none"
        ) from None
    regular_file(path)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > PIXELS:
                raise TersorError(f"{path} says its frames are {stream.width} x {stream.height} pixels")
            rate = float(stream.average_rate or config.rate)
            for number, frame in enumerate(itertools.islice(container.decode(stream), 0, None, config.stride)):
                seconds = number * config.stride / rate if frame.time is None else float(frame.time)
                yield seconds, _small(frame.to_image(), config.size)
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise TersorError(f"{path} cannot be decoded as a video: {first_words(error)}") from None


def _small(image: Any, size: int) -> Tensor:
    """(h, w, 3) of uint8, the shorter side `size`."""
    resized = image.resize(scaled(image.width, image.height, size), FILTERS.index("bilinear"))
    return torch.from_numpy(np.array(resized, np.uint8))


def windows(frames: Iterator[Frame], length: int) -> Iterator[tuple[list[float], Tensor]]:
    """The times and frames (length, h, w, 3) of clips that overlap by half, the last one up to the last frame. A shorter video
    stands still at its end. At most one clip is held."""
    held: collections.deque[Frame] = collections.deque(maxlen=length)
    hop, since = max(1, length // 2), 0
    full = False
    for frame in frames:
        if held and frame[1].shape != held[-1][1].shape:
            raise TersorError(f"the frame at {frame[0]:.2f} s has another size than those before it")
        held.append(frame)
        since += 1
        if len(held) == length and (not full or since == hop):
            full, since = True, 0
            yield _stacked(list(held))
    if held and (not full or since):
        yield _stacked([*held, *[held[-1]] * (length - len(held))])


def _stacked(frames: Sequence[Frame]) -> tuple[list[float], Tensor]:
    return [seconds for seconds, _ in frames], torch.stack([frame for _, frame in frames])


def normalised(frames: Tensor, config: VideoConfig) -> Tensor:
    """frames (T, h, w, 3) of uint8 -> clip (3, T, h, w)."""
    values = (frames.float() / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    return values.permute(3, 0, 1, 2).contiguous()


class Videos(Dataset[dict[str, Tensor]]):
    def __init__(
        self, files: Sequence[Path], labels: Sequence[int], classes: Sequence[str], config: VideoConfig, *, chance: bool
    ) -> None:
        self.files, self.labels, self.classes, self.config, self.chance = files, labels, tuple(classes), config, chance
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Cut other clips; the trainer calls it at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        config = self.config
        later, along = 0.5, 0.5
        if self.chance:
            generator = torch.Generator().manual_seed(mixed_seed(config.seed, self.epoch, index))
            later, along = torch.rand(2, generator=generator).tolist()
        frames = [frame for _, frame in frames_of(self.files[index], config)]
        if not frames:
            raise TersorError(f"{self.files[index]} holds no frames")
        start = int(later * (max(0, len(frames) - config.frames) + 1))
        chosen = frames[start : start + config.frames]
        clip = torch.stack(chosen + [chosen[-1]] * (config.frames - len(chosen)))
        top, left = (int(along * (side - config.size + 1)) for side in clip.shape[1:3])
        if min(clip.shape[1:3]) < config.size:
            raise TersorError(f"{self.files[index]} is over four times as long one way as the other; cut it first")
        square = clip[:, top : top + config.size, left : left + config.size]
        return {"clip": normalised(square, config), "target": torch.tensor(self.labels[index])}


def load_videos(path: Path, config: VideoConfig, *, chance: bool = True) -> Videos:
    """Raises TersorError where the folder has no subfolder with videos in it."""
    path = path.expanduser()
    with readable(path):
        folders = sorted(each for each in path.iterdir() if each.is_dir()) if path.is_dir() else []
        found = [(video, folder.name) for folder in folders for video in videos_in(folder)]
    if not found:
        raise TersorError(
            f"{path} holds no videos: one subfolder a class is expected, with {', '.join(sorted(SUFFIXES))} files or folders "
            "of frames in it"
        )
    classes = sorted({name for _, name in found})
    labels = [classes.index(name) for _, name in found]
    return Videos([video for video, _ in found], labels, classes, config, chance=chance)


def videos_in(folder: Path) -> list[Path]:
    """Video files, and folders whose pictures are one video, with all that is below and nothing hidden."""
    inside = [folder, *sorted(folder.rglob("*"))]
    shown = [each for each in inside if not any(part.startswith(".") for part in each.relative_to(folder).parts)]
    found = [each for each in shown if each.suffix.lower() in SUFFIXES and each.is_file()]
    return found + folders_of_pictures(folder)
