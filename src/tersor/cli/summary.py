"""What a compression did, as a table and a few lines."""

from __future__ import annotations

import re
import shlex
import statistics
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import typer

from tersor.calibrate.statistics import is_expert
from tersor.cli.table import print_table, wrapped
from tersor.compress.summary import Summary
from tersor.evaluate.interval import half_width
from tersor.formats.layouts import PLAIN

HIDDEN = ("condition",)  # of a row: the report shows it
WHOLE = 48  # layers that are shown one by one, where all are not asked for
HEADINGS = {"name": "layer", "note": "", "group_size": "group"}  # by keys; of the others as they are


def print_summary(summary: Summary, out: Path, *, every_layer: bool = False) -> None:
    """every_layer: show each layer, however many there are."""
    rows_of_all = (report.row() for report in summary.layers)
    every = [{key: value for key, value in row.items() if key not in HIDDEN} for row in rows_of_all]
    for _, group in groupby(every, key=tuple):  # of several steps each has columns of its own
        rows = list(group)
        keys = [key for key in rows[0] if any(row[key] != "" for row in rows) and not _idle(key, rows)]
        rows = [{key: row[key] for key in keys} for row in rows]
        left = [
            number for number, key in enumerate(keys) if any(isinstance(row[key], str) and row[key] for row in rows)
        ]
        head = [HEADINGS.get(key, key.replace("_", " ")) for key in keys]
        short = not every_layer and len(rows) > WHOLE
        cells = _in_short(rows) if short else [[_shown(value) for value in row.values()] for row in rows]
        print_table(head, cells, left=left)
        if short:
            typer.echo(f"medians of {len(rows):,} layers, and the least and most of whole numbers; --layers shows each")
    experts = [row["tokens"] for row in every if "tokens" in row and is_expert(row["name"])]
    if experts:
        typer.echo(
            f"{len(experts)} experts, calibrated with {min(experts):,} to {max(experts):,} tokens each; "
            f"{experts.count(0) or 'none'} without"
        )
    facts = []
    if summary.size_before and summary.size_after:
        ratio = summary.size_before / summary.size_after
        facts.append(f"{summary.size_before / 1e6:.1f} MB -> {summary.size_after / 1e6:.1f} MB ({ratio:.2f}x smaller)")
    if summary.parameters_before and summary.parameters_after:
        share = summary.parameters_after / summary.parameters_before
        facts.append(f"{summary.parameters_before:,} -> {summary.parameters_after:,} parameters ({share:.1%})")
    elif summary.format != PLAIN.name:
        facts.append(f"{summary.bits_per_weight:.3f} bits a quantized weight")
    if summary.sparsity is not None:
        facts.append(f"{summary.sparsity:.1%} of the weights in {len(summary.layers)} layers are zero")
    blocks = [seconds for name, seconds in summary.seconds_per_block.items() if name]
    a_block = f"{sum(blocks) / len(blocks):.1f} s a block, " if blocks else ""
    earlier = f", {summary.resumed_blocks} blocks from an earlier run" if summary.resumed_blocks else ""
    lines = [
        f"{out}: {', '.join(facts) or summary.format}",
        f"{summary.seconds:.1f} s in all, {a_block}peak memory {summary.peak_memory / 1e9:.2f} GB{earlier}",
    ]
    if summary.divergence is not None:
        width = half_width(torch.tensor(summary.divergences)) if len(summary.divergences) > 1 else None
        interval = "" if width is None else f" ± {width:.4f}"
        lines.append(
            f"on {summary.compared_on}: KL divergence {summary.divergence:.4f}{interval} nats from the original, "
            f"{summary.agreement:.1%} of the first choices the same"
        )
    for line in wrapped(lines, indent=2):
        typer.echo(line)
    typer.echo(f"what was lost, and where, as a page: tersor report {shlex.quote(str(out))}")  # whole, to be copied


def _idle(key: str, rows: list[dict[str, Any]]) -> bool:
    """Whether a column says nothing: of layers that see no samples, or whose weights stay as they are."""
    if key in ("damp", "tokens"):
        return not any(row[key] for row in rows)
    plain = all((row.get("bits"), row.get("group_size")) == (16, -1) for row in rows)
    return key in ("bits", "group_size") and plain


def _in_short(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One row for the layers whose names differ in numbers only."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", str(row["name"])), []).append(row)
    return [
        [f"{len(each)} x {name}", *(_together([row[key] for row in each]) for key in each[0] if key != "name")]
        for name, each in alike.items()
    ]


def _together(values: list[Any]) -> str:
    known = [value for value in values if value != ""]
    if known and all(isinstance(value, int | float) for value in known):
        if any(isinstance(value, float) for value in known):
            return _shown(statistics.median(known))
        return _shown(min(known)) if min(known) == max(known) else f"{_shown(min(known))} - {_shown(max(known))}"
    return "; ".join(dict.fromkeys(map(_shown, known)))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
