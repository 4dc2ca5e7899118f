"""The contract of a task: its objective, its data, what is remembered of them, and how one input is predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from tersor.progress import Progress, silent
from tersor.train.objectives import Objective


@dataclass(frozen=True)
class Sets:
    """Map-style data sets, and what predictions on new inputs need to know of them."""

    train: Any
    validation: Any = None
    test: Any = None
    preprocessing: Mapping[str, Any] = field(
        default_factory=dict
    )  # JSON, written beside the weights as preprocessor_config.json
    labels: tuple[str, ...] = ()  # the names of the classes
    notes: tuple[str, ...] = ()  # what the user should know of the data


class Prediction(Protocol):
    """What a model says of one input: as a line for people, and as plain values for programs."""

    def line(self) -> str: ...
    def as_dict(self) -> dict[str, Any]: ...


class Predict(Protocol):
    """Predicts for one input file.

    settings: the model's preprocessing. labels: its classes' names, by number. out: the folder for results that are files; None
    where the task writes none. reference: what the result is compared with. progress: of a file that takes its time.
    """

    def __call__(
        self,
        module: nn.Module,
        path: Path,
        *,
        settings: Mapping[str, Any],
        labels: Mapping[int, str],
        out: Path | None,
        reference: Path | None,
        progress: Progress = silent,
    ) -> Prediction: ...


class Together(Protocol):
    """Predicts for files, or folders of files, that show one thing, and writes what it finds to the folder `out`."""

    def __call__(self, module: nn.Module, paths: Sequence[Path], *, out: Path) -> Prediction: ...


def name_of(path: Path) -> str:
    """Of the results for an input."""
    return path.resolve().name if path.is_dir() else path.stem


@dataclass(frozen=True)
class Order:
    """What `tersor sample` was asked for; None where an option was not given."""

    out: Path  # the file to write
    seed: int
    prompt: str | None = None
    condition: Path | None = None
    steps: int | None = None
    guidance: float | None = None
    resolution: int | None = None


@dataclass(frozen=True)
class Generator:
    """A generating model, ready."""

    folder: Path  # where it was read from
    module: Any
    decoder: Any = None  # makes a result of the model's latents; None where it makes results itself


def numbers_of(module: nn.Module) -> Tensor:
    """A tensor of the type and on the device that the module computes with; packed weights are passed over."""
    return next(each for each in module.parameters() if each.is_floating_point())


class Sample(Protocol):
    """Makes one result and writes it to order.out. progress(what, done, total)."""

    def __call__(self, generator: Generator, order: Order, progress: Progress) -> Prediction: ...


@dataclass(frozen=True)
class Task:
    """What tersor knows of a task: how models of it are trained, shown and compared."""

    objective: Objective  # what training lowers
    # of (model, data, validation data or None, the table `data` of the command)
    load_data: Callable[[Any, Path, Path | None, Mapping[str, Any]], Sets]
    predict: Predict | None = None  # None where no verb shows predictions of this task yet
    suffixes: frozenset[str] = frozenset()  # of the files that it reads
    inside: Callable[[Path], Sequence[Path]] | None = None  # the inputs in a folder, where they are not files alone
    together: Together | None = None  # files that are named are one input; None: each is one
    marker: str = ""  # the name of a file that makes a folder one input
    writes: tuple[str, ...] = ()  # ends of its results' names after the input's, as patterns; none: they are no files
    compares: bool = False  # whether results can be compared with a reference
    kept: tuple[str, ...] = ()  # settings of the data that are saved with a model, and hold when it is trained further
    normalises: bool = True  # whether images are resized and normalised as the model says
    size: int | None = None  # of images for an official checkpoint, which says none; None: the architecture's
    defaults: Mapping[str, Any] = field(default_factory=dict)  # settings of the training, where the user gives none
    sample: Sample | None = None  # None where models of this task make nothing of noise
    makes: frozenset[str] = frozenset()  # the endings of the files that `sample` writes
    # of (sample, what the model gives for it, the sets): input, truth and prediction, as pictures or words, for the sheet that
    # `tersor train` leaves; None where a sample is no picture
    panels: Callable[[Mapping[str, Tensor], Any, Sets], Sequence[Any]] | None = None
    evaluated_on: str = ""  # text, sentences, images, data or graph, for `eval --against`; empty: not compared yet
