"""`tersor eval`: perplexity of a model on a text, accuracy on images, what a compressed model lost, or tasks of a harness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.checkpoint.source import Checkpoint, Openable, open_checkpoint
from tersor.cli import comparison
from tersor.cli.comparison import INTERVAL
from tersor.cli.harness import show_harness
from tersor.cli.options import AsJson, Device, Variant, given, opened_as, print_json, refuse
from tersor.cli.progress import progress_bar
from tersor.errors import TersorError
from tersor.evaluate.accuracy import accuracy
from tersor.evaluate.agreement import agreement
from tersor.evaluate.anchor import anchor_of
from tersor.evaluate.divergence import CACHE_SIZE, divergence
from tersor.evaluate.logit_cache import bytes_in
from tersor.evaluate.perplexity import perplexity
from tersor.evaluate.similarities import similarities
from tersor.progress import Progress
from tersor.tasks.compared import FORECASTS, Inputs, check_evaluated_on, check_inputs, compared_on
from tersor.tasks.forecast_compared import forecasts_compared
from tersor.tasks.graphs_compared import graphs_compared

# Options that do nothing with --against, by what the models are compared on.
IDLE = {
    "text": ("max_images",),
    "sentences": ("seq_len", "max_windows", "max_images", "cache", "cache_size", "stream"),
    "images": ("text", "seq_len", "max_windows", "cache", "cache_size", "stream"),
    "data": ("text", "seq_len", "max_images", "cache", "cache_size", "stream"),
    "graph": ("text", "seq_len", "max_windows", "max_images", "cache", "cache_size", "stream"),
}
Compare = Callable[[Openable, Progress], Any]  # a model, beside the original


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name such as org/name, or `demo`.")],
    text: Annotated[str, typer.Option(help="A text file (.gz too), or `builtin`.")] = "builtin",
    images: Annotated[
        Path | None,
        typer.Option(help="Labelled images instead: a folder with one subfolder a class, or a packed .npz."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --against: a table for forecasters, a graph for graph models.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The original: how far the predictions are from its own, one by one.")
    ] = None,
    anchors: Annotated[
        bool, typer.Option("--anchors", help="With --against: also the original rounded to 8 bits, beside each figure.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="With --against: a folder that keeps the original's logits for the next call.")
    ] = None,
    cache_size: Annotated[
        str | None, typer.Option(help="What they may take on disk; the oldest go first. [default: 4GB]")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="With --against: hold a block of each language model in memory. [default: where one does not fit]",
        ),
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
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put the model's chat template around the questions of --tasks."),
    ] = False,
    device: Device = "auto",
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model, also against its original. Perplexity of a language model is over windows of a text, without overlap;
    accuracy of a classifier is that on --images.

    In each window, tokens 2 to n are predicted. With --against, the model's predictions are compared with the original's: those
    of a language model, a classifier (--images), a sentence encoder (the lines of --text), a forecaster or a graph
    model (--data).

    With --tasks, the model answers tasks of EleutherAI's harness, in windows of its own length or of --seq-len.

    Examples: `tersor eval demo-4bit`, `tersor eval demo-4bit --against demo --text book.txt`,
    `tersor eval demo-4bit --tasks lambada_openai --limit 100`.
    """
    model = opened_as(model, variant)
    if tasks is not None:
        refuse(
            context,
            "--tasks",
            (
                "text",
                "images",
                "data",
                "against",
                "anchors",
                "cache",
                "cache_size",
                "stream",
                "max_windows",
                "max_images",
            ),
        )
        length = seq_len if given(context, "seq_len") else None
        show_harness(model, tasks, tasks_dir, limit, num_fewshot, batch_size, length, chat, dtype, device, as_json)
        return
    refuse(
        context,
        "perplexity and accuracy",
        ("tasks_dir", "limit", "num_fewshot", "batch_size", "chat"),
        "give --tasks",
    )
    source: str | Path = text if text == "builtin" else Path(text)
    place: dict[str, Any] = {"dtype": dtype, "device": device}
    if against is not None:
        other, base = open_checkpoint(model), open_checkpoint(against)
        how = compared_on(other, base)
        check_inputs(how, Inputs((source,), images, data))
        refuse(context, f"models that are compared on {how}", IDLE[how])
        size = CACHE_SIZE if cache_size is None else bytes_in(cache_size)

        def compare(each: Openable, said: Progress) -> Any:
            if how == "images":
                assert images is not None
                return agreement(each, base, images, max_images=max_images, progress=said, **place)
            if how == "sentences":
                return similarities(each, base, source, progress=said, **place)
            if how == "graph":
                assert data is not None
                return graphs_compared(each, base, data, **place)
            if how == "data":
                assert data is not None
                most = FORECASTS if max_windows is None else max_windows
                return forecasts_compared(each, base, data, most=most, **place)
            sizes: dict[str, Any] = {"seq_len": seq_len, "max_windows": max_windows, "stream": stream}
            return divergence(each, base, source, cache=cache, cache_size=size, progress=said, **sizes, **place)

        show = comparison.SHOWN[how]
        _against(other, base, compare, show, anchors=anchors, device=device, as_json=as_json)
        return
    alone = {"--data": data, "--cache": cache, "--cache-size": cache_size, "--stream": stream}
    for name, value in {**alone, "--anchors": anchors or None}.items():
        if value is not None:
            raise TersorError(f"{name} is for a comparison: give --against the original")
    opened = open_checkpoint(model)
    check_evaluated_on(opened, images)
    if images is None:
        refuse(context, "perplexity", ("max_images",))
    else:
        refuse(context, "accuracy on images", ("text", "seq_len", "max_windows"))
        _accuracy(opened, images, max_images, dtype, device, as_json)
        return
    with progress_bar(quiet=as_json) as progress:
        found = perplexity(opened, source, seq_len=seq_len, max_windows=max_windows, progress=progress, **place)
    if as_json:
        print_json({"model": model, **found.__dict__})
    else:
        half = "" if found.half_width is None else f" ± {found.half_width:.2g}"
        typer.echo(
            f"perplexity {found.perplexity:.4f}{half} over {found.tokens:,} tokens in {found.windows} windows of {seq_len}"
        )
        if half:
            typer.echo(INTERVAL)


def _against(
    model: Checkpoint,
    base: Checkpoint,
    compare: Compare,
    show: Callable[..., list[str]],
    *,
    anchors: bool,
    device: str,
    as_json: bool,
) -> None:
    anchor = None
    with progress_bar(quiet=as_json) as progress:
        found = compare(model, progress)
        if anchors:
            with anchor_of(base, device=device, progress=progress) as rounded:
                anchor = compare(rounded, progress)
    if as_json:
        told = {} if anchor is None else {"anchor": anchor.as_dict()}
        print_json({"model": str(model), "against": str(base), **found.as_dict(), **told})
        return
    for line in show(found, anchor):
        typer.echo(line)


def _accuracy(model: Checkpoint, images: Path, limit: int | None, dtype: str, device: str, as_json: bool) -> None:
    with progress_bar(quiet=as_json) as progress:
        found = accuracy(model, images, max_images=limit, dtype=dtype, device=device, progress=progress)
    if as_json:
        print_json({"model": str(model), **found.__dict__})
    else:
        typer.echo(f"top-1 accuracy {found.top1:.2f} % (± {found.half_width:.2f}) on {found.images:,} images")
