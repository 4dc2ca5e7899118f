"""`tersor eval`: perplexity of a model on a text, or accuracy on images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.options import AsJson, Device, Variant, opened_as
from tersor.cli.progress import progress_bar
from tersor.errors import TersorError
from tersor.evaluate.accuracy import accuracy
from tersor.evaluate.divergence import Divergence, Estimate, divergence
from tersor.evaluate.perplexity import perplexity


def evaluate(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name such as org/name, or `demo`.")],
    text: Annotated[str, typer.Option(help="A text file (.gz too), or `builtin`.")] = "builtin",
    images: Annotated[
        Path | None,
        typer.Option(help="Labelled images instead: a folder with one subfolder a class, or a packed .npz."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The original: how far the predictions are from its own, token by token.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(help="Evaluate only the first windows.")] = None,
    max_images: Annotated[int | None, typer.Option(help="Evaluate only the first images.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a language model over windows of a text that do not overlap; accuracy of a classifier with --images.

    In each window, tokens 2 to n are predicted. With --against, the model's predictions are compared with the original's.

    Examples: `tersor eval demo-4bit`, `tersor eval demo-4bit --against demo --text book.txt`.
    """
    model = opened_as(model, variant)
    if against is not None:
        if images is not None:
            raise TersorError("--against compares language models on a text; leave --images out")
        _against(model, against, text, seq_len, max_windows, dtype, device, as_json)
        return
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


def _against(
    model: str, base: str, text: str, seq_len: int, most: int | None, dtype: str, device: str, as_json: bool
) -> None:
    source = text if text == "builtin" else Path(text)
    with progress_bar(quiet=as_json) as progress:
        found = divergence(
            model, base, source, seq_len=seq_len, max_windows=most, dtype=dtype, device=device, progress=progress
        )
    if as_json:
        typer.echo(json.dumps({"model": model, "against": base, **found.as_dict()}))
        return
    for line in _told(found):
        typer.echo(line)


def _told(found: Divergence) -> list[str]:
    quantiles = ", ".join(f"{name} {value:.3g}" for name, value in found.kl_quantiles.items())
    lines = [
        f"{found.tokens:,} tokens in {found.windows} windows of {found.seq_len}; ± is half of a 95 % interval",
        f"perplexity       {_value(found.perplexity)}, the original's {_value(found.base_perplexity)}",
        f"their ratio      {_value(found.ratio)}",
        f"KL divergence    {_value(found.kl)} nats; {quantiles}",
        f"  the other way  {_value(found.reverse_kl)} nats",
    ]
    if found.noise_floor is not None:
        lines.append(f"  noise floor    {found.noise_floor:.3g} nats: the original with itself in bfloat16")
    lines += [
        f"same choice      {_value(found.same_top1, 100)} % of the tokens",
        f"  flips          {100 * found.harmful_flips:.2f} % from right to wrong, "
        f"{100 * found.helpful_flips:.2f} % from wrong to right",
        f"  ten likeliest  {100 * found.overlap:.1f} % in common",
        "",
        "by the original's confidence   tokens        KL   same choice",
    ]
    for each in found.buckets:
        lines.append(
            f"  {each.low:.3f} to {each.high:.3f}         {each.tokens:>9,}  {each.kl:>8.4f}  {100 * each.same_top1:>10.1f} %"
        )
    lines += ["", "most different:"]
    lines += [f"  {each.kl:.3f} nats in window {each.window}: {json.dumps(each.text)}" for each in found.passages]
    return lines


def _value(estimate: Estimate, scale: float = 1) -> str:
    half = "" if estimate.half_width is None else f" ± {scale * estimate.half_width:.2g}"
    return f"{scale * estimate.mean:.4g}{half}"


def _accuracy(model: str, images: Path, limit: int | None, dtype: str, device: str, as_json: bool) -> None:
    with progress_bar(quiet=as_json) as progress:
        found = accuracy(model, images, max_images=limit, dtype=dtype, device=device, progress=progress)
    if as_json:
        typer.echo(json.dumps({"model": model, **found.__dict__}))
    else:
        typer.echo(f"top-1 accuracy {found.top1:.2f} % (± {found.half_width:.2f}) on {found.images:,} images")
