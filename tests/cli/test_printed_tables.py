"""What every verb prints at 80 columns: no row broken or cut, no line of a table wider, plain text, JSON that every parser reads.

The checks of `tersor_command` (conftest.py) hold all of this for every command that any test runs. Here each verb's table is
printed once with names that are as long as real ones.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_origin

import pytest
import typer
from conftest import Ran, check_plain

from tersor.advise.advisor import Advice
from tersor.advise.budget import Budget
from tersor.advise.plans import Figure, Plan
from tersor.cli import advise, backtest, sweep
from tersor.cli.attribute import lines_of
from tersor.cli.main import BRIEF, VERBS, app
from tersor.cli.options import finite
from tersor.cli.summary import WHOLE, print_summary
from tersor.cli.table import table
from tersor.compress.result import Summary
from tersor.evaluate.attribution import Attribution, Row
from tersor.evaluate.sweep import Row as Job
from tersor.tasks.backtest import Backtest
from tersor.tasks.backtest import Row as Forecaster

LAYER = "model.language_model.layers.{}.mlp.experts.{}.gate_proj"
MODEL = "an-organization/Some-Model-Instruct-2507-quantized"


@dataclass(frozen=True)
class Layer:
    name: str
    bits: int = 4
    group_size: int = 128
    loss: float = 1234.5
    damp: float = 0.01
    tokens: int = 4096
    seconds: float = 12.25
    note: str = ""

    def row(self) -> dict[str, Any]:
        return dict(self.__dict__)


def summary(count: int) -> Summary:
    layers = [Layer(LAYER.format(n // 8, n % 8), bits=4 if n % 16 else 8) for n in range(count)]
    return Summary(MODEL, {}, "gptq", layers, [], 1.0, {}, 10**9, 4.125, {})


def attribution() -> Attribution:
    rows = [Row(LAYER.format(n, 7), "gate_proj", n, 3.0, 0.001234, 0.000456, 0.00789, 0.00123) for n in range(3)]
    return Attribution(MODEL, MODEL, "builtin", "layer", tuple(rows), 0.5, None, 0.1)


def advice() -> Advice:
    def figure(value: float) -> Figure:
        return Figure(value, 0.8 * value, 1.2 * value, measured=False, source="by formula")

    names = ("original", "awq-scale bits=4 sym=no + gptq bits=4 group_size=64 sym=no desc_act=yes")
    plans = tuple(Plan(name, (), figure(3.2e9), figure(4.1e9), figure(0.0123), figure(0.0123)) for name in names)
    return Advice(MODEL, "text", "a processor", Budget(loss=0.01), plans[0], plans, names[:1], {}, {})


def forecasts() -> Backtest:
    rows = [Forecaster(name, True, 0.1234, 0.2345, math.nan, {"80": 0.81, "95": 0.94}) for name in ("ridge", MODEL)]
    return Backtest(tuple(rows), 24, 8, 7, "2024-01-01 to 2024-02-01", ())


JOBS = [
    Job(f"{MODEL}-awq-scale-gptq-{bits}", MODEL, "awq-scale + gptq", bits, 128, 10**9, 4.125, 12.345, seconds=678.9)
    for bits in (3, 4)
]

# By verb: arguments of a run of moments, or what prints a result with names as long as real ones have.
SHOWN: dict[str, tuple[str, ...] | Callable[[], Any]] = {
    "quantize": lambda: print_summary(summary(WHOLE), Path(MODEL)),
    "compress": lambda: print_summary(summary(8 * WHOLE), Path(MODEL)),
    "sweep": lambda: sweep._print(JOBS),
    "advise": lambda: advise._print(advice(), None),
    "attribute": lambda: print("\n".join(lines_of(attribution()))),
    "backtest": lambda: print("\n".join(backtest._lines(forecasts()))),
    "catalog": ("catalog",),
    "complexity": ("complexity", "--n", "64k,1m"),
    "models": ("models", "*"),
    "inspect": ("inspect", "demo"),
    "bench": ("bench", "{small}", "--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1", "--against", "demo"),
}
# Lines of words and numbers, or text as it comes; tables of `eval`, `doctor` and `demo` are those of their own tests.
NO_TABLE = {"report", "generate", "chat", "export", "train", "predict", "transcribe", "forecast", "sample", "show"}


def test_every_verb_is_looked_at() -> None:
    assert SHOWN.keys() | NO_TABLE | {"eval", "doctor", "demo"} == set(VERBS)


@pytest.mark.parametrize("verb", SHOWN)
def test_tables_fit_80_columns_with_every_name_whole(
    verb: str,
    tersor_command: Callable[..., Ran],
    small_source: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = SHOWN[verb]
    if isinstance(asked, tuple):
        ran = tersor_command(*(each.format(small=small_source) for each in asked))
        assert ran.status == 0, ran.err
        return
    asked()
    out = capsys.readouterr().out
    check_plain([verb], out)
    names = {
        "quantize": [LAYER.format(0, 7), LAYER.format(5, 0)],
        "compress": [LAYER.format("*", "*")],
        "sweep": [job.name for job in JOBS],
        "advise": [plan.name for plan in advice().plans],
        "attribute": [row.name for row in attribution().rows],
        "backtest": [MODEL],
    }[verb]
    assert all(name in out for name in names)


def test_columns_that_say_nothing_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    pruned = replace(summary(0), layers=[Layer("a.b", bits=16, group_size=-1, damp=0.0, tokens=0)])
    print_summary(pruned, Path("out"))
    assert capsys.readouterr().out.splitlines()[0].split() == ["layer", "loss", "seconds"]
    print_summary(replace(pruned, layers=[Layer("a.b", group_size=-1)]), Path("out"))
    assert capsys.readouterr().out.splitlines()[0].split() == [
        "layer", "bits", "group", "loss", "damp", "tokens", "seconds",
    ]  # fmt: skip


def test_layers_of_large_models_are_summarized_and_whole_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(summary(8 * WHOLE), Path("out"))
    short = capsys.readouterr().out
    assert f"{8 * WHOLE} x {LAYER.format('*', '*')}" in short
    assert "4 - 8" in short  # the bits, which differ
    assert LAYER.format(0, 0) not in short
    print_summary(summary(8 * WHOLE), Path("out"), every_layer=True)
    assert capsys.readouterr().out.count("gate_proj") == 8 * WHOLE


def test_a_table_wraps_its_text_and_then_takes_two_lines_a_row() -> None:
    head, row = ("name", "value", "note"), ("a-long-name", "12", "some words of a note that goes on for long")
    assert table(head, [row], left=(0, 2), width=80) == [
        "name         value  note",
        "a-long-name     12  some words of a note that goes on for long",
    ]
    assert table(head, [row], left=(0, 2), width=50) == [
        "name         value  note",
        "a-long-name     12  some words of a note that goes",
        "                    on for long",
    ]
    assert table(head, [row], left=(0, 2), width=36) == [
        "name",
        "  value  note",
        "a-long-name",
        "     12  some words of a note that",
        "         goes on for long",
    ]
    assert table(("", "value"), [("a\x1b[31m name", "1")], width=80) == ["             value", "a?[31m name      1"]


def test_a_note_that_is_too_wide_goes_below_its_own_row_alone() -> None:
    rows = [("a-name", "12", ""), ("another-name", "3", "some words of a note that goes on")]
    assert table(("layer", "rank", ""), rows, left=(0, 2), width=26) == [
        "layer         rank",
        "a-name          12",
        "another-name     3",
        "  some words of a note",
        "  that goes on",
    ]


def test_numbers_that_json_does_not_have_are_null() -> None:
    assert finite({"a": [math.inf, 1.5], "b": (math.nan, "x")}) == {"a": [None, 1.5], "b": [None, "x"]}


def leaves(verb: str) -> dict[str, Any]:
    """A verb's commands by name: `compress` is a group of them."""
    command = typer.main.get_command(app).get_command(None, verb)  # type: ignore[attr-defined]
    return getattr(command, "commands", {verb: command})


def options_of(command: Any) -> set[str]:
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)}


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_has_an_example_and_no_option_twice(verb: str, tersor_command: Callable[..., Ran]) -> None:
    assert tersor_command(verb, "-h").status == 0
    for command in leaves(verb).values():
        names = [name for each in command.params for name in each.opts]
        assert len(names) == len(set(names)), command.name
        assert f"tersor {verb} " in str(command.help), command.name


def test_an_option_of_one_name_takes_one_kind_of_value_in_every_command() -> None:
    two = {
        "--batch-size": "a number; for tasks also auto",
        "--bits": "a number; for methods also ternary",
        "--w-bits": "a number; for teacher-intervention also ternary",
        "--heads": "how many; for gtsp the share that is left",
    }
    kinds: dict[str, set[str]] = {}
    for verb in VERBS:
        for command in leaves(verb).values():
            for each in command.params:
                if each.param_type_name == "option":
                    kind = each.type_descriptor.annotation if not each.is_flag else bool  # type: ignore[attr-defined]
                    for name in each.opts:
                        kinds.setdefault(name, set()).add("str" if get_origin(kind) is list else kind.__name__)
    assert kinds["--seq-len"] == {"int"}
    assert {name for name, found in kinds.items() if len(found) > 1} == set(two)


def test_quiet_and_json_are_there_for_every_verb_where_they_mean_something() -> None:
    for verb in VERBS:
        for command in leaves(verb).values():
            assert ("--quiet" in options_of(command)) == (verb not in BRIEF)
            assert "--json" in options_of(command) or verb == "transcribe"  # which has --format json


def test_quiet_says_the_result_alone(tersor_command: Callable[..., Ran], small_source: Path, tmp_path: Path) -> None:
    command = (
        "quantize",
        small_source,
        "--method",
        "rtn",
        "--calibration",
        "builtin",
        "--samples",
        1,
        "--seq-len",
        16,
        "--group-size",
        32,
    )
    loud = tersor_command(*command, "--out", tmp_path / "loud")
    quiet = tersor_command(*command, "--out", tmp_path / "quiet", "--quiet")
    assert loud.status == quiet.status == 0
    assert "forecast" in loud.err
    assert quiet.err == ""
    assert "layer" in quiet.out
    assert "no model at" in tersor_command("quantize", "/nowhere", "--out", tmp_path / "x", "--quiet").err


def test_shell_completion_lists_verbs_without_importing_them() -> None:
    code = """
import os, sys
os.environ |= {"_TERSOR_COMPLETE": "complete_bash", "COMP_WORDS": "tersor s", "COMP_CWORD": "1"}
from tersor.cli.main import main
try:
    main([])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sweep", "show", "sample"]


def test_generate_as_json_is_what_it_prints(tersor_command: Callable[..., Ran], small_source: Path) -> None:
    command = ("generate", small_source, "It is", "--max-new-tokens", 2)
    told = json.loads(tersor_command(*command, "--json").out)
    assert told["prompt"] + told["text"] + "\n" == tersor_command(*command).out


def test_a_last_column_without_words_takes_no_room() -> None:
    assert table(("task", "score", ""), [("arc", "0.5", "")], left=(0, 2), width=80) == ["task  score", "arc     0.5"]


def test_a_row_that_goes_on_with_another_name_has_no_line_for_it() -> None:
    rows = [("blocks", "x" * 30, "1"), ("", "y" * 30, "2")]
    lines = table(("block", "layer", "bits"), rows, left=(0, 1), width=36)
    assert "" not in lines
    assert any("y" * 30 in line for line in lines)
