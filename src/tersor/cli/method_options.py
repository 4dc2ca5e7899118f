"""Options of a command that come from the methods' own dataclasses, one per field."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from tersor.compress.recipe import Recipe, read_recipe
from tersor.errors import TersorError
from tersor.methods.method import Method, ModelMethod, from_options, methods


def with_method_options(command: Callable[..., None], kinds: Mapping[str, type[Method]]) -> Callable[..., None]:
    """A command for typer: `command`, whose `**options` are replaced by the fields of these methods."""

    def run(**arguments: Any) -> None:
        command(**arguments)

    fixed = inspect.signature(command, eval_str=True)
    own = [p for p in fixed.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + _options(kinds)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = command.__doc__
    return run


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the user set; numbers where an option takes a number or a word."""
    given = {name: value for name, value in options.items() if value is not None}
    return {name: _number(value) if isinstance(value, str) else value for name, value in given.items()}


def chosen_recipe(path: Path | None, method: str | None, options: dict[str, Any], *, default: str) -> Recipe:
    """The recipe file, or the method with its options. Raises TersorError where both are given."""
    if path is None:
        return Recipe(from_options(method or default, options))
    if method is not None or options:
        named = ["--method"] if method is not None else [f"--{name.replace('_', '-')}" for name in options]
        raise TersorError(f"{named[0]} and --recipe exclude each other: write it in {path}")
    return read_recipe(path)


def refuse_others(method: str, wanted: type[Method]) -> None:
    """Raise TersorError where a method belongs to the other verb, `compress` or `quantize`."""
    kind = methods().get(method)
    if kind is None or issubclass(kind, wanted):
        return
    way, verb = ("on the whole model", "compress") if issubclass(kind, ModelMethod) else ("block by block", "quantize")
    raise TersorError(f"{method} works {way}: tersor {verb} --method {method}")


def _options(kinds: Mapping[str, type[Method]]) -> list[inspect.Parameter]:
    """One option per field that a method has; unset ones keep the method's own default."""
    parameters: dict[str, inspect.Parameter] = {}
    for owner, each in ((kind, field) for kind in kinds.values() for field in dataclasses.fields(kind)):
        if each.name in parameters:
            continue
        default, dashed = each.default, each.name.replace("_", "-")
        owners = {
            name: f.default for name, kind in kinds.items() for f in dataclasses.fields(kind) if f.name == each.name
        }
        annotation: Any
        flags = [each.metadata["flag"]] if each.metadata.get("flag") else []
        if isinstance(default, bool):
            flags, annotation = flags or [f"--{dashed}/--no-{dashed}"], bool | None
        elif each.metadata.get("word"):  # a number or a word
            annotation = str | None
        else:
            annotation = typing.get_type_hints(owner)[each.name] | None
        defaults = ", ".join(
            f"{name} default: {'not set' if value is None else value}" for name, value in owners.items()
        )
        help = f"{each.metadata.get('help', '')} [{defaults}]"
        option = typer.Option(None, *flags, help=help, rich_help_panel="Method")
        parameters[each.name] = inspect.Parameter(
            each.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation
        )
    return list(parameters.values())


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
