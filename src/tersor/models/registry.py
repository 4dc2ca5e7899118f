"""Which models there are, found without importing them, and how to build one by name.

A model's class carries `@register("shvit", task=..., input=..., paper=..., variants={...}, small={...})`. All arguments are
literals, so the index is read from the source text: listing eighty models imports none of them (nor torch, which takes
seconds), and a model whose optional library is absent does not hide the others. Only `create` imports the one file it
needs.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import fnmatch
import importlib
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tersor.errors import OptionError, TersorError
from tersor.models.config import config_from_dict, config_to_dict

if TYPE_CHECKING:
    from torch import nn

ModelClass = TypeVar("ModelClass", bound="type[nn.Module]")


@dataclass(frozen=True)
class ModelInfo:
    """One line of `tersor models`: a named variant, and where it is made."""

    name: str  # "shvit_s1"
    family: str  # the folder: "vision"
    parameters: int  # of the variant as published
    task: str  # what it is for: "classify", "forecast", "language-model", ...; verbs dispatch on it
    input: str  # kind of input: "image", "tokens", "series", "graph", ...
    paper: str
    system: str  # the class's own name, "shvit"; `create(system)` builds the config's defaults
    module: str = field(repr=False)
    class_name: str = field(repr=False)
    overrides: dict[str, Any] = field(repr=False)  # what the variant changes in the config's defaults
    small: dict[str, Any] = field(repr=False)  # overrides that make the model tiny: for tests
    untraceable: str = field(repr=False)  # why torch.export cannot take it; empty: it can

    def load_class(self) -> type[nn.Module]:
        try:
            return typing.cast("type[nn.Module]", getattr(importlib.import_module(self.module), self.class_name))
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("tersor"):
                raise
            raise TersorError(f"{self.name} needs the package {error.name!r}, which is not installed") from error


def register(
    system: str,
    *,
    task: str,
    input: str,
    paper: str,
    variants: dict[str, tuple[int, dict[str, Any]]],
    small: dict[str, Any],
    untraceable: str = "",
) -> Callable[[ModelClass], ModelClass]:
    """Put a model class into the index. Every argument is a literal (see the module docstring).

    variants: published name -> (parameter count, what differs from the config's defaults).
    small: overrides of the defaults with which the tests build a model of a few thousand parameters.
    untraceable: the reason why torch.export, and torch.compile in one graph, fail; the tests hold it true.
    """

    def mark(model_class: ModelClass) -> ModelClass:
        model_class.system = system  # type: ignore[attr-defined]
        return model_class

    return mark


def list_models(pattern: str = "*") -> list[ModelInfo]:
    """The named variants whose "family/name", name, system or task matches a shell pattern, in order of family and file."""
    return [
        info
        for info in _variants().values()
        if any(
            fnmatch.fnmatch(each, pattern)
            for each in (f"{info.family}/{info.name}", info.family, info.name, info.system, info.task)
        )
    ]


def find(name: str) -> ModelInfo:
    """The variant, or the system with its config's defaults (its `parameters` is 0: nobody published it)."""
    known = {**_systems(), **_variants()}
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else "`tersor models` lists what there is"
    raise TersorError(f"no model is named {name!r}; {hint}")


def known(name: str) -> bool:
    """Whether it names an architecture or a variant of one."""
    return name in _systems() or name in _variants()


def create(name: str, /, *, features_only: bool = False, **overrides: Any) -> nn.Module:
    """A freshly initialised model. `overrides` are fields of its config; lists and nested dicts (JSON) are welcome.

    features_only: a features.Backbone, which gives the maps of a vision model's stages; `out_indices` chooses among them.
    """
    if features_only:
        from tersor.models.features import Backbone

        out_indices = overrides.pop("out_indices", None)
        return Backbone(create(name, **overrides), out_indices)
    info = find(name)
    model_class = info.load_class()
    config_class = typing.get_type_hints(model_class.__init__)["config"]
    _check_numbers(name, overrides)
    return model_class(config_from_dict(config_class, {**info.overrides, **overrides}, of=name))


LEAST = {"num_classes": 0, "in_chans": 1}  # options that many models share, which users set


def _check_numbers(name: str, options: Mapping[str, Any]) -> None:
    """Raise OptionError where one of them is no number from its least on."""
    for option, least in LEAST.items():
        value = options.get(option, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name}'s {option} is a whole number from {least} on, not {value!r}")


def options_of(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """{"tersor_model": name, **options}: of a foreign config's entries those that the model's config has."""
    config_class = typing.get_type_hints(find(name).load_class().__init__)["config"]
    known = {each.name for each in dataclasses.fields(config_class)}
    return {"tersor_model": name, **{key: value for key, value in facts.items() if key in known}}


def config_of(model: nn.Module) -> dict[str, Any]:
    """{"tersor_model": system, **config}, ready for config.json; `create(d.pop("tersor_model"), **d)` rebuilds it."""
    system = getattr(type(model), "system", None)
    if system is None:
        raise TersorError(f"{type(model).__name__} is no model of tersor.models: it has no @register")
    return {"tersor_model": system, **config_to_dict(model.config)}


@cache
def _variants() -> dict[str, ModelInfo]:
    found: dict[str, ModelInfo] = {}
    for module, class_name, said in _registrations():
        for name, (parameters, overrides) in said["variants"].items():
            if name in found:
                raise TersorError(f"two models are named {name!r}: {found[name].module} and {module}")
            found[name] = _info(name, parameters, overrides, module, class_name, said)
    return found


@cache
def _systems() -> dict[str, ModelInfo]:
    return {said["system"]: _info(said["system"], 0, {}, m, c, said) for m, c, said in _registrations()}


def _info(
    name: str, parameters: int, overrides: dict[str, Any], module: str, class_name: str, said: dict[str, Any]
) -> ModelInfo:
    return ModelInfo(
        name=name,
        family=module.split(".")[-2],
        parameters=parameters,
        task=said["task"],
        input=said["input"],
        paper=said["paper"],
        system=said["system"],
        module=module,
        class_name=class_name,
        overrides=overrides,
        small=said["small"],
        untraceable=said.get("untraceable", ""),
    )


@cache
def _registrations() -> tuple[tuple[str, str, dict[str, Any]], ...]:
    """(module, class name, arguments of @register) of every registered class under models/<family>/.

    Only the decorators are parsed: with a hundred files, parsing all of them would take longer than all else.
    """
    found = []
    for path in sorted(Path(__file__).parent.glob("*/*.py")):
        source = path.read_text(encoding="utf-8")
        for match in _DECORATED.finditer(source):
            line = source.count("\n", 0, match.start()) + 1
            module = f"{__package__}.{path.parent.name}.{path.stem}"
            found.append((module, match["name"], _literal_arguments(match["call"], f"{path.name}:{line}")))
    return tuple(found)


_DECORATED = re.compile(r"^@(?P<call>register\(\n.*?^\))\n(?:@.*\n)*class (?P<name>\w+)", re.MULTILINE | re.DOTALL)


def _literal_arguments(source: str, where: str) -> dict[str, Any]:
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    try:
        said = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return {"system": ast.literal_eval(call.args[0]), **said}
    except ValueError as error:
        raise TersorError(f"{where}: the arguments of @register must be literals (no names, no calls)") from error
