"""The taxonomies of five surveys, and what tersor has of them: `tersor catalog`.

One YAML file a survey in `surveys/`. A node names the architectures that belong to it by patterns of family/task/input/system,
and other parts of tersor; methods name their nodes themselves. A node is `held` where one of these exists, `partly` held where
the file says what is missing, and `not held` where none exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tersor.errors import TersorError
from tersor.methods.method import methods
from tersor.models.registry import ModelInfo, find, list_models
from tersor.untrusted import read_yaml

FOLDER = Path(__file__).parent / "surveys"
SURVEYS = ("inference", "practical", "after", "applications", "rl")


@dataclass(frozen=True)
class Node:
    """A place in a survey's taxonomy. Its `state` is held, partly or not held."""

    survey: str
    name: str
    title: str
    methods: tuple[str, ...]
    models: tuple[str, ...]
    features: tuple[str, ...]
    missing: str = ""  # what is missing where the state is partly

    @property
    def state(self) -> str:
        if not (self.methods or self.models or self.features):
            return "not held"
        return "partly" if self.missing else "held"

    @property
    def place(self) -> str:
        return f"{self.survey}/{self.name}"


@dataclass(frozen=True)
class Survey:
    name: str
    title: str
    paper: str
    nodes: tuple[Node, ...]


def catalog(survey: str | None = None) -> list[Survey]:
    """One survey, or all. Raises TersorError where there is none of the name."""
    if survey is not None and survey not in SURVEYS:
        raise TersorError(f"no survey is called {survey!r}; there are {', '.join(SURVEYS)}")
    systems = architectures()
    return [_survey(name, systems) for name in SURVEYS if survey in (None, name)]


def architectures() -> dict[str, str]:
    """family/task/input/system of every architecture, by system."""
    found: dict[str, ModelInfo] = {info.system: find(info.system) for info in list_models()}
    return {system: f"{info.family}/{info.task}/{info.input}/{system}" for system, info in sorted(found.items())}


def patterns(node: Mapping[str, Any]) -> list[str]:
    return list(node.get("models") or ())


def content(name: str) -> dict[str, Any]:
    """What a survey's file says."""
    found = read_yaml(FOLDER / f"{name}.yaml")
    assert isinstance(found, dict)
    return found


def _survey(name: str, systems: Mapping[str, str]) -> Survey:
    said = content(name)
    nodes = []
    for key, node in said["nodes"].items():
        mine = [system for system, place in systems.items() if any(fnmatchcase(place, each) for each in patterns(node))]
        how = [method for method, kind in methods().items() if f"{name}/{key}" in kind.survey_nodes]
        features = tuple(node.get("features") or ())
        nodes.append(Node(name, key, node["title"], tuple(how), tuple(mine), features, node.get("partly", "")))
    return Survey(name, said["title"], said["paper"], tuple(nodes))
