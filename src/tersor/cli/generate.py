"""`tersor generate`: continue a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from tersor.errors import TersorError


def generate(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name such as org/name, or `demo`.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Continue a prompt, token by token as they come."""
    from tersor.runtime.generate import stream

    if max_new_tokens < 1:
        raise TersorError(f"--max-new-tokens {max_new_tokens} must be positive")
    pieces = stream(
        model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, dtype=dtype, device=device
    )
    first = next(pieces, "")  # what is wrong with the model or the prompt shows before anything is printed
    typer.echo(prompt + first, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()
