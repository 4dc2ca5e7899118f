"""`tersor compress`: methods that change a model's structure, or quantize more than its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.cli.method_options import given_options, refuse_others, with_method_options
from tersor.cli.options import AllowPickle, Device, Exclude, Include, Overwrite, Samples, SampleSeed, SummaryAsJson
from tersor.cli.progress import progress_bar
from tersor.cli.summary import print_summary
from tersor.compress import compress as compress_model
from tersor.methods.method import ModelMethod, from_options, methods

METHODS = {name: kind for name, kind in methods().items() if issubclass(kind, ModelMethod)}


def _compress(
    model: Annotated[str, typer.Argument(help="A directory, a hub name such as org/name, `demo` or `demo-vit`.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write; must not exist.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")],
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A text file (.gz too), `builtin`, `hf:NAME`; for images a folder of classes or a packed .npz."
        ),
    ] = None,
    samples: Samples = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens a sample, of a text.")] = 2048,
    seed: SampleSeed = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Precision of the forward passes: auto, float32, ...")] = "auto",
    include: Include = None,
    exclude: Exclude = None,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
    as_json: SummaryAsJson = False,
    **options: Any,
) -> None:
    """Compress a model that fits in memory: factorize, prune, drop tokens, or quantize weights and activations.

    The result is a model directory that `tersor eval`, `tersor.load` and further methods take. `tersor quantize` is for
    weights alone, on models of any size.
    """
    refuse_others(method, ModelMethod)
    chosen = from_options(method, given_options(options))
    with progress_bar(quiet=as_json) as progress:
        result = compress_model(
            model,
            chosen,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            out=out,
            overwrite=overwrite,
            include=include or (),
            exclude=exclude or (),
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps({"out": str(out), **result.summary.as_dict()}))
    else:
        print_summary(result.summary, out)


compress = with_method_options(_compress, METHODS)
