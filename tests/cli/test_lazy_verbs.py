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

from tersor.cli import early
from tersor.cli.main import FUNCTIONS, VERBS, app, main
from tersor.cli.progress import progress_bar
from tersor.compress.best import NAMES as BEST
from tersor.methods.method import methods


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


MISSING = {
    "quantize": ["nowhere", "--out", "out"],
    "compress": ["gptq", "nowhere", "--out", "out"],
    "sweep": ["nowhere.yaml", "--out", "out"],
    "advise": ["demo", "--text", "nowhere.txt"],
    "eval": ["demo", "--images=nowhere"],
    "attribute": ["demo", "--against", "nowhere"],
    "report": ["nowhere"],
    "generate": ["demo", "--prompt-file", "nowhere.txt"],
    "chat": ["nowhere"],
    "bench": ["nowhere"],
    "inspect": ["nowhere"],
    "export": ["nowhere", "--out", "nowhere.gguf"],
    "train": ["itransformer", "--data", "nowhere.csv", "--out", "out"],
    "predict": ["demo-vit", "nowhere.png"],
    "transcribe": ["nowhere", "nowhere.wav"],
    "forecast": ["ridge", "--data", "nowhere.csv", "--horizon", "3"],
    "backtest": ["ridge", "--data", "nowhere.csv", "--horizon", "3"],
    "sample": ["nowhere", "--out", "shape.obj"],
}
UNNAMED = {
    "train itransformer --out out": "needs --data",
    "quantize demo": "needs --out",
    "train itransfomer --out a": "named",
}
UNNAMED |= {"quantize demo --out /etc/passwd": "is a file", "quantize demo --out a --method qptq": "unknown method"}


def test_what_is_not_there_is_told_before_the_libraries_are_imported() -> None:
    code = f"""
import sys
from tersor.cli.main import main
for words in {[*([verb, *rest] for verb, rest in MISSING.items()), *map(str.split, UNNAMED)]!r}:
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 2, words
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    for line, told in zip(done.stderr.splitlines(), [*["nowhere"] * len(MISSING), *UNNAMED.values()], strict=True):
        assert told in line


def test_what_is_checked_early_is_what_the_verbs_have() -> None:
    read = set()
    for verb in early.NEEDS:
        name = FUNCTIONS.get(verb, verb)
        alone = typer.Typer(add_completion=False)
        alone.command()(getattr(importlib.import_module(f"tersor.cli.{name}"), name))
        parameters = typer.main.get_command(alone).params
        needed = [each for each in parameters if each.required]
        assert {each.opts[0] for each in needed if each.param_type_name == "option"} == set(
            early.REQUIRED.get(verb, ())
        )
        assert any(each.param_type_name == "argument" for each in needed)
        read |= {each.opts[0] for each in parameters}
    assert {*early.READ, *early.MODELS} <= read
    assert list(early.BEST) == list(BEST)
    assert early.method_names() == list(methods())


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
