"""`tersor generate`: continue a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.options import (
    AsJson,
    Device,
    Dtype,
    MinP,
    RepetitionPenalty,
    SamplingSeed,
    Temperature,
    Tokenizer,
    TopK,
    TopP,
    Variant,
    print_json,
)
from tersor.cli.quiet import is_quiet
from tersor.errors import TersorError
from tersor.untrusted import read_bytes


def generate(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name such as org/name, or `demo`.")],
    text: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; `-` reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the text to continue.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The text is a message: the model's chat template is put around it.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="A system message before it; implies --chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 64,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: SamplingSeed = 0,
    variant: Variant = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a text, token by token as they come. Ctrl-C ends the text where it is.

    Sampling options that are not given are as the model's generation_config.json says, or off. With --chat only the answer is
    printed.

    Examples: `tersor generate demo "It is a truth"`, `tersor generate mamba.safetensors "It is" --as mamba-130m --tokenizer DIR`.
    """
    from tersor.runtime.generate import stream

    if max_new_tokens < 1:
        raise TersorError(f"--max-new-tokens {max_new_tokens} must be positive")
    chat = chat or system is not None
    given = _prompt(text, prompt, prompt_file)
    pieces = stream(
        model,
        given,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        chat=chat,
        system=system,
        variant=variant,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        notice=_say,
    )
    if as_json:
        print_json({"model": model, "prompt": given, "text": "".join(pieces)})
        return
    first = next(pieces, "")  # what is wrong with the model or the prompt shows before anything is printed
    _print(first.lstrip() if chat else given + first)
    try:
        for piece in pieces:
            _print(piece)
    except KeyboardInterrupt:
        pass
    typer.echo()


def _prompt(text: str | None, prompt: str | None, file: Path | None) -> str:
    if sum(each is not None for each in (text, prompt, file)) != 1:
        raise TersorError("give the text to continue once: after the model, or by either --prompt or --prompt-file")
    if text is not None:
        return text
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


def _say(line: str) -> None:
    if not is_quiet():
        typer.echo(line, err=True)


def _print(text: str) -> None:
    typer.echo(text, nl=False)
    sys.stdout.flush()
