"""What a user should know and is no error: lines on standard error."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from tersor.cli.quiet import is_quiet


def show_notes(notes: Iterable[str], *, always: bool = False) -> None:
    """One line each, but for --quiet those that are for `always`; without anything in them that a terminal would obey: names
    in them may come from foreign files."""
    for note in notes if always or not is_quiet() else ():
        line = "".join(each if each.isprintable() else "?" for each in " ".join(note.split()))
        typer.echo(f"note: {line}", err=True)
