"""Progress bars on standard error, for every verb that takes its time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from tersor.cli.quiet import is_quiet
from tersor.progress import Progress

LINES = 10  # that stand for a bar in a file or pipe
MEMORY = 3600.0  # seconds of which the speed is taken: a block can take minutes


@contextmanager
def progress_bar(*, quiet: bool = False, as_lines: bool = False) -> Iterator[Progress]:
    """A `progress(what, done, total)` that draws one bar where standard error is a terminal, with what remains of the steps in
    `total`. With total 0 it prints `what` as a line. quiet, or --quiet: it does neither.

    as_lines: where standard error is no terminal, it prints a line now and then in place of the bar."""
    quiet = quiet or is_quiet()
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    hidden = quiet or not console.is_terminal
    with Bars(*columns, console=console, disable=hidden, transient=True, speed_estimate_period=MEMORY) as bar:
        task, tenths = bar.add_task("starting", total=None), 0

        def report(what: str, done: int, total: int) -> None:
            nonlocal tenths
            if as_lines and total and not quiet and not console.is_terminal:
                before, tenths = tenths, LINES * done // total
                if tenths != before:
                    console.print(f"{what}, {done} of {total}", highlight=False, soft_wrap=True)
                return
            if total == 0:
                if not quiet:
                    console.print(what, highlight=False, soft_wrap=True)
                return
            if done < bar.tasks[0].completed:  # another kind of steps, of another speed
                bar.reset(task)
            bar.update(task, description=what, completed=done, total=total)

        yield report
