"""The table's formulae: as torch counts, of the order that is stated, and lengths as people write them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tersor.advise.complexity import KINDS, Kind, Shape, counted, crossover, kind_named, parse_lengths, slope, timed
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
    assert parse_lengths("2k,512,2048") == [512, 2048]


@pytest.mark.parametrize("text", ["", "8k..1k", "k", "1..", "-4", "1e9", "99m"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(TersorError, match="--n"):
        parse_lengths(text)


def test_lines_cross_where_their_logarithms_meet() -> None:
    lengths = [1, 2, 4, 8]
    assert crossover(lengths, [1, 4, 16, 64], [3, 6, 12, 24]) == pytest.approx(3)
    assert crossover(lengths, [1, 4, 16, 64], [0.5, 1, 2, 4]) == 1
    assert crossover(lengths, [1, 2, 4, 8], [2, 4, 8, 16]) is None
    assert crossover(lengths, [1, 4, 16, None], [3, 6, 12, 24]) == pytest.approx(3)  # as far as both were timed
    assert crossover(lengths, [None] * 4, [1, 2, 4, 8]) is None
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


def test_what_would_not_fit_or_takes_too_long_is_not_timed() -> None:
    hopfield = kind_named("hopfield")
    shapes = [Shape(n, 16, 2) for n in (32, 64, 1 << 20)]  # the last would hold terabytes
    built: list[int] = []

    def build(shape: Shape) -> Any:
        built.append(shape.n)
        return hopfield.build(shape)

    counted_kind = replace(hopfield, build=build)
    found = timed(counted_kind, shapes, most_bytes=1e9)
    assert [each is None for each in found] == [False, False, True]
    found = timed(counted_kind, shapes, limit=0.0, most_bytes=math.inf)
    assert [each is None for each in found] == [False, True, True]
    assert timed(counted_kind, shapes[2:], limit=0.0, most_bytes=math.inf) == [None]  # by a shorter length of its own
    assert set(built) == {32, 64, 1024}


def test_a_length_that_is_not_timed_is_a_dash(tersor_command: Callable[..., Any]) -> None:
    asked = ("complexity", "--n", "64,8m", "--d", "16", "--heads", "2", "--layer", "hopfield", "--measure")
    ran = tersor_command(*asked)
    assert ran.status == 0, ran.err
    assert "-: not timed: it would hold more than" in ran.out
    ran = tersor_command(*asked, "--json")
    assert [row["seconds"] is None for row in json.loads(ran.out)["layers"][1]["rows"]] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--layer", "reformer"], "'reformer'"), (["--d", "100", "--heads", "7"], "7 heads"), (["--n", "x"], "'x'")],
)
def test_bad_input_is_named(tersor_command: Callable[..., Any], arguments: list[str], named: str) -> None:
    ran = tersor_command("complexity", *arguments)
    assert ran.status == 2
    assert named in ran.err
