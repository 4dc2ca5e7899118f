"""`tersor complexity`: operations, memory and time of attention and of the layers that take its place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tersor.advise.complexity import (
    FORMULAE,
    KINDS,
    LIMIT,
    WIDTH,
    Kind,
    Shape,
    crossover,
    kind_named,
    parse_lengths,
    room,
    timed,
)
from tersor.cli.options import AsJson, print_json
from tersor.cli.progress import progress_bar
from tersor.cli.table import print_table
from tersor.errors import TersorError

Times = dict[str, list[float | None]]  # seconds by layer; None where a length was not timed


def complexity(
    n: Annotated[str, typer.Option(help="Lengths: 1k..64k (powers of two), 512,2k or 4096.")] = "1k..64k",
    d: Annotated[int, typer.Option(min=1, help="Width.")] = 1024,
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 16,
    window: Annotated[
        int, typer.Option(min=1, help="Tokens of a local block; each sees its own and both beside it.")
    ] = 128,
    k: Annotated[int, typer.Option(min=1, help="Keys that Linformer keeps.")] = 256,
    layer: Annotated[
        list[str] | None, typer.Option(help=f"Only these: {', '.join(kind.name for kind in KINDS)}.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time them here too, and say from which n each is faster than attention.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw operations, or times, over n into this picture.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what attention and the layers in its place cost. By formulae: operations, memory and cache.

    Operations are those of matrix products; other costs are named. Times are of one sequence in float32 on the CPU;
    lengths that would not fit in memory, or take too long, are not timed.

    Example: `tersor complexity --n 1k..8k --d 256 --heads 4 --measure`.
    """
    lengths = parse_lengths(n)
    kinds = [kind_named(name) for name in layer] if layer else list(KINDS)
    if measure and kinds and kinds[0].name != "attention":
        kinds = [kind_named("attention"), *(kind for kind in kinds if kind.name != "attention")]
    shapes = [Shape(length, d, heads, window, k) for length in lengths]
    seconds: Times = {}
    most = room()
    if measure:
        with progress_bar(quiet=as_json) as progress:
            for number, kind in enumerate(kinds):
                progress(f"timing {kind.name}", number, len(kinds))
                seconds[kind.name] = timed(kind, shapes, most_bytes=most)
    cross = {
        name: crossover(lengths, seconds["attention"], found) for name, found in seconds.items() if name != "attention"
    }
    if as_json:
        print_json(_plain(kinds, shapes, seconds, cross))
    else:
        _print(kinds, shapes, seconds, cross, most)
    if plot is not None:
        _draw(plot, kinds, shapes, seconds)


def _row(kind: Kind, shape: Shape) -> dict[str, Any]:
    return {
        "n": shape.n,
        "operations": kind.operations(shape),
        "bytes": WIDTH * kind.held(shape),
        "cache_bytes": None if kind.cache is None else WIDTH * kind.cache(shape),
    }


def _plain(kinds: list[Kind], shapes: list[Shape], seconds: Times, cross: dict[str, Any]) -> Any:
    found = []
    for kind in kinds:
        rows = [_row(kind, shape) for shape in shapes]
        if kind.name in seconds:
            rows = [{**row, "seconds": each} for row, each in zip(rows, seconds[kind.name], strict=True)]
        about = {"layer": kind.name, "order": kind.order, "besides": kind.besides, "node": kind.node}
        found.append({**about, "rows": rows, "faster_from": cross.get(kind.name)})
    formulae = [{"layer": each.name, "time": each.time, "memory": each.memory, "note": each.note} for each in FORMULAE]
    return {"layers": found, "not_held": formulae, "threads": torch.get_num_threads()}


def _print(kinds: list[Kind], shapes: list[Shape], seconds: Times, cross: dict[str, Any], most: float) -> None:
    first = shapes[0]
    typer.echo(f"d {first.d}, {first.heads} heads, window {first.window}, k {first.k}; one sequence in float32\n")
    rows = []
    for kind in kinds:
        for number, shape in enumerate(shapes):
            row = _row(kind, shape)
            cells = [_short(row["operations"]), _bytes(row["bytes"]), _bytes(row["cache_bytes"])]
            if seconds:
                found = seconds[kind.name][number]
                cells.append("-" if found is None else f"{1e3 * found:.3g}")
            rows.append((*((kind.name, kind.order) if number == 0 else ("", "")), f"{shape.n:,}", *cells))
    head = ("layer", "order", "n", "operations", "held", "cache", *(["ms"] if seconds else []))
    print_table(head, rows, left=(0, 1))
    if any(each is None for found in seconds.values() for each in found):
        typer.echo(
            f"\n-: not timed: it would hold more than {most / 1e9:.1f} GB, or a pass take more than {LIMIT:.0f} s by the "
            "shorter lengths"
        )
    typer.echo("\nbesides the operations:")
    for kind in kinds:
        typer.echo(f"  {kind.name}: {kind.besides}")
    if seconds:
        typer.echo(f"\nfaster than attention on this machine ({torch.get_num_threads()} threads):")
        for name, length in cross.items():
            typer.echo(
                f"  {name}: " + ("at none of the lengths timed" if length is None else f"from n = {length:,.0f}")
            )
    typer.echo("\nnot held; as the survey says (arXiv 2103.14636):")
    print_table(
        ("layer", "time", "memory", ""), [(e.name, e.time, e.memory, e.note) for e in FORMULAE], left=(0, 1, 2, 3)
    )


def _short(number: int) -> str:
    for scale, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= scale:
            return f"{number / scale:.3g} {name}"
    return f"{number:,}"


def _bytes(number: int | None) -> str:
    return "not causal" if number is None else f"{number / 1e6:,.2f} MB"


def _draw(path: Path, kinds: list[Kind], shapes: list[Shape], seconds: Times) -> None:
    try:
        import matplotlib
    except ImportError:
        raise TersorError("--plot needs matplotlib: pip install 'tersor[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    for kind in kinds:
        found = seconds.get(kind.name) or [kind.operations(shape) for shape in shapes]
        values = [math.nan if each is None else each for each in found]
        axes.loglog([shape.n for shape in shapes], values, marker="o", label=kind.name)
    axes.set_xlabel("n")
    axes.set_ylabel("seconds" if seconds else "operations")
    axes.legend()
    try:
        figure.savefig(path, bbox_inches="tight", dpi=150)
    except (ValueError, OSError) as error:
        raise TersorError(f"{path} cannot be written as a picture: {error}") from None
    finally:
        pyplot.close(figure)
