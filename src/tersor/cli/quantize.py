"""`tersor quantize`: the main job. Its method options are made from the methods' own dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tersor.calibrate.parallel import is_first
from tersor.calibrate.statistics import is_expert
from tersor.cli.progress import progress_bar
from tersor.cli.torchrun import together
from tersor.compress import compress
from tersor.compress.method import Method, from_options, methods
from tersor.compress.recipe import Recipe, read_recipe
from tersor.compress.result import Summary
from tersor.errors import TersorError


def _quantize(
    model: Annotated[str, typer.Argument(help="A directory, a hub name such as org/name, or `demo`.")],
    out: Annotated[
        Path, typer.Option("--out", help="Directory to write; must not exist, or hold this job unfinished.")
    ],
    method: Annotated[str | None, typer.Option(help="How the weights are chosen. [default: gptq]")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file with method, options and rules for single layers.")
    ] = None,
    calibration: Annotated[str, typer.Option(help="A text file (.gz too), `builtin`, or `hf:NAME`.")] = "builtin",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens a sample; at most what the model has positions for.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the choice of samples.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Precision of the forward passes: auto, float32, bfloat16, float16.")
    ] = "auto",
    format: Annotated[str, typer.Option(help="gptq, gptq_v2 or compressed-tensors.")] = "gptq",
    include: Annotated[list[str] | None, typer.Option(help="Only layers that match, such as `*.mlp.*`.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not layers that match.")] = None,
    head: Annotated[bool, typer.Option("--head", help="Quantize the output head too.")] = False,
    target_tp: Annotated[int, typer.Option(help="Check that the layers split over so many devices when served.")] = 1,
    experts: Annotated[
        str, typer.Option(help="Experts that calibrate with a token: as-is, top-k:N, or all, by the router's weight.")
    ] = "as-is",
    activations: Annotated[
        str, typer.Option(help="Where samples wait between blocks: device, cpu or disk.")
    ] = "device",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights (.bin) too.")] = False,
    redo: Annotated[list[str] | None, typer.Option(help="Solve the blocks of layers that match again.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
    **options: Any,
) -> None:
    """Quantize a model and write it as a checkpoint that transformers, vLLM and GPTQModel load.

    The model is read and written block by block. A job that is interrupted goes on when the same command is given again.
    Started by torchrun, several processes share the work.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "bits" in given and str(given["bits"]).isdigit():
        given["bits"] = int(given["bits"])
    chosen = _recipe(recipe, method, given)
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


def _recipe(path: Path | None, method: str | None, options: dict[str, Any]) -> Recipe:
    if path is None:
        return Recipe(from_options(method or "gptq", options))
    if method is not None or options:
        named = ["--method"] if method is not None else [f"--{name.replace('_', '-')}" for name in options]
        raise TersorError(f"{named[0]} and --recipe exclude each other: write it in {path}")
    return read_recipe(path)


def print_summary(summary: Summary, out: Path) -> None:
    console = Console()
    table = Table(title=None, box=None, pad_edge=False)
    for column in ("layer", "bits", "error", "damping", "tokens", "seconds", ""):
        table.add_column(column, justify="left" if column in ("layer", "") else "right")
    for layer in summary.layers:
        table.add_row(
            layer.name,
            f"{layer.bits:g}",
            f"{layer.error:.4g}",
            f"{layer.damp:g}",
            f"{layer.tokens:,}",
            f"{layer.seconds:.2f}",
            layer.note,
        )
    console.print(table)
    experts = [layer for layer in summary.layers if is_expert(layer.name)]
    if experts:
        tokens = [layer.tokens for layer in experts]
        console.print(
            f"{len(experts)} experts, calibrated with {min(tokens):,} to {max(tokens):,} tokens each; "
            f"{tokens.count(0) or 'none'} without"
        )
    sizes = ""
    if summary.size_before and summary.size_after:
        ratio = summary.size_before / summary.size_after
        sizes = f"{summary.size_before / 1e6:.1f} MB -> {summary.size_after / 1e6:.1f} MB ({ratio:.2f}x smaller), "
    blocks = [seconds for name, seconds in summary.seconds_per_block.items() if name]
    console.print(
        f"{out}: {sizes}{summary.bits_per_weight:.3f} bits a quantized weight\n"
        f"{summary.seconds:.1f} s in all, {sum(blocks) / max(len(blocks), 1):.1f} s a block, "
        f"peak memory {summary.peak_memory / 1e9:.2f} GB"
        + (f", {summary.resumed_blocks} blocks from an earlier run" if summary.resumed_blocks else "")
    )
    if summary.divergence is not None:
        console.print(
            f"predictions on a sample: KL divergence {summary.divergence:.4f} nats from the original, "
            f"{summary.agreement:.1%} of the first choices the same"
        )


def _method_options(known: dict[str, type[Method]]) -> list[inspect.Parameter]:
    """One option per field that a method has; unset ones keep the method's own default."""
    parameters: dict[str, inspect.Parameter] = {}
    for name, kind in known.items():
        for each in dataclasses.fields(kind):
            if each.name in parameters:
                continue
            default = each.default
            annotation: Any
            flags = [each.metadata["flag"]] if each.metadata.get("flag") else []
            if isinstance(default, bool):
                dashed = each.name.replace("_", "-")
                flags, annotation = flags or [f"--{dashed}/--no-{dashed}"], bool | None
            else:
                annotation = str | None if each.name == "bits" else type(default) | None
            help = f"{each.metadata.get('help', '')} [{name} default: {default}]"
            option = typer.Option(None, *flags, help=help, rich_help_panel="Method")
            parameters[each.name] = inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation
            )
    return list(parameters.values())


def quantize(**arguments: Any) -> None:
    _quantize(**arguments)


def _declare() -> None:
    fixed = inspect.signature(_quantize, eval_str=True)
    own = [p for p in fixed.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    quantizers = {name: kind for name, kind in methods().items() if kind.layouts}
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + _method_options(quantizers)
    quantize.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    quantize.__annotations__ = {p.name: p.annotation for p in parameters}
    quantize.__doc__ = _quantize.__doc__


_declare()
