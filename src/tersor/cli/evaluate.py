"""`tersor eval`: perplexity of a model on a text, accuracy on images, or tasks of EleutherAI's harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.harness import given, refuse, show_harness
from tersor.cli.options import AsJson, Device, Variant, opened_as
from tersor.cli.progress import progress_bar
from tersor.errors import TersorError
from tersor.evaluate.accuracy import accuracy
from tersor.evaluate.divergence import Divergence, Estimate, divergence
from tersor.evaluate.perplexity import perplexity


def evaluate(
    context: typer.Context,
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
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of EleutherAI's harness instead, such as lambada_openai,arc_easy.")
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="A folder of YAML files that define --tasks; code they name is run.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate only the first documents of each of --tasks.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question of --tasks.")] = None,
    batch_size: Annotated[str, typer.Option(help="Requests of --tasks that run together: a number, or auto.")] = "auto",
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put the questions of --tasks in the tokenizer's form of a chat.")
    ] = False,
    device: Device = "auto",
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a language model over windows of a text that do not overlap; accuracy of a classifier with --images.

    In each window, tokens 2 to n are predicted. With --against, the model's predictions are compared with the original's.

    With --tasks, the model answers tasks of EleutherAI's harness, in windows of its own length or of --seq-len.

    Examples: `tersor eval demo-4bit`, `tersor eval demo-4bit --against demo --text book.txt`,
    `tersor eval demo-4bit --tasks lambada_openai --limit 100`.
    """
    model = opened_as(model, variant)
    if tasks is not None:
        refuse(context, "--tasks", ("text", "images", "against", "max_windows", "max_images"))
        length = seq_len if given(context, "seq_len") else None
        show_harness(
            model, tasks, tasks_dir, limit, num_fewshot, batch_size, length, chat_template, dtype, device, as_json
        )
        return
    refuse(
        context,
        "perplexity and accuracy",
        ("tasks_dir", "limit", "num_fewshot", "batch_size", "chat_template"),
        "give --tasks",
    )
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
