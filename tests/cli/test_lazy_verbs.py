"""The list of verbs comes without the libraries that the verbs need."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import typer

from tersor.cli.main import FUNCTIONS, VERBS, app


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
