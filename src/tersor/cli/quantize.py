"""`tersor quantize`: the main job. Its options are made from the settings' and the methods' own dataclasses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.cli.job_options import run_best, run_job, split, with_options
from tersor.cli.options import Layers, SummaryAsJson, Variant, opened_as
from tersor.compress.best import NAMES
from tersor.compress.recipe import Recipe, read_recipe
from tersor.errors import TersorError
from tersor.methods.method import BlockMethod, Method, PackedMethod, from_options, methods


def _quantize(
    model: Annotated[str, typer.Argument(help="A directory, a hub name such as org/name, or `demo`.")],
    out: Annotated[
        Path, typer.Option("--out", help="Directory to write; must not exist, or hold this job unfinished.")
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="How the weights are chosen: gptq, rtn, or best and best-fast, which tune on. [default: gptq]"
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file with method, options and rules for single layers.")
    ] = None,
    variant: Variant = None,
    every_layer: Layers = False,
    as_json: SummaryAsJson = False,
    **given: Any,
) -> None:
    """Quantize a model to few bits a weight. The result is a checkpoint that transformers, vLLM and GPTQModel load.

    The model is read and written block by block. A job that is interrupted goes on when the same command is given again.
    Started by torchrun, several processes share the work.

    tersor quantize demo --bits 4 --out demo-4bit
    """
    settings, options = split(given, QUANTIZING.values())
    if "target_bits" in settings and "bits" in options:
        raise TersorError(
            "--bits does nothing beside --target-bits, which chooses each layer's: leave one of the two out"
        )
    if recipe is None and method in NAMES:
        run_best(opened_as(model, variant), out, method, options, settings, every_layer=every_layer, as_json=as_json)
        return
    if recipe is None:
        _check(method or "gptq")
        chosen = Recipe(from_options(method or "gptq", options))
    else:
        if method is not None or options:
            named = "--method" if method is not None else f"--{next(iter(options)).replace('_', '-')}"
            raise TersorError(f"{named} and --recipe exclude each other: write it in {recipe}")
        chosen = read_recipe(recipe)
        _check(chosen.method.name)
    run_job(opened_as(model, variant), out, [chosen], settings, every_layer=every_layer, as_json=as_json)


def _check(method: str) -> None:
    """Raise TersorError where only `tersor compress` takes a method."""
    kind = methods().get(method)
    if kind is not None and issubclass(kind, PackedMethod):
        raise TersorError(f"{method} tunes a packed model: tersor compress {method} PACKED --original MODEL")
    if kind is not None and not _quantizes(kind):
        does = "prunes weights" if issubclass(kind, BlockMethod) else "works on the whole model"
        raise TersorError(f"{method} {does}: tersor compress {method} MODEL")


def _quantizes(kind: type[Method]) -> bool:
    """Whether a method, as it is without options, packs weights block by block."""
    return issubclass(kind, BlockMethod) and kind().quantization() is not None


QUANTIZING = {name: kind for name, kind in methods().items() if _quantizes(kind)}
quantize = with_options(_quantize, QUANTIZING)
