"""Every method and architecture has its place in the surveys, and nothing is named that is not there."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest

from tersor.advise.catalog import SURVEYS, architectures, catalog, content, patterns
from tersor.advise.complexity import KINDS
from tersor.errors import TersorError
from tersor.methods.method import methods


def test_every_method_names_a_node_that_there_is() -> None:
    places = {node.place for survey in catalog() for node in survey.nodes}
    for name, kind in methods().items():
        assert kind.survey_nodes, f"{name} names no node of a survey"
        assert set(kind.survey_nodes) <= places, name


def test_every_architecture_has_a_node_and_every_pattern_an_architecture() -> None:
    placed = {model for survey in catalog() for node in survey.nodes for model in node.models}
    assert placed == set(architectures())
    for survey in SURVEYS:
        for key, node in content(survey)["nodes"].items():
            for pattern in patterns(node):
                assert any(fnmatchcase(place, pattern) for place in architectures().values()), (survey, key, pattern)


def test_parts_that_are_named_are_there() -> None:
    for survey in catalog():
        for node in survey.nodes:
            for feature in node.features:
                assert importlib.util.find_spec(feature) is not None, feature


def test_a_node_is_held_only_by_something() -> None:
    for survey in catalog():
        for node in survey.nodes:
            assert (node.state == "not held") == (not (node.methods or node.models or node.features))
            if node.state == "not held":
                assert not node.missing, f"{node.place} is said to be held partly by nothing"


def test_layers_of_the_complexity_table_have_a_node() -> None:
    places = {node.place for survey in catalog() for node in survey.nodes}
    assert {kind.node for kind in KINDS} <= places


def test_the_command_prints_one_survey_or_all(tersor_command: Callable[..., Any]) -> None:
    said = json.loads(tersor_command("catalog", "--survey", "practical", "--json").out)
    (survey,) = said["surveys"]
    held = {node["name"]: node["state"] for node in survey["nodes"]}
    assert held["quantization"] == "held"
    assert held["reversible"] == "not held"
    assert "Reinforcement Learning" in tersor_command("catalog").out


def test_an_unknown_survey_is_refused_by_name(tersor_command: Callable[..., Any]) -> None:
    ran = tersor_command("catalog", "--survey", "training")
    assert ran.status == 2
    assert "'training'" in ran.err
    with pytest.raises(TersorError, match="there are inference"):
        catalog("training")
