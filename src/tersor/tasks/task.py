"""The contract of a task: its objective, its data, what is remembered of them, and how one input is predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from tersor.progress import Progress
from tersor.train.objectives import Objective


@dataclass(frozen=True)
class Sets:
    """Map-style data sets, and what predictions on new inputs will need to know of them.

    preprocessing: JSON that is written beside the weights as preprocessor_config.json. labels: the names of the classes.
    notes: what the user should know of the data.
    """

    train: Any
    validation: Any = None
    test: Any = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Prediction(Protocol):
    """What a model says of one input: as a line for people, and as plain values for programs."""

    def line(self) -> str: ...
    def as_dict(self) -> dict[str, Any]: ...


class Predict(Protocol):
    """One input file to a prediction. settings: the model's preprocessing; labels: its classes' names, by number; out: the
    folder for results that are files, None where the task writes none; reference: what the result is compared with."""

    def __call__(
        self,
        module: nn.Module,
        path: Path,
        *,
        settings: Mapping[str, Any],
        labels: Mapping[int, str],
        out: Path | None,
        reference: Path | None,
    ) -> Prediction: ...


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
    """A generating model, ready. folder: where it was read from; decoder: what makes a result of its latents, if anything."""

    folder: Path
    module: Any
    decoder: Any = None


def numbers_of(module: nn.Module) -> Tensor:
    """A tensor of the type and on the device that the module computes with; packed weights are passed over."""
    return next(each for each in module.parameters() if each.is_floating_point())


class Sample(Protocol):
    """Makes one result and writes it to order.out. progress(what, done, total)."""

    def __call__(self, generator: Generator, order: Order, progress: Progress) -> Prediction: ...


@dataclass(frozen=True)
class Task:
    """objective: what training lowers. load_data: (model, data, validation data or None, the table `data` of the command)
    -> Sets. predict: None where no verb shows predictions of this task yet. suffixes: of the files that it reads. marker: the
    file that makes a folder one input.
    writes: its results are files. compares: they can be compared with a reference. normalises: its images are resized and
    normalised as the model says; `size` is that of an official checkpoint, which says nothing (None: the architecture's).
    defaults: settings of the training that are the task's own, where the user does not say them.
    sample: None where models of this task make nothing of noise; makes: the endings of the files that it writes.
    evaluated_on: the option of `tersor eval` that holds what two models are compared on: text, sentences, images, data or graph
    (that of `data`); empty where they are not compared yet.
    """

    objective: Objective
    load_data: Callable[[Any, Path, Path | None, Mapping[str, Any]], Sets]
    predict: Predict | None = None
    suffixes: frozenset[str] = frozenset()
    marker: str = ""
    writes: bool = False
    compares: bool = False
    normalises: bool = True
    size: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sample: Sample | None = None
    makes: frozenset[str] = frozenset()
    evaluated_on: str = ""
