"""The list of verbs comes without the libraries that the verbs need."""

from __future__ import annotations

import importlib
import io
import re
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import typer
from conftest import Ran

from tersor.cli.main import FUNCTIONS, VERBS, app, main
from tersor.cli.progress import progress_bar


@pytest.mark.parametrize("arguments", [["--help"], ["models", "shvit*"]])
def test_neither_torch_nor_transformers_is_imported(arguments: list[str]) -> None:
    code = f"""
import sys
from tersor.cli.main import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_line_of_the_list_is_cut_and_a_misspelled_verb_is_told(tersor_command: Callable[..., Ran]) -> None:
    listed = tersor_command("--help").out.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.strip().splitlines()] == list(VERBS)
    assert "..." not in listed
    ended = tersor_command("quantise", "demo")
    assert (ended.status, "Did you mean 'quantize'?" in ended.err) == (2, True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_told_what_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    for verb in ("inspect", "models"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        said = terminal.getvalue()
        assert said == "loading PyTorch and transformers ...\n"  # by inspect, and by models no more


def test_progress_says_what_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress_bar() as progress:
        for what, steps in (("checking the model", 9), ("compressing", 4)):
            for done in range(steps):
                progress(what, done, steps)
                time.sleep(0.02)
            time.sleep(0.3)  # it is drawn ten times a second
    plain = re.sub(r"\x1b\[[0-9;?]*\w", "", terminal.getvalue())
    assert re.search(r"compressing \S+ 3/4 0:00:0\d left 0:00:0\d", plain)


def test_every_verb_is_listed_with_the_first_line_of_its_own_help() -> None:
    group = typer.main.get_command(app)
    listed = group.get_help(typer.Context(group)).splitlines()  # type: ignore[arg-type]
    for verb in VERBS:
        name = FUNCTIONS.get(verb, verb)
        function = getattr(importlib.import_module(f"tersor.cli.{name}"), name)
        (row,) = (line for line in listed if line.split()[:1] == [verb])
        shown = row.split(maxsplit=1)[1].removesuffix("...").rstrip(".")
        documented = function.registered_callback.callback if isinstance(function, typer.Typer) else function
        assert " ".join(documented.__doc__.split()).startswith(shown)
