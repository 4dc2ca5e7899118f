"""Classification of point clouds: cross-entropy, labelled clouds and meshes in a folder, the likeliest classes of a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.data.clouds import SUFFIXES, CloudConfig, centred, load_clouds, read_cloud
from tersor.errors import TersorError
from tersor.models.config import checked_config
from tersor.progress import Progress, silent
from tersor.tasks.classify import Classes, check_classes, likeliest
from tersor.tasks.task import Sets, Task
from tersor.train.objectives import classification


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    config = checked_config(CloudConfig, {"points": points_of(model), **table}, "data")
    train = load_clouds(data, config)
    held_out = load_clouds(validation, dataclasses.replace(config, augment=False)) if validation else None
    notes = check_classes(model, train, held_out, data, validation)
    return Sets(train, held_out, labels=train.classes, notes=notes)


def points_of(model: Any) -> int:
    """How many points a model wants."""
    return int(model.example_inputs(1)["points"].shape[1])


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
    cloud = centred(read_cloud(path, points_of(module)))
    first = next(module.parameters())
    logits = module(cloud[None].to(first.device, first.dtype))
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise TersorError(f"{type(module).__name__} is no classifier of clouds: it gives no logits [clouds, classes]")
    return likeliest(path, logits[0], labels)


TASK = Task(classification, load_data, predict, SUFFIXES, normalises=False)
