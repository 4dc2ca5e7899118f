"""What a model is asked to do while it is measured: predict a text, name pictures, or forecast a table's last windows.

    scores of a text      the mean negative log-likelihood of each window's tokens, in nats
    scores of pictures    0 where the class is the label, else 1
    scores of a table     the mean squared error of each window, in standard deviations of what the model learned from

and the loss of another model on the same data is exp(mean difference) - 1 of texts, the mean difference of pictures (a share of
them), and mean / mean - 1 of tables. Windows and pictures are paired, so that their spread gives the interval.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor import models
from tersor.checkpoint.load import load, load_tokenizer
from tersor.checkpoint.positions import positions_of
from tersor.checkpoint.source import Checkpoint, resolve
from tersor.data.series_memory import scaled
from tersor.data.tables import TableConfig, read_series
from tersor.data.text import read_text, tokenized
from tersor.devices import peak_memory, pick_device
from tersor.errors import TersorError
from tersor.evaluate.accuracy import read_images
from tersor.evaluate.interval import half_width
from tersor.evaluate.measures import class_logits
from tersor.evaluate.perplexity import causal_windows, logits_of, tokens_of
from tersor.runtime.bench import prompt_for, take_turn
from tersor.runtime.generate import load_module, make_engine
from tersor.tasks.forecast_table import as_trained
from tersor.tasks.forecaster import open_forecaster
from tersor.tasks.origins import errors_at, windows_at

KINDS = {"text": "--text", "image": "--images", "series": "--data"}
PROMPT, NEW = 64, 24  # tokens
WARM_UP = 2


@dataclass(frozen=True)
class Workload:
    """What a model does while it is measured."""

    kind: str  # of KINDS
    files: tuple[str, ...]  # texts, one folder or .npz of labelled pictures, or one table; none: the built-in text
    units: int  # windows or pictures that are evaluated
    length: int  # tokens a window
    turns: int  # that are timed
    device: str


def kind_of(checkpoint: Checkpoint, name: str) -> str:
    """Raises TersorError where it is a model that cannot be advised on."""
    said = checkpoint.config.get("tersor_model") or checkpoint.config.get("architecture")
    if isinstance(said, str) and "architectures" not in checkpoint.config:
        info = models.find(said)
        known = {("classify", "image"): "image", ("forecast", "series"): "series", ("language-model", "tokens"): "text"}
        if (info.task, info.input) in known:
            return known[info.task, info.input]
        what = f"{said}, for the task {info.task}"
    else:
        what = (checkpoint.config.get("architectures") or ["without an architecture"])[0]
        if what.endswith(("CausalLM", "LMHeadModel")):
            return "text"
        if what.endswith("ForImageClassification"):
            return "image"
    raise TersorError(f"{name} is {what}: advice is for causal language models, image classifiers and forecasters")


@dataclass(frozen=True)
class Run:
    """What one run showed."""

    memory: int  # bytes: the most that the process (or the GPU) held while it ran
    seconds: list[float]  # of each turn
    scores: list[float]  # see the module's docstring
    answers: list[int]  # the classes of pictures


@torch.no_grad()
def run(model: str | Path, work: Workload) -> Run:
    """Load a model, run it, and evaluate it. Memory is that of running, before the evaluation."""
    start, evaluate = {"text": _text, "image": _pictures, "series": _table}[work.kind](model, work)
    turn = start()
    for _ in range(WARM_UP):
        turn()
    seconds = [turn() for _ in range(work.turns)]
    memory = peak_memory(pick_device(work.device))
    del turn
    scores, answers = evaluate()
    if not all(math.isfinite(each) for each in scores):
        raise TersorError("its results are no finite numbers")
    return Run(memory, seconds, scores, answers)


Start = Callable[[], Callable[[], float]]
Evaluate = Callable[[], tuple[list[float], list[int]]]


def _text(model: str | Path, work: Workload) -> tuple[Start, Evaluate]:
    def start() -> Callable[[], float]:
        module: Any = load_module(model, device=work.device)
        engine = make_engine(module, capacity=PROMPT + NEW, take_over=True)
        ids = prompt_for(module, batch=1, tokens=PROMPT)
        return lambda: take_turn(engine, ids, NEW).decode / (NEW - 1)

    def evaluate() -> tuple[list[float], list[int]]:
        tokenizer = load_tokenizer(resolve(model))
        module = load(model, device=work.device)
        if tokenizer is None:
            raise TersorError("the model has no tokenizer, so it cannot be evaluated on a text")
        if work.files:
            ids = tokenized(tokenizer, "\n\n".join(read_text(each) for each in work.files))
        else:
            ids = tokens_of("builtin", tokenizer)
        length = min(work.length, positions_of(module) or work.length)
        where = next(module.parameters()).device
        scores = []
        for window in causal_windows(module, ids, seq_len=length, max_windows=work.units, tokenizer=tokenizer):
            inputs = window[None].to(where)
            found = logits_of(module, inputs)[0, :-1].float()
            scores.append(float(nn.functional.cross_entropy(found, inputs[0, 1:])))
        return scores, []

    return start, evaluate


def _pictures(model: str | Path, work: Workload) -> tuple[Start, Evaluate]:
    pixels, labels = read_images(model, work.files[0], limit=work.units)
    if len(pixels) == 0:
        raise TersorError(f"{work.files[0]} holds no images")
    module = load(model, device=work.device).eval()
    first = next(each for each in module.parameters() if each.is_floating_point())

    def classes(images: torch.Tensor) -> torch.Tensor:
        return class_logits(module, images.to(first.device, first.dtype)).argmax(-1).cpu()

    def evaluate() -> tuple[list[float], list[int]]:
        answers = torch.cat([classes(part) for part in torch.split(pixels, 50)])
        return (answers != labels).double().tolist(), answers.tolist()

    return lambda: _timed(lambda: classes(pixels[:1])), evaluate


def _table(model: str | Path, work: Workload) -> tuple[Start, Evaluate]:
    forecaster = open_forecaster(model, device=work.device)
    table = scaled(read_series(work.files[0], as_trained(forecaster, TableConfig())), forecaster.memory)
    horizon = forecaster.trained or forecaster.look_back
    origins = [
        (n, row)
        for n, values in enumerate(table.values)
        for row in range(len(values) - horizon, forecaster.look_back - 1, -horizon)
    ][: work.units]
    if not origins:
        raise TersorError(
            f"{work.files[0]}: no series has the {forecaster.look_back} rows of the look-back and {horizon} of the horizon"
        )

    def evaluate() -> tuple[list[float], list[int]]:
        return errors_at(forecaster, table, origins, horizon).square().mean((1, 2)).tolist(), []

    x, last = windows_at(table, origins[:1], forecaster.look_back)
    return lambda: _timed(lambda: forecaster(x, last, table.table.step, horizon)), evaluate


def _timed(call: Callable[[], object]) -> Callable[[], float]:
    """Results are on the CPU, so that a GPU has done its work when the call returns."""

    def turn() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return turn


def loss_between(kind: str, base: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The loss of `other` against `base` on the same windows or pictures, and half the width of its 95 % interval."""
    if len(base) != len(other) or not base:
        raise TersorError(f"{len(base)} and {len(other)} scores cannot be compared: they are of other data")
    change = [b - a for a, b in zip(base, other, strict=True)]
    mean, known = statistics.fmean(change), half_width(torch.tensor(change, dtype=torch.float64))
    half = math.inf if known is None else known
    if kind == "text":
        ratio = math.exp(min(mean, 700.0))
        return ratio - 1, ratio * half
    if kind == "image":
        return mean, half
    level = statistics.fmean(base)
    if level <= 0:
        raise TersorError("the original forecasts this table without any error; nothing can be compared with that")
    return mean / level, half / level
