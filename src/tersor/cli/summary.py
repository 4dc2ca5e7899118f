"""What a compression did, as a table and a few lines."""

from __future__ import annotations

import shlex
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tersor.calibrate.statistics import is_expert
from tersor.compress.result import Summary
from tersor.evaluate.interval import half_width
from tersor.formats.layouts import PLAIN

HIDDEN = ("condition",)  # of a row: the report shows it
WIDTH_OF_FILES = 200  # columns, where the output is no terminal


def print_summary(summary: Summary, out: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_FILES)
    rows_of_all = (report.row() for report in summary.layers)
    every = [{key: value for key, value in row.items() if key not in HIDDEN} for row in rows_of_all]
    for _, group in groupby(every, key=tuple):  # of several steps each has columns of its own
        rows = list(group)
        table = Table(title=None, box=None, pad_edge=False)
        for key, value in rows[0].items():
            heading = {"name": "layer", "note": "", "group_size": "group"}.get(key, key.replace("_", " "))
            if key == "name":  # kept whole, however narrow the terminal
                table.add_column(heading, min_width=max(len(str(row[key])) for row in rows))
            else:
                table.add_column(heading, justify="left" if isinstance(value, str) else "right")
        for row in rows:
            table.add_row(*map(_shown, row.values()))
        console.print(table)
    experts = [row["tokens"] for row in every if "tokens" in row and is_expert(row["name"])]
    if experts:
        console.print(
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
    console.print(
        f"{out}: {', '.join(facts) or summary.format}\n"
        f"{summary.seconds:.1f} s in all, {a_block}peak memory {summary.peak_memory / 1e9:.2f} GB{earlier}"
    )
    if summary.divergence is not None:
        width = half_width(torch.tensor(summary.divergences)) if len(summary.divergences) > 1 else None
        interval = "" if width is None else f" ± {width:.4f}"
        console.print(
            f"on {summary.compared_on}: KL divergence {summary.divergence:.4f}{interval} nats from the original, "
            f"{summary.agreement:.1%} of the first choices the same"
        )
    console.print(f"what was lost, and where, as a page: tersor report {shlex.quote(str(out))}", highlight=False)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
