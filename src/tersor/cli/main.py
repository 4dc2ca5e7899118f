"""The command line: `tersor VERB MODEL ...`. One module per verb beside this one; each parses, calls the library, prints.

A verb's module is imported when the verb is called, and the list of verbs is read from the modules' source text, so that
`tersor --help` needs neither torch nor transformers.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import tersor
from tersor.errors import TersorError

# In the order of `tersor --help`. A verb is the function of its name in the module of its name, but for these.
VERBS = (
    "quantize",
    "compress",
    "sweep",
    "eval",
    "generate",
    "bench",
    "inspect",
    "export",
    "models",
    "show",
    "demo",
    "doctor",
    "train",
    "predict",
)
FUNCTIONS = {"eval": "evaluate"}  # `eval` is a name of Python's


class LazyVerbs(TyperGroup):
    """A group of commands of which each is imported when it is called."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        if self._listing:
            return TyperCommand(cmd_name, help=_summary(cmd_name))
        name = FUNCTIONS.get(cmd_name, cmd_name)
        verb = getattr(importlib.import_module(f"tersor.cli.{name}"), name)
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
        alone.command(cmd_name)(verb)
        return typer.main.get_command(alone)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        super().format_help(ctx, formatter)
        self._listing = False


def _summary(verb: str) -> str:
    """The first paragraph of a verb's docstring. Where its options are generated, the text is at `_verb`."""
    name = FUNCTIONS.get(verb, verb)
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    found = {each.name: each for each in ast.parse(source).body if isinstance(each, ast.FunctionDef)}
    documented = next(found[each] for each in (f"_{name}", name) if each in found and ast.get_docstring(found[each]))
    return (ast.get_docstring(documented) or "").partition("\n\n")[0]


app = typer.Typer(
    name="tersor",
    cls=LazyVerbs,
    help="Make transformers small and fast, see what was lost, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: the list of verbs comes in a third of the time
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130  # the exit status that typer makes of Ctrl-C, without a word


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tersor {tersor.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input is one line on standard error and exit status 2."""
    try:
        app(args=None if arguments is None else list(arguments))
    except TersorError as error:
        _fail(str(error))
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED:
            raise
        typer.echo("interrupted; what is finished is kept, and the same command goes on from there", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)


def _fail(message: str) -> None:
    typer.echo(f"tersor: {' '.join(message.split())}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
