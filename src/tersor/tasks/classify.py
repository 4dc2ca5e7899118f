"""Image classification: cross-entropy, labelled images in a folder or packed file, the likeliest classes of a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.preprocessing import preprocessor_config
from tersor.data.images import SUFFIXES, ImageConfig, Images, load_images
from tersor.errors import TersorError
from tersor.models.config import checked_config
from tersor.progress import Progress, silent
from tersor.tasks.sheet import shown
from tersor.tasks.task import Sets, Task
from tersor.train.objectives import classification

TOP = 5


@dataclass(frozen=True)
class Classes:
    """The likeliest classes of one file, the likeliest first."""

    path: Path
    names: tuple[str, ...]
    probabilities: tuple[float, ...]

    def line(self) -> str:
        told = (f"{name} {100 * share:.1f}%" for name, share in zip(self.names, self.probabilities, strict=True))
        return f"{self.path}: {', '.join(told)}"

    def as_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "classes": list(self.names), "probabilities": list(self.probabilities)}


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    example = model.example_inputs(1)
    if "image" not in example:
        raise TersorError(
            f"{type(model).system} classifies {', '.join(example)}, and `tersor train` reads images; "
            "in Python, tersor.train.trainer.train takes any data set"
        )
    config = checked_config(ImageConfig, {"size": example["image"].shape[-1], **table}, "data")
    train = load_images(data, config)
    held_out = load_images(validation, dataclasses.replace(config, augment=False)) if validation else None
    notes = check_classes(model, train, held_out, data, validation)
    preprocessing = preprocessor_config({"size": config.size, "mean": config.mean, "std": config.std})
    return Sets(train, held_out, preprocessing=preprocessing, labels=train.classes, notes=notes)


def check_classes(model: Any, train: Any, held_out: Any, data: Path, validation: Path | None) -> tuple[str, ...]:
    """Raise TersorError where two sets of labelled files have unlike classes, or more than the model has, or where there is
    one class only. Returns a note where the model has more."""
    if len(set(train.labels)) < 2:
        raise TersorError(f"{data} has one class, {train.classes[train.labels[0]]}; a classifier needs two or more")
    if held_out is not None and held_out.classes != train.classes:
        other = sorted(set(held_out.classes) ^ set(train.classes))
        raise TersorError(f"{data} and {validation} do not have the same classes: {other[0]} is in one of them")
    room = model.config.num_classes
    if len(train.classes) > room:
        raise TersorError(
            f"{data} has {len(train.classes)} classes, the model has num_classes {room}; "
            f"--set model.num_classes={len(train.classes)}"
        )
    if len(train.classes) == room:
        return ()
    return (
        f"{data} has {len(train.classes)} classes, the model {room}, so {room - len(train.classes)} stay without a name: "
        f"--set model.num_classes={len(train.classes)} gives it a head for those that there are",
    )


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
) -> Classes:
    image = Images([path], [0], [""], ImageConfig(**settings))[0]["image"][None]
    first = next(module.parameters())
    output = module(image.to(first.device, first.dtype))
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise TersorError(f"{type(module).__name__} is no image classifier: it gives no logits [images, classes]")
    return likeliest(path, logits[0], labels)


def likeliest(path: Path, logits: Tensor, labels: Mapping[int, str]) -> Classes:
    """logits (classes,)."""
    shares, classes = logits.float().softmax(0).topk(min(TOP, len(logits)))
    names = (labels.get(number, f"class {number}") for number in classes.tolist())
    return Classes(path, tuple(names), tuple(shares.tolist()))


def panels(sample: Mapping[str, Tensor], logits: Tensor, sets: Sets) -> tuple[Any, str, str]:
    return shown(sample["image"], sets.preprocessing), *captions(sample, logits, sets)


def captions(sample: Mapping[str, Tensor], logits: Tensor, sets: Sets) -> tuple[str, str]:
    """The class of a sample, and the likeliest ones by its logits [classes], for people."""
    named, truth = dict(enumerate(sets.labels)), int(sample["target"])
    found = likeliest(Path(), logits, named)
    told = (f"{name} {100 * share:.1f}%" for name, share in zip(found.names, found.probabilities, strict=True))
    return named.get(truth, f"class {truth}"), ", ".join(told)


TASK = Task(classification, load_data, predict, frozenset(SUFFIXES), panels=panels, evaluated_on="images")
