"""Results out of noise: which model is meant, and one file made by it."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from tersor import models
from tersor.checkpoint.load import load
from tersor.checkpoint.source import resolve
from tersor.devices import pick_device
from tersor.errors import TersorError
from tersor.progress import Progress, silent
from tersor.tasks import Prediction, Task, task_named, tasks
from tersor.tasks.task import Generator, Order
from tersor.untrusted import check_seed, read_json_object, readable

# Class names in diffusers' config.json -> our models.
PUBLISHED = {"TripoSGDiTModel": "triposg", "TripoSGVAEModel": "triposg_vae"}
GENERATOR, DECODER = "transformer", "vae"  # diffusers' names of a pipeline's folders


def sample(model: str, order: Order, *, device: str = "auto", progress: Progress = silent) -> Prediction:
    """Makes order.out. model: a directory with config.json, or with the folders transformer/ and vae/ of a pipeline.

    What the options and the configs alone decide is refused before the weights are read. Raises TersorError.
    """
    folder = resolve(model)
    parts = [folder / GENERATOR, folder / DECODER] if (folder / GENERATOR / "config.json").is_file() else [folder]
    task = _task_of(parts[0])
    _check(order, task)
    loaded = [_part(part, device) for part in parts if part.exists()]
    generator = Generator(folder, *loaded)
    assert task.sample is not None
    return task.sample(generator, order, progress)


def _task_of(part: Path) -> Task:
    file = part / "config.json"
    if not file.is_file():
        raise TersorError(f"{part} is not a model: it has no config.json, and no folder {GENERATOR}")
    name = _name_of(read_json_object(file))
    if name is None:
        raise TersorError(f"{file} names no model of tersor's; `tersor sample` makes results with {_samplers()}")
    task = models.find(name).task
    found = task_named(task) if task in tasks() else None
    if found is None or found.sample is None:
        raise TersorError(f"{part} is {name}, which makes nothing of noise; `tersor sample` works with {_samplers()}")
    return found


def _name_of(config: dict[str, object]) -> str | None:
    name = config.get("tersor_model") or PUBLISHED.get(str(config.get("_class_name")))
    return None if name is None else str(name)


def _samplers() -> str:
    able = {name for name in tasks() if task_named(name).sample is not None}
    return ", ".join(sorted({info.system for info in models.list() if info.task in able}))


def _check(order: Order, task: Task) -> None:
    check_seed(order.seed)
    if order.out.suffix.lower() not in task.makes:
        raise TersorError(f"--out {order.out}: this model makes files that end in {', '.join(sorted(task.makes))}")
    with readable(order.out):
        if order.out.is_dir():
            raise TersorError(f"--out {order.out} is a folder; give the file to write")
        if not order.out.parent.is_dir():
            raise TersorError(f"--out {order.out}: there is no folder {order.out.parent}")
        if order.condition is not None and not order.condition.is_file():
            raise TersorError(f"there is no file {order.condition} for --condition")
    if order.guidance is not None and not 0 <= order.guidance < math.inf:
        raise TersorError(f"--guidance {order.guidance} must be a number of at least 0")
    if order.steps is not None and order.steps < 1:
        raise TersorError(f"--steps {order.steps} must be positive")


def _part(part: Path, device: str) -> nn.Module:
    config = read_json_object(part / "config.json")
    published = PUBLISHED.get(str(config.get("_class_name")))
    if published is None:
        return load(part, device=device).eval()
    options = models.options_of(published, config)
    return models.load(options.pop("tersor_model"), part, **options).to(pick_device(device)).eval()
