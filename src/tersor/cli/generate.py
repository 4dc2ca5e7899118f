"""`tersor generate`: continue a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.options import Device
from tersor.errors import TersorError
from tersor.untrusted import read_bytes


def generate(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name such as org/name, or `demo`.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue; `-` reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 64,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token every time.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens only; 0: from all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the fewest tokens that have this probability together.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens with this share of the likeliest one's probability.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Makes tokens that were there already less likely; 1 does nothing.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
) -> None:
    """Continue a prompt, token by token as they come. Ctrl-C ends the text where it is.

    Sampling that is not asked for is as the model's generation_config.json says, or off.
    """
    from tersor.runtime.generate import stream

    if max_new_tokens < 1:
        raise TersorError(f"--max-new-tokens {max_new_tokens} must be positive")
    text = _prompt(prompt, prompt_file)
    pieces = stream(
        model,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        dtype=dtype,
        device=device,
        notice=lambda line: typer.echo(line, err=True),
    )
    first = next(pieces, "")  # what is wrong with the model or the prompt shows before anything is printed
    _print(text + first)
    try:
        for piece in pieces:
            _print(piece)
    except KeyboardInterrupt:
        pass
    typer.echo()


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise TersorError("give the text to continue by either --prompt or --prompt-file")
    if file is None:
        try:
            return sys.stdin.read() if prompt == "-" else str(prompt)
        except UnicodeDecodeError as error:
            raise TersorError(f"standard input is not UTF-8 text: {error}") from None
    content = read_bytes(file)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TersorError(f"--prompt-file {file} cannot be read: {error}") from None


def _print(text: str) -> None:
    typer.echo(text, nl=False)
    sys.stdout.flush()
