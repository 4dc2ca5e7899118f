"""Recipes: a method, and rules that change it for some layers. The last rule that matches a layer wins.

method: gptq
bits: 4
group_size: 128
rules:
  - match: "*.down_proj"       # a pattern of full layer names
    bits: 8
  - match: "model.layers.0.*"
    method: rtn                # another method, with options of its own
  - match: "*.layers.[01].mlp.*"
    skip: true                 # leave as it is

or several steps, each on the result of the last:

steps:
  - {method: greenformers, rank: 0.75}
  - {method: gptq, bits: 4}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tersor.errors import TersorError
from tersor.methods.method import Method, from_options
from tersor.untrusted import read_yaml, readable


@dataclass(frozen=True)
class Rule:
    """What is different for some layers."""

    match: str  # a pattern of full layer names
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method
    method: str | None = None  # another method; None: the recipe's
    skip: bool = False  # whether the layers are left as they are


@dataclass(frozen=True)
class Recipe:
    method: Method
    rules: tuple[Rule, ...] = ()

    @property
    def methods(self) -> list[Method]:
        """The recipe's method and the methods of its rules."""
        return [self.method, *(found for rule in self.rules if (found := self._method_of(rule)) is not None)]

    def method_for(self, layer: str) -> Method | None:
        """The method of one layer, or None where it is left as it is."""
        rule = next((rule for rule in reversed(self.rules) if fnmatchcase(layer, rule.match)), None)
        return self.method if rule is None else self._method_of(rule)

    def _method_of(self, rule: Rule) -> Method | None:
        if rule.skip:
            return None
        base = self.method.options()
        name = rule.method or base["name"]
        inherited = {key: value for key, value in base.items() if key != "name"} if name == base["name"] else {}
        return from_options(name, {**inherited, **rule.options})

    def check_matches(self, layers: Sequence[str]) -> None:
        """Raise TersorError where a rule matches none of the layers."""
        for rule in self.rules:
            if not any(fnmatchcase(layer, rule.match) for layer in layers):
                raise TersorError(f"the rule for {rule.match!r} matches none of the {len(layers)} linear layers")


def make_rules(rules: Sequence[Mapping[str, Any] | Rule]) -> tuple[Rule, ...]:
    """Rules from plain mappings. Raises TersorError naming what is wrong with one."""
    if isinstance(rules, str | Mapping) or not isinstance(rules, Sequence):
        raise TersorError(f"rules is no list but {rules!r}; give a list of mappings, each with `match`")
    made = []
    for n, rule in enumerate(rules, 1):
        if isinstance(rule, Rule):
            made.append(rule)
            continue
        if not isinstance(rule, Mapping) or not isinstance(rule.get("match"), str):
            raise TersorError(f"rule {n} has no `match`, the pattern of the layers that it is for")
        options = {key: value for key, value in rule.items() if key not in ("match", "method", "skip")}
        if not options and not rule.get("method") and not rule.get("skip"):
            raise TersorError(
                f"rule {n}, for {rule['match']!r}, changes nothing; give it an option, a method or skip: true"
            )
        if not isinstance(rule.get("skip", False), bool):
            raise TersorError(f"rule {n}, for {rule['match']!r}, has skip {rule['skip']!r}; true or false is expected")
        if not isinstance(rule.get("method"), str | None):
            raise TersorError(
                f"rule {n}, for {rule['match']!r}, has the method {rule['method']!r}; one name is expected"
            )
        made.append(Rule(rule["match"], options, rule.get("method"), bool(rule.get("skip", False))))
    return tuple(made)


def plain_rule(rule: Rule) -> dict[str, Any]:
    """A rule as a recipe file has it."""
    told: dict[str, Any] = {"match": rule.match, **rule.options}
    if rule.method is not None:
        told["method"] = rule.method
    return told | ({"skip": True} if rule.skip else {})


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file (YAML). Raises TersorError where the file is missing or no YAML, or an option is unknown."""
    content = recipe_content(path, wanted="`method: gptq` and its options")
    if "steps" in content:
        raise TersorError(f"{path} has several steps: tersor compress recipe {path} MODEL --out DIR")
    return _recipe_of(content, str(path))


def read_steps(path: str | Path) -> tuple[Recipe, ...]:
    """The steps of a recipe file; a recipe without `steps` is one step. Raises TersorError naming file and step."""
    content = recipe_content(path, wanted="`steps:`, a list of methods with their options")
    if "steps" not in content:
        return (read_recipe(path),)
    steps, others = content["steps"], sorted(set(content) - {"steps"})
    if others:
        raise TersorError(f"{path}: {others[0]!r} stands beside `steps`; write it into the step that it is for")
    if not isinstance(steps, list) or not steps:
        raise TersorError(f"{path}: steps is no list of methods but {steps!r}")
    made = []
    for n, step in enumerate(steps, 1):
        if not isinstance(step, dict) or "method" not in step:
            raise TersorError(f"{path}: step {n} names no method; give `method: NAME` and its options")
        made.append(_recipe_of(step, f"{path}, step {n}"))
    return tuple(made)


def _recipe_of(content: Mapping[str, Any], where: str) -> Recipe:
    options = {key: value for key, value in content.items() if key not in ("method", "rules")}
    try:
        return Recipe(from_options(content.get("method", "gptq"), options), make_rules(content.get("rules") or ()))
    except TersorError as error:
        raise TersorError(f"{where}: {error}") from None


def recipe_content(path: str | Path, *, wanted: str) -> dict[str, Any]:
    """What a recipe file says. Raises TersorError where it is missing, no YAML, or no mapping. wanted: what the error asks
    for."""
    path = Path(path).expanduser()
    with readable(path):
        if not path.is_file():
            raise TersorError(f"no recipe file at {path}")
    content = read_yaml(path)
    if not isinstance(content, dict):
        found = "is empty" if content is None else "holds no recipe"
        raise TersorError(f"{path} {found}; give {wanted}")
    return content
