"""`tersor report DIR ...`: one HTML file about compressed models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.options import Device, print_json, refuse
from tersor.cli.progress import progress_bar
from tersor.errors import TersorError


def report(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Directories of results; several are compared.")],
    out: Annotated[Path, typer.Option(help="The page to write; a report that is there is replaced.")] = Path(
        "report.html"
    ),
    against: Annotated[
        str | None, typer.Option(help="The original: weights, predictions and texts are compared with its own.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A text file (.gz too) to compare on, or `builtin`; may be repeated.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What both models continue; the beginnings of parts of the text if unset.")
    ] = None,
    attribution: Annotated[
        list[Path] | None, typer.Option(help="A JSON file of `tersor attribute`; may be repeated.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run the models here: speed and memory.")] = False,
    seq_len: Annotated[int, typer.Option(help="Tokens a window of text.")] = 512,
    max_windows: Annotated[int, typer.Option(help="Compare on so many windows of each text at most.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens after a prompt.")] = 48,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print what the page says as one JSON object.")] = False,
) -> None:
    """Write one page about compressed models. It shows size, what was lost and where, weights, texts, the job, what loads them.

    The page holds all that it shows, sends no request, and opens from disk. A job keeps what is needed beside its result;
    with --against the original, models are compared token by token.

    Examples: `tersor report demo-4bit --against demo`, `tersor report demo-3bit demo-4bit --against demo --measure`.
    """
    from tersor.report.collect import collect
    from tersor.report.page import check_page, write_page

    if max_new_tokens < 1:
        raise TersorError(f"--max-new-tokens {max_new_tokens} must be positive")
    if against is None:
        way_out = "name the original with --against"
        refuse(context, "a report without the original", ("seq_len", "max_windows", "max_new_tokens"), way_out)
        if not measure:
            refuse(context, "a report that runs no model", ("dtype", "device"), "give --against or --measure")
    check_page(out)
    with progress_bar(quiet=as_json) as progress:
        found = collect(
            models,
            against=against,
            texts=text or (),
            prompts=prompt or (),
            attributions=attribution or (),
            measure=measure,
            seq_len=seq_len,
            max_windows=max_windows,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    write_page(found, out)
    if as_json:
        print_json(found.as_dict())
        return
    for note in found.notes:
        typer.echo(note)
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
