"""The command line: `tersor VERB MODEL ...`. One module per verb beside this one; each parses, calls the library, prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

import tersor
from tersor.cli.bench import bench
from tersor.cli.compress import compress
from tersor.cli.demo import demo
from tersor.cli.doctor import doctor
from tersor.cli.evaluate import evaluate
from tersor.cli.export import export
from tersor.cli.generate import generate
from tersor.cli.inspect import inspect
from tersor.cli.models import models
from tersor.cli.quantize import quantize
from tersor.cli.sweep import sweep
from tersor.cli.train import train
from tersor.errors import TersorError

app = typer.Typer(
    name="tersor",
    help="Make transformers small and fast, see what was lost, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("quantize")(quantize)
app.command("compress")(compress)
app.command("sweep")(sweep)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("bench")(bench)
app.command("inspect")(inspect)
app.command("export")(export)
app.command("models")(models)
app.command("demo")(demo)
app.command("doctor")(doctor)
app.command("train")(train)

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
