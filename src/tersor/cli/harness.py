"""What `tersor eval --tasks` prints."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from tersor.cli.notes import show_notes
from tersor.cli.progress import progress_bar


def show_harness(
    model: str,
    tasks: str,
    tasks_dir: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: str,
    max_length: int | None,
    chat_template: bool,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    from tersor.tasks.harness import harness

    with progress_bar(quiet=as_json) as progress:
        found = harness(
            model,
            [each.strip() for each in tasks.split(",")],
            tasks_dir=tasks_dir,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            max_length=max_length,
            chat_template=chat_template,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    show_notes(
        f"task {task} has {shots} examples before each question, not {num_fewshot}: its own definition says so"
        for task, shots in found.shots.items()
        if num_fewshot is not None and task in found.documents and shots != num_fewshot
    )
    if as_json:
        typer.echo(json.dumps({"model": model, **found.as_dict()}))
        return
    width = max((len(each.task) for each in found.metrics), default=4)
    wide = max((len(each.metric) for each in found.metrics), default=6)
    typer.echo(f"{'task':<{width}}  {'metric':<{wide}}  {'value':>10}  standard error")
    for each in found.metrics:
        error = "" if each.stderr is None else f"± {each.stderr:.4f}"
        after = "" if each.filter == "none" else f"  (after {each.filter})"
        typer.echo(f"{each.task:<{width}}  {each.metric:<{wide}}  {each.value:>10.4f}  {error}{after}")
    read = ", ".join(f"{count:,} of {task}" for task, count in found.documents.items())
    typer.echo(f"documents: {read}; harness {found.harness}")
