from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tersor.models


def test_lists_the_variants_that_match(tersor_command: Callable[..., Any]) -> None:
    ran = tersor_command("models", "shvit*")
    assert ran.status == 0
    assert ["shvit_s1", "classify", "6,330,808", "arXiv", "2401.16456"] in [
        line.split() for line in ran.out.splitlines()
    ]
    assert "efficientformer" not in ran.out


def test_lists_every_architecture_in_a_line_of_80_columns(tersor_command: Callable[..., Any]) -> None:
    lines = tersor_command("models").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    shown = {line.split()[0] for line in lines}
    assert {info.system for info in tersor.models.list()} | {"vision", "series"} <= shown


def test_a_task_is_a_pattern_and_json_is_json(tersor_command: Callable[..., Any]) -> None:
    found = json.loads(tersor_command("models", "forecast", "--json").out)
    assert {each["task"] for each in found} == {"forecast"}
    assert "itransformer_etth1" in [each["name"] for each in found]


def test_says_when_nothing_matches(tersor_command: Callable[..., Any]) -> None:
    ran = tersor_command("models", "nothing*")
    assert ran.status == 2
    assert "no model matches 'nothing*'" in ran.err
    assert "did you mean vision?" in tersor_command("models", "visoin").err
    assert "shvit_s1 " in tersor_command("models", "vision").out


@pytest.mark.parametrize("name", ["shvit", "shvit_s2"])
def test_shows_an_architecture(name: str, tersor_command: Callable[..., Any]) -> None:
    ran = tersor_command("show", name)
    assert ran.out.startswith("SHViT, the single-head vision transformer")
    assert "shvit_s4" in ran.out
    assert "16,588,484 parameters" in ran.out


def test_every_name_that_train_takes_is_found_by_models() -> None:
    systems = {info.system for info in tersor.models.list()}
    assert all(tersor.models.list(name) for name in systems | {info.name for info in tersor.models.list()})
    registered = {
        found.stem for found in Path(tersor.models.__file__).parent.glob("*/*.py") if "@register" in found.read_text()
    }
    assert registered <= {info.module.rpartition(".")[2] for info in tersor.models.list()}


def test_shows_an_architecture_as_json(tersor_command: Callable[..., Any]) -> None:
    told = json.loads(tersor_command("show", "shvit", "--json").out)
    assert (told["system"], told["task"], told["parameters"]["shvit_s4"]) == ("shvit", "classify", 16_588_484)
    assert told["description"].startswith("SHViT")
