"""The table's formulae: as torch counts, of the order that is stated, and lengths as people write them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from tersor.advise.complexity import KINDS, Kind, Shape, counted, crossover, kind_named, parse_lengths, slope
from tersor.errors import TersorError

SHAPES = [Shape(96, 64, 2, 16, 8), Shape(50, 128, 4, 32, 16)]
LONG = [Shape(n, 64, 1, 64, 64) for n in (1024, 2048, 4096, 8192)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_operations_are_those_that_the_counter_counts(kind: Kind, shape: Shape) -> None:
    assert kind.operations(shape) - kind.unseen(shape) == counted(kind, shape)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.attention], ids=lambda kind: kind.name)
def test_operations_grow_as_stated(kind: Kind) -> None:
    found = slope([shape.n for shape in LONG], [kind.operations(shape) for shape in LONG])
    assert found == pytest.approx(kind.exponent, abs=0.25)


def test_the_cache_of_attention_grows_and_that_of_mamba_does_not() -> None:
    short, long = Shape(1024, 64), Shape(2048, 64)
    attention, mamba = kind_named("attention").cache, kind_named("mamba").cache
    assert attention is not None
    assert mamba is not None
    assert attention(long) == 2 * attention(short)
    assert mamba(long) == mamba(short)


def test_lengths() -> None:
    assert parse_lengths("1k..8k") == [1024, 2048, 4096, 8192]
    assert parse_lengths("512, 3k") == [512, 3072]
    assert parse_lengths("4096") == [4096]


@pytest.mark.parametrize("text", ["", "8k..1k", "k", "1..", "-4", "1e9", "99m"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(TersorError, match="--n"):
        parse_lengths(text)


def test_lines_cross_where_their_logarithms_meet() -> None:
    lengths = [1, 2, 4, 8]
    assert crossover(lengths, [1, 4, 16, 64], [3, 6, 12, 24]) == pytest.approx(3)
    assert crossover(lengths, [1, 4, 16, 64], [0.5, 1, 2, 4]) == 1
    assert crossover(lengths, [1, 2, 4, 8], [2, 4, 8, 16]) is None
    assert slope(lengths, [5 * n**1.5 for n in lengths]) == pytest.approx(1.5)


def test_the_command_tells_formulae_and_times(tersor_command: Callable[..., Any]) -> None:
    ran = tersor_command(
        "complexity", "--n", "64,128", "--d", "64", "--heads", "2", "--layer", "linformer", "--measure", "--json"
    )
    attention, linformer = json.loads(ran.out)["layers"]
    assert attention["layer"] == "attention"  # what the other is compared with
    assert [row["n"] for row in linformer["rows"]] == [64, 128]
    assert all(row["seconds"] > 0 and math.isfinite(row["seconds"]) for row in linformer["rows"])
    assert linformer["rows"][0]["cache_bytes"] is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--layer", "reformer"], "'reformer'"), (["--d", "100", "--heads", "7"], "7 heads"), (["--n", "x"], "'x'")],
)
def test_bad_input_is_named(tersor_command: Callable[..., Any], arguments: list[str], named: str) -> None:
    ran = tersor_command("complexity", *arguments)
    assert ran.status == 2
    assert named in ran.err
