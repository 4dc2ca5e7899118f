"""Progress bars on standard error, for every verb that takes its time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from tersor.progress import Progress


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Progress]:
    """A `progress(what, done, total)` that draws one bar where standard error is a terminal, and prints a report with total 0
    as a line; silent where `quiet`."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            if total == 0:
                if not quiet:
                    console.print(what, highlight=False, soft_wrap=True)
                return
            bar.update(task, description=what, completed=done, total=total)

        yield report
