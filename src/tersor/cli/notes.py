"""Lines on standard error that a user should read and that are no errors."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import typer

from tersor.cli.quiet import is_quiet
from tersor.cli.table import wrapped
from tersor.untrusted import printable


def show_notes(notes: Iterable[str], *, always: bool = False) -> None:
    """Print one line each. With --quiet only notes that are for `always` are printed."""
    for note in notes if always or not is_quiet() else ():
        line = f"note: {printable(' '.join(note.split()))}"
        for part in wrapped([line], indent=2) if sys.stderr.isatty() else [line]:
            typer.echo(part, err=True)
