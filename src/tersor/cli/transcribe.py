"""`tersor transcribe`: recordings as text or subtitles."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tersor.checkpoint.load import load
from tersor.checkpoint.preprocessing import saved_settings
from tersor.checkpoint.published import checkpoint_as
from tersor.checkpoint.source import open_checkpoint
from tersor.cli.options import Device, print_json
from tersor.cli.progress import progress_bar
from tersor.data.speech import SUFFIXES, blocks_of_stream
from tersor.errors import TersorError
from tersor.files import replacing
from tersor.models import find
from tersor.tasks.predict import input_files
from tersor.tasks.subtitles import FORMATS, as_text
from tersor.tasks.transcribe import Recognizer, Segment, Transcript, recognizer, transcript
from tersor.untrusted import readable

SKIPPED = 1  # the exit status where a file could not be read
STREAM = "-"


def transcribe(
    model: Annotated[str, typer.Argument(help="A directory: of `tersor train`, compressed, or published with --as.")],
    inputs: Annotated[
        list[str], typer.Argument(help="Recordings, folders or patterns; - reads a WAV file from standard input.")
    ],
    published_as: Annotated[
        str | None, typer.Option("--as", help="The variant that a published folder holds, such as paraformer_zh.")
    ] = None,
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = "txt",
    out: Annotated[
        Path | None, typer.Option(help="Folder for one file a recording, instead of standard output.")
    ] = None,
    raw: Annotated[
        int | None,
        typer.Option(metavar="RATE", help="Standard input holds 16-bit samples of one channel, RATE a second."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --out: replace transcripts that are there already.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Write down what is said in recordings of any length. They are cut at pauses.

    Text from standard input is printed pause by pause, as it comes. A recording that cannot be read is named on standard
    error and skipped; the exit status is then 1.

    Examples: `tersor transcribe my-run talk.flac`, `tersor transcribe my-run talks/ --format srt --out subtitles`,
    `arecord -f S16_LE -r 16000 -t raw | tersor transcribe my-run - --raw 16000`.
    """
    if format not in FORMATS:
        raise TersorError(f"--format {format!r}: it is one of {', '.join(FORMATS)}")
    streamed = STREAM in inputs
    if streamed and (len(inputs) > 1 or out is not None):
        raise TersorError(
            "standard input is transcribed alone, to standard output; leave the other inputs and --out out"
        )
    if raw is not None and not streamed:
        raise TersorError("--raw says what standard input holds; give - as the input")
    if overwrite and out is None:
        raise TersorError("--overwrite goes with --out, the folder of the transcripts")
    files = [] if streamed else input_files(inputs, SUFFIXES)
    if out is not None:
        stems: dict[str, Path] = {}
        for path in files:
            if (other := stems.setdefault(path.stem, path)) != path:
                raise TersorError(f"{other} and {path} have one name, and so would their transcripts; rename one")
        with readable(out):
            for stem in () if overwrite else stems:
                if (there := out / f"{stem}.{format}").exists():
                    raise TersorError(f"{there} exists; give another --out, or --overwrite to replace it")
            out.mkdir(parents=True, exist_ok=True)
    ready = _open(model, published_as, device)
    if streamed:
        _follow(ready, format, raw)
        return
    skipped, told = 0, []
    with progress_bar(quiet=len(files) == 1) as progress:
        for number, path in enumerate(files, 1):
            progress(path.name, number, len(files))
            try:
                found = transcript(ready, path)
            except TersorError as error:
                skipped += 1
                typer.echo(f"tersor: {error}", err=True)
                continue
            if out is not None:
                with replacing(out / f"{path.stem}.{format}") as partial:
                    partial.write_text(as_text(found, format), encoding="utf-8")
            elif format == "json":
                told.append(found.as_dict())
            else:
                typer.echo(as_text(found, format, name=str(path) if len(files) > 1 else None), nl=False)
    if format == "json" and out is None:
        print_json(told)
    if skipped:
        typer.echo(f"tersor: {skipped} of {len(files)} files skipped", err=True)
        raise typer.Exit(SKIPPED)


def _open(model: str, published_as: str | None, device: str) -> Recognizer:
    path: str | Path = model
    if published_as is not None:
        if (task := find(published_as).task) != "transcribe":
            raise TersorError(f"--as {published_as} is a model for {task}, not for speech")
        path = checkpoint_as(model, published_as)
    checkpoint = open_checkpoint(path)
    module: Any = load(checkpoint, device=device).eval()
    if not hasattr(module, "recognize"):
        raise TersorError(f"{model} holds a {type(module).__name__}, which transcribes no speech")
    folder = Path(model) if published_as is not None and Path(model).is_dir() else checkpoint.directory
    return recognizer(module, folder, checkpoint.config, saved_settings(checkpoint))


def _follow(model: Recognizer, format: str, raw: int | None) -> None:
    """Standard input, a segment as soon as it is complete."""
    heard = 0

    def counted() -> Iterator[torch.Tensor]:
        nonlocal heard
        for block in blocks_of_stream(sys.stdin.buffer, model.front.rate, raw=raw):
            heard += len(block)
            yield block

    segments: list[Segment] = []
    for segment in model.segments(counted()):
        segments.append(segment)
        if format == "txt":
            typer.echo(segment.text)
    if not heard:
        raise TersorError("standard input holds no sound")
    if format != "txt":
        found = Transcript(Path(STREAM), tuple(segments))
        text = json.dumps([found.as_dict()], ensure_ascii=False) + "\n" if format == "json" else as_text(found, format)
        typer.echo(text, nl=False)
