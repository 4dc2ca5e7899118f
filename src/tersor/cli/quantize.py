"""`tersor quantize`: the main job. Its method options are made from the methods' own dataclasses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.calibrate.parallel import is_first
from tersor.cli.method_options import chosen_recipe, given_options, refuse_others, with_method_options
from tersor.cli.options import AllowPickle, Device, Exclude, Include, Overwrite, Samples, SampleSeed, SummaryAsJson
from tersor.cli.progress import progress_bar
from tersor.cli.summary import print_summary
from tersor.cli.torchrun import together
from tersor.compress import compress
from tersor.compress.layout_choice import AUTO
from tersor.methods.method import BlockMethod, methods


def _quantize(
    model: Annotated[str, typer.Argument(help="A directory, a hub name such as org/name, or `demo`.")],
    out: Annotated[
        Path, typer.Option("--out", help="Directory to write; must not exist, or hold this job unfinished.")
    ],
    method: Annotated[str | None, typer.Option(help="How the weights are chosen. [default: gptq]")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file with method, options and rules for single layers.")
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help="A text file (.gz too), `builtin`, or `hf:NAME`; for images a folder of classes or a packed .npz."
        ),
    ] = "builtin",
    samples: Samples = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens a sample; at most what the model has positions for.")] = 2048,
    seed: SampleSeed = 0,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Precision of the forward passes: auto, float32, bfloat16, float16.")
    ] = "auto",
    format: Annotated[
        str,
        typer.Option(
            help="gptq, gptq_v2, compressed-tensors, or auto: gptq where it holds every layer, else compressed-tensors."
        ),
    ] = AUTO,
    include: Include = None,
    exclude: Exclude = None,
    head: Annotated[bool, typer.Option("--head", help="Quantize the output head too.")] = False,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Quantize the token embedding too, in format compressed-tensors.")
    ] = False,
    target_tp: Annotated[int, typer.Option(help="Check that the layers split over so many devices when served.")] = 1,
    experts: Annotated[
        str, typer.Option(help="Experts that calibrate with a token: as-is, top-k:N, or all, by the router's weight.")
    ] = "as-is",
    activations: Annotated[
        str, typer.Option(help="Where samples wait between blocks: device, cpu or disk.")
    ] = "device",
    allow_pickle: AllowPickle = False,
    redo: Annotated[list[str] | None, typer.Option(help="Solve the blocks of layers that match again.")] = None,
    overwrite: Overwrite = False,
    as_json: SummaryAsJson = False,
    **options: Any,
) -> None:
    """Quantize a model and write it as a checkpoint that transformers, vLLM and GPTQModel load.

    The model is read and written block by block. A job that is interrupted goes on when the same command is given again.
    Started by torchrun, several processes share the work.
    """
    refuse_others(method or "gptq", BlockMethod)
    chosen = chosen_recipe(recipe, method, given_options(options), default="gptq")
    refuse_others(chosen.method.name, BlockMethod)
    with together(device) as device, progress_bar(quiet=as_json or not is_first()) as progress:
        result = compress(
            model,
            chosen.method,
            rules=chosen.rules,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            format=format,
            out=out,
            overwrite=overwrite,
            include=include or (),
            exclude=exclude or (),
            head=head,
            embeddings=embeddings,
            target_tp=target_tp,
            experts=experts,
            activations=activations,
            allow_pickle=allow_pickle,
            redo=redo or (),
            progress=progress,
        )
        if not is_first():
            return
    if as_json:
        typer.echo(json.dumps({"out": str(out), **result.summary.as_dict()}))
    else:
        print_summary(result.summary, out)


quantize = with_method_options(
    _quantize, {name: kind for name, kind in methods().items() if issubclass(kind, BlockMethod)}
)
