"""`tersor export`: a checkpoint as one GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tersor.checkpoint.gguf_write import export as export_gguf
from tersor.cli.options import AsJson
from tersor.cli.progress import progress_bar


def export(
    model: Annotated[str, typer.Argument(help="A directory, a hub name such as org/name, or `demo`.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write; its name ends in .gguf.")],
    dtype: Annotated[
        str, typer.Option(help="Matrices that are not quantized: auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file where it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model of the LLaMA family as a GGUF file for llama.cpp, quantized layers exactly as they are.

    What no GGUF type holds exactly is refused, with the layer and the reason, before anything is written.
    """
    with progress_bar(quiet=as_json) as progress:
        found = export_gguf(model, out, dtype=dtype, overwrite=overwrite, progress=progress)
    if as_json:
        typer.echo(json.dumps({**found.__dict__, "path": str(found.path)}))
        return
    types = ", ".join(f"{count} {kind}" for kind, count in found.types.items())
    typer.echo(f"{found.path}: {found.architecture}, {found.bytes / 1e6:.1f} MB; tensors: {types}")
    if found.bits:
        typer.echo(
            f"quantized layers: {found.bits_before:.3f} bits a weight in {model}, {found.bits:.3f} here, same values"
        )
    if found.left_out:
        typer.echo(f"left out, as the architecture has no place for them: {', '.join(found.left_out[:8])}")
