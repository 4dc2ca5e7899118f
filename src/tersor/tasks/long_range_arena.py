"""`tersor train lra/TASK --model NAME`: any sequence model of tersor on a task of the Long Range Arena.

The form of the sequences follows from the model: numbers where it takes numbers and the task has pixels, tokens where it has
a vocabulary, one-hot rows where it takes numbers alone. Its config gets the task's
vocabulary, number of classes and length; larger ones may be set. A model that gives logits at every position, such as a
language model, answers at <eos>, where its first tokens are the classes; other models average over the sequence themselves.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersor import models
from tersor.data.denoising import DenoisingConfig
from tersor.data.long_range import (
    Benchmark,
    LongRange,
    LongRangeConfig,
    Members,
    find_benchmark,
    load_long_range,
    sequence_length,
)
from tersor.errors import TersorError
from tersor.models.config import checked_config
from tersor.tasks.task import Sets

PREFIX = "lra/"
# What a model's config calls the same thing; of each row a config has one at most.
VOCABULARY = ("vocab", "vocab_size", "num_tokens")
CHANNELS = ("d_input", "in_channels", "d_in")
CLASSES = ("d_output", "num_classes", "d_out")
LENGTH = ("l_max", "max_len", "maxlen", "seq_len", "max_seq_len")

Build = Callable[[str, dict[str, Any]], nn.Module]  # (name, overrides of its config) -> model


@dataclass(frozen=True)
class Run:
    """A model and its data."""

    model: nn.Module
    sets: Sets  # the data in the model's form
    holes: DenoisingConfig  # how the model is pretrained
    alone: Any  # the sequences one by one, to pretrain on


def prepare(
    task: str,
    name: str,
    path: Path | None,
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    pretrain: Mapping[str, Any],
    build: Build = lambda name, overrides: models.create(name, **overrides),
) -> Run:
    """task: without the "lra/". model, data, pretrain: the tables of the command, that of `pretrain` in the fields of
    DenoisingConfig. Raises TersorError where the model cannot take the task."""
    benchmark = find_benchmark(task)
    config = checked_config(LongRangeConfig, data, "data")
    argument, form = _form(name, benchmark)
    length = sequence_length(benchmark, form, config.length)
    sizes = _sizes(name, benchmark, form, length)
    for field, least in sizes.items():
        given = model.get(field, least)
        fits = given >= least if type(given) is type(least) is int and field not in CHANNELS else given == least
        if not fits:
            raise TersorError(f"lra/{task} needs {field} {least} of {name}, not {given}; leave model.{field} out")
    net = build(name, {**sizes, **model})
    raw = load_long_range(task, path, config)
    train, validation, test = (
        LongRange(each, benchmark, form=form, name=argument, length=config.length)
        for each in (raw.train, raw.validation, raw.test)
    )
    told = {"long_range_arena": task, "form": form, "length": length}
    causal = models.find(name).task == "language-model" or bool(getattr(net.config, "causal", False))
    published = {
        "ratio": benchmark.hidden,
        "pixel_classes": benchmark.grey_classes and form == "numbers",
        "objective": "causal" if causal else "masked",
    }
    holes = checked_config(DenoisingConfig, {**published, **pretrain}, "pretrain")
    return Run(
        net, Sets(train, validation, test, preprocessing=told), holes, Members(train) if benchmark.pairs else train
    )


def takers(task: str) -> list[str]:
    """The names of the systems that can take the task."""
    benchmark = find_benchmark(task)
    found = []
    for system in sorted({info.system for info in models.list()}):
        try:
            _form(system, benchmark)
        except (TersorError, ImportError):
            continue
        found.append(system)
    return found


def _form(name: str, benchmark: Benchmark) -> tuple[str, str]:
    """The argument of forward that takes the sequences, and their form."""
    info = models.find(name)
    fields, required = _fields(name), _required(info.load_class().forward)
    argument = next(iter(required), "")
    if benchmark.pairs and "retrieval" not in fields:
        raise TersorError(f"{name} compares no pairs of sequences, as lra/retrieval asks; spt and s4 do")
    if argument == "input_ids" and len(required) == 1 and _one(fields, VOCABULARY):
        return argument, "tokens"
    if argument == "x" and len(required) == 1 and _one(fields, CHANNELS) and _one(fields, CLASSES):
        if benchmark.pixels:
            return argument, "numbers"
        return argument, "tokens" if _one(fields, VOCABULARY) else "one-hot"
    takes = ", ".join(required)
    raise TersorError(f"{name} ({info.task}) takes {takes}; the Long Range Arena has sequences of tokens or numbers")


def _sizes(name: str, benchmark: Benchmark, form: str, length: int) -> dict[str, Any]:
    """The fields of the model's config that follow from the task."""
    fields = _fields(name)
    wanted: list[tuple[tuple[str, ...], Any]] = [(CLASSES, benchmark.classes), (LENGTH, length)]
    if form == "tokens":
        wanted.append((VOCABULARY, benchmark.vocabulary))
    else:
        wanted.append((CHANNELS, 1 if form == "numbers" else benchmark.vocabulary))
        wanted.append((("vocab",), None))  # of models that take either
    found = {_one(fields, names): value for names, value in wanted}
    if benchmark.pairs:
        found["retrieval"] = True
    return {field: value for field, value in found.items() if field}


def _fields(name: str) -> set[str]:
    config_class = typing.get_type_hints(models.find(name).load_class().__init__)["config"]
    return {each.name for each in dataclasses.fields(config_class)}


def _one(fields: set[str], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in fields), "")


def _required(forward: Any) -> list[str]:
    """Arguments without a default."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return [each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
