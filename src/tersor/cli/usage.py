"""What the option parser refuses, in one line with the way out."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import typer

# `UsageError` of typer's own copy of click, or of click: by typer's version.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def told(error: Any, given: Sequence[str]) -> str:
    """The line. given: the words of the command line."""
    verb = next((each for each in given if not each.startswith("-")), "")
    path = f"tersor {verb}" if error.ctx is None else error.ctx.command_path
    if hasattr(error, "possibilities") and hasattr(error, "option_name"):  # an option that is not there
        known = [
            name for each in error.ctx.command.get_params(error.ctx) for name in (*each.opts, *each.secondary_opts)
        ]
        meant = difflib.get_close_matches(error.option_name, known, n=1)
        said = f"there is no option {error.option_name}" + (f"; did you mean {meant[0]}?" if meant else "")
    else:
        said = _value_told(error, given)
    return f"{said.rstrip('.')}{'' if said.endswith('?') else ';'} `{path} -h` shows how"


def _value_told(error: Any, given: Sequence[str]) -> str:
    """A value of the wrong kind is shown, which the parser does not do."""
    parameter = getattr(error, "param", None)
    message = str(error.format_message())
    if not isinstance(error, typer.BadParameter) or parameter is None or message.startswith("Missing"):
        return message[:1].lower() + message[1:]
    name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.human_readable_name
    why = error.message.partition(",")[0].replace("Input should", "it should", 1)
    return f"{' '.join([name, *_values(name, given)[-1:]])}: {why}"


def _values(option: str, given: Sequence[str]) -> list[str]:
    """What the command line gives an option."""
    pairs = zip(given, [*given[1:], ""], strict=True)
    found = [
        after if word == option else word.partition("=")[2] for word, after in pairs if word.split("=")[0] == option
    ]
    return [repr(each) if not each or " " in each else each for each in found]
