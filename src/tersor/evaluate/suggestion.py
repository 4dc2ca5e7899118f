"""More bits for the layers that cost most: tried with the model's own recipe, measured, and written as a recipe.

The record of a compressed model (tersor.json) says its method, options, rules and samples; the job is done again with one
rule more for each of the layers. Nothing is predicted.
"""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from tersor.checkpoint.room import record_of
from tersor.checkpoint.source import STEPS, open_checkpoint
from tersor.compress.job import compress
from tersor.compress.settings import IN_PYTHON, Settings
from tersor.errors import TersorError
from tersor.evaluate.attribution import Attribution, Row, Suggestion
from tersor.evaluate.interval import half_width
from tersor.methods.method import BlockMethod, as_words, from_options
from tersor.progress import Progress


@dataclass(frozen=True)
class Job:
    """How a compressed model was made."""

    method: BlockMethod
    rules: list[dict[str, Any]]
    settings: dict[str, Any]
    layers: frozenset[str]  # that it compressed


def job_behind(model: str | Path) -> Job:
    """Raises TersorError with the reason where the job cannot be done again with other bits for single layers."""
    checkpoint = open_checkpoint(model)
    record = record_of(checkpoint.directory)
    if record is None or not isinstance(record.get("method"), dict):
        raise TersorError(f"{model} was not compressed by tersor, so its recipe is not known")
    name = str(record["method"].get("name"))
    steps = checkpoint.config.get(STEPS)
    if isinstance(steps, list) and len(steps) > 1:
        raise TersorError(f"{model} was made in several steps, of which the last one's input is not kept")
    method = from_options(name, {key: value for key, value in record["method"].items() if key != "name"})
    if not isinstance(method, BlockMethod) or "bits" not in {each.name for each in dataclasses.fields(method)}:
        raise TersorError(f"the method {name} has no bits for single layers")
    settings, rules = record.get("settings"), record.get("rules")
    if not isinstance(settings, dict) or not isinstance(rules, list):
        raise TersorError(f"the record of {model} does not say its samples: compress it again with this version")
    if settings.get("calibration") == IN_PYTHON:
        raise TersorError(f"{model} was calibrated with samples given in Python, which are not kept")
    layers = frozenset(str(row.get("name")) for row in record.get("layers", []))
    return Job(method, rules, settings, layers)


def suggest(
    found: Attribution,
    distances: Callable[[Path], Tensor],
    total: Tensor,
    *,
    layers: int = 10,
    bits: int = 8,
    only: Sequence[str] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Suggestion:
    """Give `bits` to the most costly layers of `found`, whose model and base are names, and measure what comes of it.

    distances: of a model in a folder, [samples]; total: those of the compressed model. layers: how many at most; where rows are
    blocks, whole ones as long as their layers are no more (at least one). only: these layers instead.
    Raises TersorError where there is no layer to give more, or the job cannot be done again.
    """
    job = job_behind(found.model)
    chosen = list(only) if only is not None else most_costly(found.rows, job.layers, most=layers, bits=bits)
    if not chosen:
        raise TersorError(f"no layer that costs anything has less than {bits} bits")
    rules = [*job.rules, *({"match": escaped(name), "bits": bits} for name in chosen)]
    before = open_checkpoint(found.model).size()
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        out = Path(folder) / "model"
        more: dict[str, Any] = {} if progress is None else {"progress": progress}
        compress(found.base, job.method, rules=rules, out=out, device=device, **job.settings, **more)
        after, size = distances(out), open_checkpoint(out).size()
    change = after - total
    return Suggestion(
        layers=tuple(chosen),
        bits=bits,
        size_before=before,
        size_after=size,
        kl_before=float(total.mean()),
        kl_after=float(after.mean()),
        change=float(change.mean()),
        change_half_width=half_width(change),
        recipe=recipe_text(found.base, job, rules),
    )


def most_costly(rows: Sequence[Row], compressed: frozenset[str], *, most: int, bits: int) -> list[str]:
    """The layers of the most costly rows that were compressed to fewer bits than `bits`."""
    chosen: list[str] = []
    for row in sorted(rows, key=lambda row: -row.cost):
        mine = [layer for layer in sorted(compressed) if any(_is_in(layer, name) for name in row.members)]
        if row.cost <= 0 or not mine or (row.bits is not None and row.bits >= bits):
            continue
        if chosen and len(chosen) + len(mine) > most:
            break
        chosen += mine
    return chosen


def _is_in(layer: str, module: str) -> bool:
    return layer == module or layer.startswith(f"{module}.")


def escaped(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def recipe_text(base: str, job: Job, rules: Sequence[dict[str, Any]]) -> str:
    """A recipe file, with the command that uses it."""
    options = job.method.options()
    content = {"method": options.pop("name"), **options, "rules": list(rules)}
    words = ["tersor", "quantize", base, "--recipe", "THIS-FILE", *_options(job.settings), "--out", "DIR"]
    text: str = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True)
    return f"# {shlex.join(words)}\n{text}"


def _options(settings: Mapping[str, Any]) -> list[str]:
    """A record's settings as options of the command."""
    fields = Settings.__dataclass_fields__
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return [word for name, value in plain.items() for word in as_words(fields[name], value)]
