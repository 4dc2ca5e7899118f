"""Lines on standard error that a user should read and that are no errors."""

from __future__ import annotations

from collections.abc import Iterable

import typer


def show_notes(notes: Iterable[str]) -> None:
    """Print one line each, without control characters: names in it may come from foreign files."""
    for note in notes:
        line = "".join(each if each.isprintable() else "?" for each in " ".join(note.split()))
        typer.echo(f"note: {line}", err=True)
