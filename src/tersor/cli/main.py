"""The command line: `tersor VERB MODEL ...`. One module per verb beside this one; each parses, calls the library, prints."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Sequence
from itertools import takewhile

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

BAD_INPUT = 2
OWN_FAULT = 70  # what sysexits.h calls an internal software error
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
    traceback: bool = typer.Option(
        False, "--traceback", help="Show where in the code an error comes from; give it before the verb."
    ),
) -> None:
    pass  # `main` looks for --traceback itself, for it must know also where the parsing fails


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Bad input is one line on standard error and exit status 2; a fault of tersor's own is one line
    and status 70, and its traceback goes to a file."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    shown = "--traceback" in takewhile(lambda each: each.startswith("-"), given)
    try:
        app(args=given)
    except TersorError as error:
        if shown:
            traceback.print_exc()
        _fail(str(error))
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED:
            raise
        typer.echo("interrupted; what is finished is kept, and the same command goes on from there", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if shown:
            traceback.print_exc()
        if reason := _outside_tersor(error):
            _fail(reason)
        _fail(_kind_of(error) if shown else _own_fault(error, given), status=OWN_FAULT)


def _outside_tersor(error: Exception) -> str | None:
    """What the machine refused, which is no fault of the program: a file, memory. None for anything else."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{_shortened(str(error.filename))}: "
        return f"{where}{error.strerror}"
    kinds = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)  # torch's
    if isinstance(error, MemoryError) or kinds:
        return f"the memory does not suffice: {_shortened(str(error) or 'a buffer could not be allocated')}"
    return None


def _own_fault(error: Exception, given: Sequence[str]) -> str:
    """The line for what nobody foresaw; where and how it happened goes to a file."""
    details = "".join(traceback.format_exception(error))
    advice = "`tersor --traceback VERB ...` shows them"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="tersor-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"tersor {tersor.__version__}, Python {sys.version}\n{list(given)}\n\n{details}")
    except OSError:
        return f"{_kind_of(error)}; {advice}"
    return f"{_kind_of(error)}; the details are in {file.name}, and {advice}"


def _kind_of(error: Exception) -> str:
    return f"this is a fault of tersor's, please report it: {type(error).__name__}: {_shortened(str(error))}"


def _shortened(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _fail(message: str, *, status: int = BAD_INPUT) -> None:
    """One line, without anything in it that a terminal would obey: names in a message may come from foreign files."""
    line = "".join(each if each.isprintable() else "?" for each in " ".join(message.split()))
    typer.echo(f"tersor: {line}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
