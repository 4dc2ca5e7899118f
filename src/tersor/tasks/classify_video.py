"""Classification of clips: cross-entropy, labelled videos in a folder, and what happens when in the user's video.

A video is looked at in clips that overlap by half. Each clip's likeliest class holds from halfway since the clip before to
halfway to the next; neighbours of one class are one event, whose probability is the mean of theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.data.videos import SUFFIXES, VideoConfig, Videos, frames_of, load_videos, normalised, videos_in, windows
from tersor.errors import TersorError
from tersor.models.config import checked_config
from tersor.progress import Progress, silent
from tersor.tasks.classify import captions, check_classes, likeliest
from tersor.tasks.sheet import levels
from tersor.tasks.task import Sets, Task, numbers_of
from tersor.train.objectives import classification


@dataclass(frozen=True)
class Event:
    start: float  # seconds
    end: float
    name: str
    probability: float


@dataclass(frozen=True)
class Events:
    """What happens when in a video."""

    path: Path
    events: tuple[Event, ...]

    def line(self) -> str:
        told = (f"{each.start:.2f}-{each.end:.2f} s {each.name} {100 * each.probability:.1f}%" for each in self.events)
        return f"{self.path}: {', '.join(told)}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "starts": [each.start for each in self.events],
            "ends": [each.end for each in self.events],
            "classes": [each.name for each in self.events],
            "probabilities": [each.probability for each in self.events],
        }


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    config = checked_config(VideoConfig, table, "data")
    train = load_videos(data, config)
    held_out = load_videos(validation, config, chance=False) if validation else None
    notes = check_classes(model, train, held_out, data, validation)
    kept = {name: getattr(config, name) for name in KEPT}
    return Sets(train, held_out, preprocessing=kept, labels=train.classes, notes=notes)


KEPT = ("frames", "stride", "size", "rate", "mean", "std")  # of the settings: what a prediction needs


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
) -> Events:
    config = checked_config(VideoConfig, {name: settings[name] for name in KEPT if name in settings}, "preprocessor")
    first = numbers_of(module)
    spans, names, shares = [], [], []
    for times, frames in windows(frames_of(path, config), config.frames):
        logits = module(normalised(frames, config)[None].to(first.device, first.dtype))
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise TersorError(f"{type(module).__name__} is no classifier of clips: it gives no logits [clips, classes]")
        best = likeliest(path, logits[0], labels)
        spans.append((times[0], times[-1]))
        names.append(best.names[0])
        shares.append(best.probabilities[0])
    if not spans:
        raise TersorError(f"{path} holds no frames")
    return Events(path, tuple(merged(spans, names, shares)))


def merged(spans: Sequence[tuple[float, float]], names: Sequence[str], shares: Sequence[float]) -> list[Event]:
    """The events of clips in the order of time."""
    middles = [(start + end) / 2 for start, end in spans]
    edges = [spans[0][0], *((a + b) / 2 for a, b in itertools.pairwise(middles)), spans[-1][1]]
    found = []
    for name, group in itertools.groupby(range(len(spans)), key=lambda n: names[n]):
        numbers = list(group)
        mean = sum(shares[n] for n in numbers) / len(numbers)
        found.append(Event(edges[numbers[0]], edges[numbers[-1] + 1], name, mean))
    return found


def panels(sample: Mapping[str, Tensor], logits: Tensor, sets: Sets) -> tuple[Any, str, str]:
    """Four frames of the clip, from left to right and down."""
    assert isinstance(sets.train, Videos)
    config, clip = sets.train.config, sample["clip"]
    places = torch.linspace(0, clip.shape[1] - 1, 4).long()
    std, mean = (torch.tensor(each).view(3, 1, 1, 1) for each in (config.std, config.mean))
    a, b, c, d = (clip[:, places] * std + mean).unbind(1)
    picture = torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1)
    return levels(picture), *captions(sample, logits, sets)


TASK = Task(classification, load_data, predict, SUFFIXES, inside=videos_in, kept=KEPT, normalises=False, panels=panels)
