"""Options that several commands have, with their help, and the refusal of those that do nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tersor.errors import TersorError
from tersor.untrusted import check_number, readable

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Samples = Annotated[int, typer.Option(help="Calibration samples.")]
Variant = Annotated[
    str | None,
    typer.Option("--as", help="Which model of `tersor models` a published weight file is, such as shvit_s1."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
SummaryAsJson = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]
Layers = Annotated[bool, typer.Option("--layers", help="Show every layer, however many there are.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="A directory or hub name of a tokenizer, or `bytes`, in place of the model's own."),
]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token every time.")]
TopK = Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens only; 0: from all.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the fewest tokens that have this probability together.")]
MinP = Annotated[
    float | None, typer.Option(help="Draw from tokens with this share of the likeliest one's probability.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Makes tokens that were there already less likely; 1 does nothing.")
]
SamplingSeed = Annotated[int, typer.Option("--seed", help="Seed of the sampling.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def print_json(value: Any) -> None:
    """One object on standard output, in the JSON of every parser: what is not finite is null."""
    typer.echo(json.dumps(finite(value), allow_nan=False))


def finite(value: Any) -> Any:
    """The value with None for each number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def spare(given: Path, option: str, out: Path | None) -> None:
    """Refuse an output that is the very file that the command reads."""
    if out is not None and out.exists() and given.exists() and out.samefile(given):
        raise TersorError(f"{option} {out} is the file that is read; give another name")


def refuse_without_folder(option: str, path: Path) -> None:
    """Raise TersorError where the folder that a file is to be written into is not there."""
    with readable(path):
        if not path.expanduser().absolute().parent.is_dir():
            raise TersorError(f"{option} {path}: there is no folder {path.parent}; make it, or give another name")


def refuse_to_replace(option: str, path: Path | None, *, overwrite: bool) -> None:
    """Raise TersorError where the file exists already."""
    with readable(path or "."):
        if path is None or not path.exists():
            return
        if path.is_dir():
            raise TersorError(f"{option} {path} is a folder; give the file to write")
    if not overwrite:
        raise TersorError(f"{option} {path} exists; give another name, or --overwrite to replace it")


class Verb(TyperCommand):
    """A command whose whole numbers fit in 64 bits."""

    def invoke(self, ctx: Any) -> Any:
        for name, value in ctx.params.items():
            check_number(f"--{name.replace('_', '-')}", value)
        return super().invoke(ctx)


def opened_as(model: str, variant: str | None) -> str:
    """The model's name; with --as, the directory that holds the published file in our layout."""
    if variant is None:
        return model
    from tersor.checkpoint.published import checkpoint_as

    return str(checkpoint_as(model, variant))


def given(context: typer.Context, option: str) -> bool:
    """Whether the user gave this option (a parameter's name) on the command line."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def refuse(context: typer.Context, what: str, options: Iterable[str], way_out: str = "leave it out") -> None:
    """Raise TersorError where the user gave one of the options, which do nothing for `what`."""
    for option in options:
        if given(context, option):
            raise TersorError(f"--{option.replace('_', '-')} does nothing for {what}; {way_out}")
