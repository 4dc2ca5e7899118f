"""Predictions for the user's own files: which task a model has, which files are meant, one prediction after another."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersor import models
from tersor.checkpoint.load import load
from tersor.checkpoint.preprocessing import class_names, image_settings, saved_settings
from tersor.checkpoint.source import open_checkpoint
from tersor.devices import pick_device
from tersor.errors import TersorError
from tersor.progress import Progress, silent
from tersor.tasks import Prediction, Task, task_of
from tersor.tasks.task import name_of
from tersor.untrusted import readable

# The end of a transformers class's name -> our task, for those that `tersor predict` shows.
TASK_OF_CLASS = {"ForImageClassification": "classify"}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Predictor:
    """A model that is ready for files."""

    module: nn.Module
    task: Task
    settings: Mapping[str, Any]  # how it wants its inputs
    labels: Mapping[int, str]  # the names of its classes, where it says any

    out: Path | None = None  # the folder for results that are files
    reference: Path | None = None  # what they are compared with: a file, or a folder with files of the inputs' names

    def __call__(self, path: Path, *others: Path, progress: Progress = silent) -> Prediction:
        """others: further files of the same input. progress: of this input."""
        assert self.task.predict is not None
        if others:
            assert self.task.together is not None
            assert self.out is not None
            return self.task.together(self.module, (path, *others), out=self.out)
        return self.task.predict(
            self.module,
            path,
            settings=self.settings,
            labels=self.labels,
            out=self.out,
            reference=None if self.reference is None else _reference_of(path, self.reference),
            progress=progress,
        )


def open_predictor(
    model: str,
    *,
    checkpoint: Path | None = None,
    device: str = "auto",
    out: Path | None = None,
    reference: Path | None = None,
) -> Predictor:
    """model: a directory, a hub name or a built-in, or with `checkpoint` an architecture whose official weights these are.

    An official file does not say how it wants its images: they get the size of the task or architecture, and ImageNet's
    mean and standard deviation. Raises TersorError where the model's task shows no predictions, or has no such options.
    """
    if checkpoint is not None:
        info = models.find(model)
        task = _shown(info.task, info.input, out, reference)
        module = models.load(model, checkpoint).to(pick_device(device)).eval()
        settings: dict[str, Any] = {}
        if task.normalises:
            size = task.size or module.example_inputs(1)["image"].shape[-1]  # type: ignore[operator]
            settings = {"size": size, **IMAGENET}
        return Predictor(module, task, settings, {}, out, reference)
    opened = open_checkpoint(model)
    name, input = _task_of(opened.config)
    task = _shown(name, input, out, reference)
    if name == "classify" and opened.config.get("num_classes") == 0:
        raise TersorError(f"{model} has no head (num_classes is 0): it gives features, and no classes")
    settings = image_settings(opened) if task.normalises else saved_settings(opened)
    labels = dict(enumerate(class_names(opened) or [])) or labels_of(opened.config)
    return Predictor(load(opened, device=device).eval(), task, settings, labels, out, reference)


def input_files(
    inputs: Sequence[str],
    suffixes: frozenset[str],
    marker: str = "",
    inside: Callable[[Path], Sequence[Path]] | None = None,
) -> list[Path]:
    """The files that are meant: files as they are, folders by what they hold, patterns by what they match.

    A folder that holds a file called `marker` is one input. inside: finds the inputs in a folder, where it is given.

    Hidden files and folders are passed over. Raises TersorError where an input gives no file.
    """
    found: list[Path] = []
    for text in inputs:
        path = Path(text).expanduser()
        if marker and (path / marker).is_file():
            files = [path]
        elif path.is_dir():
            if inside is None:
                below = [each for each in sorted(path.rglob("*")) if not _is_hidden(each.relative_to(path))]
                files = [each for each in below if each.suffix.lower() in suffixes and each.is_file()]
            else:
                files = list(inside(path))
            if not files:
                raise TersorError(f"{path} holds no file that ends in {', '.join(sorted(suffixes))}")
        elif path.exists():
            files = [path]
        else:
            files = [Path(each) for each in sorted(glob.glob(str(path), recursive=True)) if Path(each).is_file()]
            if not files:
                raise TersorError(f"there is no file {text}")
        found += files
    return list(dict.fromkeys(found))


def grouped(files: Sequence[Path], task: Task) -> list[tuple[Path, ...]]:
    """The files of each input. Where the task takes files together, those that are no folders are one input, the first."""
    if task.together is None:
        return [(each,) for each in files]
    named = tuple(each for each in files if not each.is_dir())
    return [named] * bool(named) + [(each,) for each in files if each.is_dir()]


def results_of(predictor: Predictor, inputs: Sequence[tuple[Path, ...]]) -> list[Path]:
    """The results for these inputs that lie in the predictor's folder already."""
    if predictor.out is None:
        return []
    with readable(predictor.out):
        return [
            found
            for first, *_ in inputs
            for ending in predictor.task.writes
            for found in sorted(predictor.out.glob(glob.escape(name_of(first)) + ending))
        ]


def predictions(
    predictor: Predictor, inputs: Sequence[tuple[Path, ...]], progress: Progress = silent
) -> Iterator[tuple[Path, Prediction | TersorError]]:
    """Yields the first file of each input with its prediction, or with the error where one cannot be read. Raises TersorError
    where the results of two inputs would have one name, or several would be compared with one file. progress: of one input."""
    files = [first for first, *_ in inputs]
    if len(files) > 1 and predictor.reference is not None and not predictor.reference.is_dir():
        raise TersorError(
            f"{len(files)} files are not compared with one, {predictor.reference}; --reference takes a folder"
        )
    if predictor.out is not None:
        first: dict[str, Path] = {}
        for path in files:
            if (other := first.setdefault(name_of(path), path)) != path:
                raise TersorError(
                    f"{other} and {path} have one name, {name_of(path)}, and so would their results; rename one"
                )
        with readable(predictor.out):
            predictor.out.mkdir(parents=True, exist_ok=True)
    for path, *others in inputs:
        try:
            yield path, predictor(path, *others, progress=progress)
        except TersorError as error:
            yield path, error


def _shown(name: str, input: str, out: Path | None, reference: Path | None) -> Task:
    """The task, where it shows predictions and has these options."""
    task = task_of(name, input)
    if task.predict is None:
        raise TersorError(f"`tersor predict` does not show models of the task {name!r}")
    if task.writes and out is None:
        raise TersorError(f"the results of the task {name!r} are files; --out DIR says where to write them")
    if out is not None and not task.writes:
        raise TersorError(
            f"the task {name!r} writes no files; leave --out out (--json and --csv print the predictions)"
        )
    if reference is not None and not task.compares:
        raise TersorError(f"the task {name!r} compares nothing with a reference; leave --reference out")
    if reference is not None and not reference.exists():
        raise TersorError(f"there is no reference at {reference}")
    return task


def _reference_of(path: Path, reference: Path) -> Path:
    """The file itself, or the one in the folder that has the input's name, whatever it ends in."""
    if not reference.is_dir():
        return reference
    found = sorted(each for each in reference.iterdir() if each.stem == path.stem and each.is_file())
    if len(found) != 1:
        raise TersorError(
            f"{reference} holds {len(found)} files named {path.stem}; one is needed to compare {path} with"
        )
    return found[0]


def _task_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """The task and its kind of input."""
    for key in ("tersor_model", "architecture"):  # ours, or timm's
        if key in config:
            info = models.find(str(config[key]))
            return info.task, info.input
    names = [str(name) for name in config.get("architectures") or []]
    for name in names:
        for end, task in TASK_OF_CLASS.items():
            if name.endswith(end):
                return task, "image"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise TersorError("this is a language model: `tersor generate` continues a prompt")
    raise TersorError(f"`tersor predict` does not know what {', '.join(names) or 'this model'} is for")


def labels_of(config: Mapping[str, Any]) -> dict[int, str]:
    """transformers' `id2label`, or timm's `label_names`."""
    named = config.get("id2label") or dict(enumerate(config.get("label_names") or []))
    return {int(number): str(name) for number, name in named.items()}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
