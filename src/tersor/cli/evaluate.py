"""`tersor eval`: perplexity of a model on a text, or accuracy on images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.options import AsJson, Device
from tersor.cli.progress import progress_bar
from tersor.evaluate.accuracy import accuracy
from tersor.evaluate.perplexity import perplexity


def evaluate(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name such as org/name, or `demo`.")],
    text: Annotated[str, typer.Option(help="A text file (.gz too), or `builtin`.")] = "builtin",
    images: Annotated[
        Path | None,
        typer.Option(help="Labelled images instead: a folder with one subfolder a class, or a packed .npz."),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(help="Evaluate only the first windows.")] = None,
    max_images: Annotated[int | None, typer.Option(help="Evaluate only the first images.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Perplexity of a language model over windows of a text that do not overlap; accuracy of a classifier with --images.

    In each window, tokens 2 to n are predicted.
    """
    if images is not None:
        _accuracy(model, images, max_images, dtype, device, as_json)
        return
    source = text if text == "builtin" else Path(text)
    with progress_bar(quiet=as_json) as progress:
        found = perplexity(
            model, source, seq_len=seq_len, max_windows=max_windows, dtype=dtype, device=device, progress=progress
        )
    if as_json:
        typer.echo(json.dumps({"model": model, **found.__dict__}))
    else:
        typer.echo(
            f"perplexity {found.perplexity:.4f} over {found.tokens:,} tokens in {found.windows} windows of {seq_len}"
        )


def _accuracy(model: str, images: Path, limit: int | None, dtype: str, device: str, as_json: bool) -> None:
    with progress_bar(quiet=as_json) as progress:
        found = accuracy(model, images, max_images=limit, dtype=dtype, device=device, progress=progress)
    if as_json:
        typer.echo(json.dumps({"model": model, **found.__dict__}))
    else:
        typer.echo(f"top-1 accuracy {found.top1:.2f} % (± {found.half_width:.2f}) on {found.images:,} images")
