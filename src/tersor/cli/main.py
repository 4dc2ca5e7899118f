"""The command line: `tersor VERB MODEL ...`. One module per verb beside this one; each parses, calls the library, prints.

A verb's module is imported when the verb is called, and the list of verbs is read from the modules' source text, so that
`tersor --help` needs neither torch nor transformers.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from tersor.cli import early, usage
from tersor.cli.options import Verb
from tersor.cli.quiet import add_quiet
from tersor.errors import TersorError
from tersor.untrusted import printable
from tersor.version import __version__

# In the order of `tersor --help`. A verb is the function of its name in the module of its name, but for these.
VERBS = (
    "quantize",
    "compress",
    "sweep",
    "advise",
    "catalog",
    "complexity",
    "eval",
    "attribute",
    "report",
    "generate",
    "chat",
    "bench",
    "inspect",
    "export",
    "models",
    "show",
    "demo",
    "doctor",
    "train",
    "predict",
    "transcribe",
    "forecast",
    "backtest",
    "sample",
)
AT_ONCE = ("models", "show")  # verbs that need not wait for PyTorch
FUNCTIONS = {"eval": "evaluate"}  # `eval` is a name of Python's
BRIEF = ("catalog", "inspect", "models", "show", "doctor")  # say nothing on the way, so they have no --quiet


class LazyVerbs(TyperGroup):
    """A group of commands; each is imported when it is called."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        if self._listing:
            return TyperCommand(cmd_name, help=_summary(cmd_name))
        silent = cmd_name in AT_ONCE or "--quiet" in sys.argv or "_TERSOR_COMPLETE" in os.environ
        if not silent and sys.stderr.isatty():
            typer.echo("loading PyTorch and transformers ...", err=True)  # which takes seconds
        name = FUNCTIONS.get(cmd_name, cmd_name)
        verb = getattr(importlib.import_module(f"tersor.cli.{name}"), name)
        if not isinstance(verb, typer.Typer):
            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
            alone.command(cmd_name, cls=Verb)(verb)
            verb = alone
        command = typer.main.get_command(verb)
        if cmd_name not in BRIEF:
            add_quiet(command)
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in VERBS and (meant := difflib.get_close_matches(args[0], VERBS, n=1)):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {meant[0]!r}?")
        # Of several processes each would say it; the verbs know which one speaks.
        if args[0] in VERBS and not ctx.resilient_parsing and "TORCHELASTIC_RUN_ID" not in os.environ:
            early.check(args[0], args[1:])
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        self._listing = True
        found = super().shell_complete(ctx, incomplete)
        self._listing = False
        return found

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        super().format_help(ctx, formatter)
        self._listing = False


def _summary(verb: str) -> str:
    """The first paragraph of a verb's docstring. A verb with generated options has it at `_verb`."""
    name = FUNCTIONS.get(verb, verb)
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    found = {
        each.name: each for each in ast.parse(source, filename=f"{name}.py").body if isinstance(each, ast.FunctionDef)
    }
    documented = next(found[each] for each in (f"_{name}", name) if each in found and ast.get_docstring(found[each]))
    return (ast.get_docstring(documented) or "").partition("\n\n")[0]


app = typer.Typer(
    name="tersor",
    cls=LazyVerbs,
    help="Make transformers small and fast, see what was lost, and run them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: the list of verbs comes in a third of the time
    context_settings={"help_option_names": ["-h", "--help"]},
)

BAD_INPUT = 2
OWN_FAULT = 70  # what sysexits.h calls an internal software error
INTERRUPTED = 130  # typer's exit status after Ctrl-C; it prints nothing
TERMINATED = 128 + signal.SIGTERM
GOING_ON = (
    "quantize",
    "compress",
    "sweep",
    "advise",
    "train",
    "attribute",
    "demo",
)  # verbs that keep what they have finished


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tersor {__version__}")
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
    pass  # `main` reads --traceback itself: it must know it where the parsing fails, too


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Bad input is one line on standard error and exit status 2; a fault of tersor's own is one line
    and status 70, and its traceback goes to a file."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    shown = "--traceback" in takewhile(lambda each: each.startswith("-"), given)
    if arguments is None:  # this is the whole process: what it has in temporary files goes with it
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    try:
        sys.exit(app(args=given, prog_name="tersor", standalone_mode=False) or 0)
    except usage.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # no error: the help was asked for
            error.show()  # type: ignore[attr-defined]
            sys.exit(BAD_INPUT)
        _fail(usage.told(error, given))
    except TersorError as error:
        if shown:
            traceback.print_exc()
        _fail(str(error))
    except (KeyboardInterrupt, SystemExit) as ended:
        status = ended.code if isinstance(ended, SystemExit) else INTERRUPTED
        if status not in (INTERRUPTED, TERMINATED):
            raise
        goes_on = next((each for each in given if not each.startswith("-")), "") in GOING_ON
        way = ": give the same command again, and it goes on from what is finished" if goes_on else ""
        typer.echo(f"interrupted{way}", err=True)
        sys.exit(status)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if shown:
            traceback.print_exc()
        if reason := _outside_tersor(error):
            _fail(reason)
        _fail(_kind_of(error) if shown else _own_fault(error, given), status=OWN_FAULT)


def _outside_tersor(error: Exception) -> str | None:
    """Why the machine refused a file or memory, which is no fault of tersor's; None for any other error."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{_shortened(str(error.filename))}: "
        return f"{where}{error.strerror}"
    kinds = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)  # torch's
    if isinstance(error, MemoryError) or kinds:
        return f"the memory does not suffice: {_shortened(str(error) or 'a buffer could not be allocated')}"
    return None


def _own_fault(error: Exception, given: Sequence[str]) -> str:
    """The line for an error that nobody foresaw; its traceback goes to a file."""
    details = "".join(traceback.format_exception(error))
    advice = "`tersor --traceback VERB ...` shows them"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="tersor-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"tersor {__version__}, Python {sys.version}\n{list(given)}\n\n{details}")
    except OSError:
        return f"{_kind_of(error)}; {advice}"
    return f"{_kind_of(error)}; the details are in {file.name}, and {advice}"


def _kind_of(error: Exception) -> str:
    return f"this is a fault of tersor's, please report it: {type(error).__name__}: {_shortened(str(error))}"


def _shortened(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _fail(message: str, *, status: int = BAD_INPUT) -> None:
    """Print the message as one line."""
    typer.echo(f"tersor: {printable(' '.join(message.split()))}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
