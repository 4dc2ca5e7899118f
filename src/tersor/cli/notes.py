"""What a user should know and is no error: lines on standard error."""

from __future__ import annotations

from collections.abc import Iterable

import typer


def show_notes(notes: Iterable[str]) -> None:
    """One line each, without anything in it that a terminal would obey: names in it may come from foreign files."""
    for note in notes:
        line = "".join(each if each.isprintable() else "?" for each in " ".join(note.split()))
        typer.echo(f"note: {line}", err=True)
