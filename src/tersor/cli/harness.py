"""What `tersor eval --tasks` prints."""

from __future__ import annotations

from pathlib import Path

import typer

from tersor.cli.notes import show_notes
from tersor.cli.options import print_json
from tersor.cli.progress import progress_bar
from tersor.cli.table import print_table


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
        print_json({"model": model, **found.as_dict()})
        return
    rows = []
    for each in found.metrics:
        error = "" if each.stderr is None else f"± {each.stderr:.4f}"
        after = "" if each.filter == "none" else f"(after {each.filter})"
        rows.append((each.task, each.metric, f"{each.value:.4f}", error, after))
    print_table(("task", "metric", "value", "standard error", ""), rows, left=(0, 1, 3, 4))
    read = ", ".join(f"{count:,} of {task}" for task, count in found.documents.items())
    typer.echo(f"documents: {read}; harness {found.harness}")
