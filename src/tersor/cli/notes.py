"""Lines on standard error that a user should read and that are no errors."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from tersor.cli.quiet import is_quiet


def show_notes(notes: Iterable[str], *, always: bool = False) -> None:
    """Print one line each, without control characters: names in it may come from foreign files. With --quiet only notes that are
    for `always` are printed."""
    for note in notes if always or not is_quiet() else ():
        line = "".join(each if each.isprintable() else "?" for each in " ".join(note.split()))
        typer.echo(f"note: {line}", err=True)
