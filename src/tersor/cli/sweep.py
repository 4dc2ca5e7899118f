"""`tersor sweep RECIPES`: many compression jobs and one table of what came out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.options import print_json
from tersor.cli.progress import progress_bar
from tersor.cli.table import print_table
from tersor.errors import TersorError
from tersor.evaluate.sweep import Row
from tersor.evaluate.sweep import sweep as run_sweep
from tersor.evaluate.sweep_recipes import read_jobs


def sweep(
    recipes: Annotated[list[str], typer.Argument(help="YAML files; a list of values in one makes a grid.")],
    out: Annotated[Path, typer.Option(help="Directory with one directory a job, and the table.")],
    model: Annotated[list[str] | None, typer.Option(help="Models, in place of the recipes' own.")] = None,
    jobs: Annotated[int, typer.Option(help="Jobs at a time on this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Run on a Ray cluster: its address, or `local`.")] = None,
    cpus: Annotated[float, typer.Option(help="Cores that a job takes on Ray.")] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs that a job takes on Ray.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Compress models by many recipes and compare the results.

    A sweep that is interrupted goes on when the same command is given again. Jobs that fail do not stop the others; the exit
    status is then 1.

    Example: `tersor sweep grid.yaml --model demo --out results`.
    """
    if jobs < 1:
        raise TersorError(f"--jobs {jobs} must be positive")
    if ray is not None and jobs > 1:
        raise TersorError("--jobs is for this machine; with --ray the cluster runs as many as --cpus and --gpus allow")
    todo = read_jobs(recipes, models=model or ())
    with progress_bar(quiet=as_json) as progress:
        rows = run_sweep(todo, out, processes=jobs, ray=ray, cpus=cpus, gpus=gpus, progress=progress)
    failed = [row for row in rows if row.error is not None]
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        _print(rows)
    for row in failed:
        typer.echo(f"tersor: {row.name}: {row.error}", err=True)
    if failed:
        raise typer.Exit(1)


def _print(rows: list[Row]) -> None:
    head = ("job", "model", "method", "bits", "group", "size", "bits a weight", "perplexity", "seconds")
    cells = [
        (
            row.name,
            row.model,
            row.method,
            "" if row.bits is None else str(row.bits),
            "" if row.group_size is None else str(row.group_size),
            "failed" if row.size is None else f"{row.size / 1e6:.1f} MB",
            "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}",
            "" if row.perplexity is None else f"{row.perplexity:.3f}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    print_table(head, cells, left=(0, 1, 2))
