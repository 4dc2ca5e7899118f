"""A setting that nothing would read is refused, with a line that says for what it counts; of every kind of method and model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from torch import nn
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ, RTN
from tersor.compress.settings import Settings, idle, settings_of
from tersor.errors import TersorError
from tersor.methods.method import from_options

GIVEN: dict[str, Any] = {
    "samples": 64,
    "seq_len": 64,
    "seed": 3,
    "device": "cpu",
    "format": "gptq",
    "dtype": "float32",
    "out": "out",
    "overwrite": True,
    "redo": ["*"],
    "include": ["*"],
    "exclude": ["*"],
    "head": True,
    "embeddings": True,
    "target_bits": 3.5,
    "target_tp": 2,
    "experts": "all",
    "activations": "cpu",
    "original": "demo",
    "allow_pickle": True,
}
READ_ALWAYS = {"calibration", "tokenizer", "progress"}
SAMPLES = {"samples", "seq_len", "seed"}
NAMED = {"device", "dtype", "out", "overwrite", "redo", "activations", "allow_pickle"}  # of a model given by name
BLOCKS = {"format", "redo", "head", "embeddings", "target_bits", "target_tp", "experts", "activations"}
STATISTICS = {"experts", "activations"}
LAYERS = {"include", "exclude"}


def ignored(method: str, *, by_name: bool, **settings: Any) -> set[str]:
    return set(idle(settings_of({**GIVEN, **settings}), [from_options(method, {})], by_name=by_name))


def test_the_table_names_every_setting() -> None:
    assert GIVEN.keys() | READ_ALWAYS == {each.name for each in dataclasses.fields(Settings)}
    for name, value in settings_of(GIVEN).__dict__.items():
        assert name in READ_ALWAYS or value != Settings.__dataclass_fields__[name].default


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("gptq", {"original"}),
        ("wanda", {"original", "target_tp"}),  # packs nothing
        ("rtn", {"original"} | SAMPLES | STATISTICS),
        ("magnitude", {"original", "target_tp"} | SAMPLES | STATISTICS),
        ("repquant", {"original"} | BLOCKS),
        ("ats", {"original"} | BLOCKS | SAMPLES),
        ("smoothquant", {"original"} | BLOCKS),
        ("ssm-token-pruning", {"original"} | BLOCKS | SAMPLES | LAYERS),
        ("scales", BLOCKS),
    ],
)
def test_what_a_method_does_not_read(method: str, expected: set[str]) -> None:
    assert ignored(method, by_name=True) == expected
    assert ignored(method, by_name=False) == expected | NAMED
    assert ignored(method, by_name=True, calibration="text.txt") == expected - SAMPLES  # the sample that is compared


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [
        (None, set()),
        ("text.txt", set()),
        ("images.npz", {"seq_len"}),
        (["a text", "another"], {"seed"}),
        ([torch.zeros(2, 8)], {"seq_len", "seed"}),
    ],
)
def test_what_samples_do_not_read(calibration: Any, expected: set[str]) -> None:
    assert ignored("gptq", by_name=True, calibration=calibration) == {"original"} | expected


def test_what_a_result_that_is_not_kept_does_not_read() -> None:
    assert ignored("gptq", by_name=True, out=None) == {"original", "overwrite", "redo"}


def lines(run: Callable[[], Any]) -> Iterable[str]:
    with pytest.raises(TersorError) as raised:
        run()
    return str(raised.value).splitlines()


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("rtn", {"samples": 64}, "samples=64 does nothing with rtn: it counts for methods that look at samples, and"),
        (
            "ats",
            {"head": True},
            "head=True does nothing with ats: it counts for methods that go block by block; leave it",
        ),
        ("gptq", {"dtype": "float32"}, "dtype='float32' does nothing with gptq: it counts for a model given by name;"),
        (
            "ssm-token-pruning",
            {"include": ["*"]},
            "include=('*',) does nothing with ssm-token-pruning: it counts for methods that",
        ),
        ("gptq", {"out": "out"}, "a module in memory is compressed in memory: call save(directory) on the result"),
    ],
)
def test_it_is_refused_in_one_line(method: str, settings: dict[str, Any], expected: str) -> None:
    (line,) = lines(lambda: tersor.compress(nn.Sequential(nn.Linear(8, 8)), from_options(method, {}), **settings))
    assert line.startswith(expected)


def test_rules_and_steps_may_read_what_the_first_method_does_not() -> None:
    steps = [tersor.compress.Recipe(from_options("rtn", {}), rules) for rules in [(), make_rules_with_gptq()]]
    asked = settings_of({"samples": 64})
    assert set(idle(asked, steps[0].methods, by_name=True)) == {"samples"}
    assert not idle(asked, steps[1].methods, by_name=True)
    assert not idle(asked, [*steps[0].methods, from_options("gptq", {})], by_name=True)


def make_rules_with_gptq() -> Any:
    return tersor.compress.recipe.make_rules([{"match": "*.layers.[01].*", "method": "gptq"}])  # type: ignore[attr-defined]


def test_experts_are_refused_of_a_model_that_has_none() -> None:
    with pytest.raises(TersorError, match="experts does nothing: no layer that is compressed is an expert"):
        tersor.compress(build("llama"), GPTQ(group_size=32), calibration=samples("llama", 2), experts="all")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("compress", "ats", "demo-vit", "--format", "gptq"), "format='gptq' does nothing with ats: it counts for"),
        (("quantize", "demo", "--method", "rtn", "--samples", 64), "samples=64 does nothing with rtn: it counts for"),
        (("compress", "magnitude", "demo", "--target-tp", 2), "target_tp=2 does nothing with magnitude: it counts for"),
        (
            ("quantize", "demo", "--original", "demo"),
            "original='demo' does nothing with gptq: it counts for methods that",
        ),
    ],
)
def test_the_command_line_refuses_it_with_the_same_line(
    words: tuple[Any, ...], expected: str, tmp_path: Path, tersor_command: Callable[..., Ran]
) -> None:
    ran = tersor_command(*words, "--out", tmp_path / "out")
    assert ran.status == 2
    assert ran.err.startswith(f"tersor: {expected}")
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_progress_that_is_no_function_is_refused_in_one_line() -> None:
    for given in (False, True, 3):
        with pytest.raises(TersorError, match=f"progress={given} is no function"):
            tersor.compress("demo", RTN(), progress=given)


def test_a_dtype_is_taken_by_name_or_as_torch_knows_it(small_source: Path, tmp_path: Path) -> None:
    names = {"named": "float32", "torch's": torch.float32}
    for name, dtype in names.items():
        module = tersor.load(small_source, dtype=dtype)
        assert next(module.parameters()).dtype == torch.float32
        tersor.compress(small_source, RTN(group_size=32), dtype=dtype, out=tmp_path / name)
    results = [json.loads((tmp_path / name / "tersor.json").read_text()) for name in names]
    assert results[0] == results[1]
    assert results[0]["settings"]["dtype"] == "float32"
    with pytest.raises(TersorError, match="dtype 'int8' is not one of auto, float16"):
        tersor.load(small_source, dtype=torch.int8)
    found = tersor.divergence(small_source, small_source, "builtin", seq_len=16, max_windows=1, dtype=torch.float32)
    assert found.kl.mean == 0
