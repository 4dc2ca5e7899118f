"""`--quiet`: a command that prints its result and errors, and nothing on the way."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Annotated, Any

import typer

_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


def is_quiet() -> bool:
    """Whether the command that runs was given --quiet."""
    return _QUIET.get()


def add_quiet(command: Any) -> None:
    """Give a command the option, or all commands of a group."""
    alone = typer.Typer(add_completion=False)
    alone.command()(_declare)
    (option,) = (each for each in typer.main.get_command(alone).params if each.name == "quiet")
    for each in getattr(command, "commands", {"": command}).values():
        each.params.append(option)


def _be_quiet(context: typer.Context, given: bool) -> None:
    if given:
        before = _QUIET.set(True)
        context.call_on_close(lambda: _QUIET.reset(before))


def _declare(
    quiet: Annotated[
        bool,
        typer.Option("--quiet", expose_value=False, callback=_be_quiet, help="Show no progress and no notes."),
    ] = False,
) -> None:
    pass  # typer makes the option out of the signature
