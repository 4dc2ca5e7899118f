"""`tersor report DIR ...`: one HTML file about compressed models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.options import Device, refuse
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
        list[str] | None, typer.Option(help="What both models continue; the begins of parts of the text if unset.")
    ] = None,
    attribution: Annotated[
        list[Path] | None, typer.Option(help="A JSON file of `tersor attribute`; may be repeated.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run the models here: speed and memory.")] = False,
    seq_len: Annotated[int, typer.Option(help="Tokens a window of text.")] = 512,
    max_windows: Annotated[int, typer.Option(help="Compare on so many windows of each text at most.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are written after a prompt.")] = 48,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write what the page says to this file too, as JSON.")
    ] = None,
) -> None:
    """Write one page about compressed models: size, what was lost and where, weights, texts, the job, what loads them.

    The page holds all that it shows, sends no request, and opens from disk. A job keeps what is needed beside its result;
    with --against the original, models are compared token by token.

    Examples: `tersor report demo-4bit --against demo`, `tersor report demo-3bit demo-4bit --against demo --measure`.
    """
    from tersor.files import replacing
    from tersor.report.collect import collect
    from tersor.report.page import check_page, write_page

    if new_tokens < 1:
        raise TersorError(f"--new-tokens {new_tokens} must be positive")
    if against is None:
        way_out = "name the original with --against"
        refuse(context, "a report without the original", ("seq_len", "max_windows", "new_tokens"), way_out)
        if not measure:
            refuse(context, "a report that runs no model", ("dtype", "device"), "give --against or --measure")
    check_page(out)
    if json_file is not None:
        _check_json(json_file)
    with progress_bar() as progress:
        found = collect(
            models,
            against=against,
            texts=text or (),
            prompts=prompt or (),
            attributions=attribution or (),
            measure=measure,
            seq_len=seq_len,
            max_windows=max_windows,
            new_tokens=new_tokens,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    write_page(found, out)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(json_file) as partial:
            partial.write_text(json.dumps(found.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for note in found.notes:
        typer.echo(note)
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


def _check_json(path: Path) -> None:
    """Raise TersorError where a file is there that is no report's."""
    from tersor.report.data import read

    if path.is_dir():
        raise TersorError(f"--json {path} is a directory; give a file")
    if path.exists():
        try:
            read(path)
        except TersorError:
            raise TersorError(f"--json {path} is no report of tersor's and would be lost; give another") from None
