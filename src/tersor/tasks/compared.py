"""What two models of one kind are compared on: a text, sentences, images, a table or a graph, by their task.

how = compared_on("demo-4bit", "demo")                 # "text"
measure = measure_of("demo", module, how, inputs)      # for `tersor attribute`
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor import models
from tersor.checkpoint.load import has_tokenizer, load_tokenizer
from tersor.checkpoint.source import Checkpoint, Openable, open_checkpoint
from tersor.data.series_memory import ScaledTable, scaled
from tersor.data.tables import SeriesTable, TableConfig, read_series
from tersor.errors import TersorError
from tersor.evaluate.accuracy import read_images
from tersor.evaluate.measures import Measure, image_measure, key_of, mean_square, text_measure
from tersor.tasks import task_of
from tersor.tasks.forecast_table import as_trained
from tersor.tasks.forecaster import Forecaster, model_forecaster, open_forecaster
from tersor.tasks.origins import Origin, check_rows, windows_at

WINDOWS = 8  # of a text, where the user does not say
FORECASTS = 64  # windows of a table
NEEDED = {"images": ("images", "--images DIR"), "data": ("data", "--data TABLE"), "graph": ("data", "--data GRAPH")}


@dataclass(frozen=True)
class Inputs:
    """What the user gave."""

    text: tuple[str | Path, ...] = ("builtin",)
    images: Path | None = None
    data: Path | None = None
    seq_len: int = 1024
    most: int | None = None  # windows or images at most; None: the default of the kind


def compared_on(model: Openable, against: Openable) -> str:
    """text, sentences, images, data or graph. Raises TersorError where the kinds are unlike, or one is not compared."""
    mine, theirs = (_kind(open_checkpoint(each), str(each)) for each in (model, against))
    if mine != theirs:
        raise TersorError(
            f"{model} is compared on {mine}, {against} on {theirs}: --against is the model that was compressed"
        )
    return mine


def check_inputs(how: str, inputs: Inputs) -> None:
    """Raise TersorError where the user gave no input for this kind of model, or one for another kind."""
    given = {name for name in ("images", "data") if getattr(inputs, name) is not None}
    name, option = NEEDED.get(how, ("", ""))
    if name and name not in given:
        raise TersorError(f"such models are compared on {how}: give {option}")
    for other in sorted(given - {name}):
        raise TersorError(f"--{other} does nothing for models that are compared on {how}; leave it out")
    if how in NEEDED and inputs.text != ("builtin",):
        raise TersorError(f"--text does nothing for models that are compared on {how}; leave it out")


def check_evaluated_on(checkpoint: Checkpoint, images: Path | None) -> None:
    """Raise TersorError where a language model is given images, or a classifier of images none."""
    architecture = str(checkpoint.config.get("architectures"))
    if images is not None and re.search("CausalLM|LMHead", architecture):
        raise TersorError(
            f"{checkpoint} is a language model, for which --images does nothing: leave it out, or give --text"
        )
    said = checkpoint.config.get("tersor_model")
    info = models.find(said) if isinstance(said, str) else None
    classifies = (
        info is not None and (info.task, info.input) == ("classify", "image")
    ) or "architecture" in checkpoint.config
    if images is None and (classifies or "ForImageClassification" in architecture):
        raise TersorError(
            f"{checkpoint} classifies images: give {NEEDED['images'][1]}, a folder with one subfolder a class"
        )


def _kind(checkpoint: Checkpoint, name: str) -> str:
    said = checkpoint.config.get("tersor_model")
    if isinstance(said, str):
        info = models.find(said)
        found = task_of(info.task, info.input).evaluated_on
        if not found:
            raise TersorError(f"{name} is a model for the task {info.task!r}, of which no two are compared yet")
        return found
    architectures = checkpoint.config.get("architectures") or [""]
    kind = str(architectures[0]) if isinstance(architectures, list) else ""
    if kind.endswith("ForImageClassification") or "architecture" in checkpoint.config:
        return "images"
    tokenized = has_tokenizer(checkpoint.directory)
    encodes = kind.endswith("Model") and not kind.endswith("LMHeadModel")
    return "sentences" if encodes and tokenized and checkpoint.gguf is None else "text"


def measure_of(base: Openable, module: nn.Module, how: str, inputs: Inputs) -> Measure:
    """Measures how far models are from `module`, which was loaded from `base`, on what the user gave. Raises TersorError where it
    does not fit the model."""
    if inputs.most is not None and inputs.most < 1:
        raise TersorError(f"{inputs.most} samples at most leave nothing to measure on; use at least 1")
    if how == "images":
        assert inputs.images is not None
        return image_measure(read_images(base, inputs.images, limit=inputs.most)[0], str(inputs.images))
    if how == "data":
        assert inputs.data is not None
        return table_measure(base, inputs.data, most=inputs.most or FORECASTS)
    tokenizer = load_tokenizer(open_checkpoint(base).directory)
    most = inputs.most or WINDOWS
    return text_measure(module, inputs.text, tokenizer=tokenizer, seq_len=inputs.seq_len, max_windows=most)


@dataclass(frozen=True)
class TableWindows:
    """Windows of a table in a forecaster's own units."""

    opened: Forecaster
    scaled: ScaledTable
    origins: list[Origin]
    horizon: int

    def forecasts(self, module: nn.Module) -> Tensor:
        """(windows, horizon, N)"""
        forecaster = model_forecaster(module, self.opened.name, self.opened.memory)
        x, last = windows_at(self.scaled, self.origins, self.opened.look_back)
        return forecaster(x, last, self.scaled.table.step, self.horizon)

    def truth(self) -> Tensor:
        return torch.stack([self.scaled.values[s][row : row + self.horizon] for s, row in self.origins])


def table_windows(base: Openable, data: Path, *, most: int) -> TableWindows:
    """The last windows of every series, one after another without overlap, at most `most` in all."""
    if most < 1:
        raise TersorError(f"{most} windows at most leave nothing to measure on; use at least 1")
    opened = open_forecaster(base)
    table: SeriesTable = read_series(data, as_trained(opened, TableConfig()))
    horizon = opened.trained or 1
    try:
        prepared = scaled(table, opened.memory)
        needed = opened.look_back + horizon
        check_rows(prepared, needed, f"a look-back of {opened.look_back} and one window of {horizon}")
    except TersorError as error:
        raise TersorError(f"{data}: {error}") from None
    ends = [(s, len(values)) for s, values in enumerate(prepared.values)]
    counts = [(end - opened.look_back) // horizon for _, end in ends]
    each = max(1, most // len(ends))
    origins = [
        (s, end - horizon * n)
        for (s, end), count in zip(ends, counts, strict=True)
        for n in range(1, min(count, each) + 1)
    ]
    return TableWindows(opened, prepared, origins[:most], horizon)


def table_measure(base: Openable, data: Path, *, most: int) -> Measure:
    windows = table_windows(base, data, most=most)
    inputs, _ = windows_at(windows.scaled, windows.origins, windows.opened.look_back)
    told = f"{len(windows.origins)} windows of {windows.horizon} rows of {data}"
    return Measure("MSE", told, key_of(inputs), (windows.forecasts,), mean_square)
