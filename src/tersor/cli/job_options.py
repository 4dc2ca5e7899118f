"""Options of a command that runs a job: those of the settings and of the methods, each made from the field that declares it."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from tersor.checkpoint.source import Openable, open_checkpoint
from tersor.cli.options import print_json
from tersor.cli.progress import progress_bar
from tersor.cli.summary import print_summary
from tersor.cli.torchrun import together
from tersor.compress import compress
from tersor.compress.best import steps_for
from tersor.compress.recipe import Recipe
from tersor.compress.settings import Settings, applies, settings_of
from tersor.errors import FinishedError
from tersor.methods.method import Method
from tersor.processes import is_first

NUMBERS = (int, float)


def with_options(
    command: Callable[..., None], kinds: Mapping[str, type[Method]], *, method_options: bool = True
) -> Callable[..., None]:
    """`command` for typer. In place of its `**given` come an option for each setting and for each field of these methods."""

    words = {each.name for kind in kinds.values() for each in dataclasses.fields(kind) if each.metadata.get("word")}

    def run(**arguments: Any) -> None:
        command(**{name: _number(v) if name in words and v is not None else v for name, v in arguments.items()})

    fixed = inspect.signature(command, eval_str=True)
    own = [p for p in fixed.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    options = _options(kinds) if method_options else []
    parameters += [
        each for each in _settings(kinds.values()) if each.name not in {one.name for one in options}
    ] + options
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = command.__doc__
    return run


def split(given: Mapping[str, Any], kinds: Iterable[type[Method]] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the options of these methods that the user set. A name that both have is the method's."""
    names = _names(kinds)
    found = {name: value for name, value in given.items() if value is not None}
    options = {name: value for name, value in found.items() if name in names}
    return {name: value for name, value in found.items() if name not in names}, options


def _names(kinds: Iterable[type[Method]]) -> set[str]:
    return {each.name for kind in kinds for each in dataclasses.fields(kind)}


def run_job(
    model: Openable,
    out: Path,
    steps: Sequence[Recipe],
    settings: Mapping[str, Any],
    *,
    every_layer: bool,
    as_json: bool,
) -> None:
    """Run a job and print what came out; of several processes only the first prints."""
    with (
        together(settings.get("device", "auto")) as device,
        progress_bar(quiet=as_json or not is_first()) as progress,
    ):
        try:
            result = compress(model, steps, out=out, progress=progress, **{**settings, "device": device})
        except FinishedError as finished:
            if is_first():
                if as_json:
                    print_json({"out": str(out), "finished_before": True})
                else:
                    typer.echo(str(finished))
            return
        if not is_first():
            return
    if as_json:
        print_json({"out": str(out), **result.summary.as_dict()})
    else:
        print_summary(result.summary, out, every_layer=every_layer)


def run_best(
    model: str,
    out: Path,
    name: str,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    every_layer: bool,
    as_json: bool,
) -> None:
    """`run_job` with the steps of `best` or `best-fast`, said before they start."""
    with progress_bar(quiet=as_json) as progress:
        opened = open_checkpoint(model, allow_pickle=settings.get("allow_pickle", False))
        steps = steps_for(name, opened, options, settings_of({**settings, "progress": progress}))
    run_job(opened, out, steps, settings, every_layer=every_layer, as_json=as_json)


def _settings(kinds: Iterable[type[Method]]) -> list[inspect.Parameter]:
    """Every setting; those that do nothing for these methods are not shown, and are refused with the reason."""
    hints, parameters, methods = typing.get_type_hints(Settings), [], [kind() for kind in kinds]
    for each in dataclasses.fields(Settings):
        about = each.metadata
        if about["typed"] is object:
            continue
        kind = about["typed"] or hints[each.name]
        annotation: Any = list[str] | None if kind == tuple[str, ...] else kind | None
        shown = (
            "" if each.default is None or each.default is False or each.default == () else f" [default: {each.default}]"
        )
        hidden = not applies(each, methods, by_name=True)
        option = typer.Option(
            None, f"--{each.name.replace('_', '-')}", help=about["help"] + shown, show_default=False, hidden=hidden
        )
        parameters.append(_parameter(each.name, annotation, option))
    return parameters


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
        shown = {name: "not set" if value is None else value for name, value in owners.items()}
        if len(kinds) == 1:
            defaults = f"default: {next(iter(shown.values()))}"
        else:
            defaults = ", ".join(f"{name} default: {value}" for name, value in shown.items())
        help = f"{each.metadata.get('help', '')} [{defaults}]"
        option = typer.Option(None, *flags, help=help, rich_help_panel="Method", show_default=False)
        parameters[each.name] = _parameter(each.name, annotation, option)
    return list(parameters.values())


def _parameter(name: str, annotation: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _number(text: str) -> int | float | str:
    for kind in NUMBERS:
        try:
            return kind(text)
        except ValueError:
            continue
    return text
