"""`tersor chat`: talk with a model in the terminal, or turn by turn from standard input."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli.notes import show_notes
from tersor.cli.options import (
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
from tersor.errors import TersorError
from tersor.untrusted import read_bytes

if TYPE_CHECKING:
    from tersor.runtime.chat import Chat

HELP = (
    "/reset forgets the turns, /system TEXT sets the system message (without TEXT: none) and forgets the turns, "
    "/save FILE writes the conversation as JSON (in a terminal), /quit ends"
)
REFUSED = 2  # the exit status where a line of a pipe was refused
_CONTEXT = 4096


def chat(
    model: Annotated[str, typer.Argument(help="A directory, a .gguf file, a hub name such as org/name, or `demo`.")],
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A file with a chat template (Jinja), in place of the model's own.")
    ] = None,
    context: Annotated[
        int, typer.Option(help="Tokens of the conversation that the model reads; no more than it has positions.")
    ] = _CONTEXT,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens an answer.")] = 512,
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the conversation as one JSON object when it ends, and no answers.")
    ] = False,
) -> None:
    """Talk with a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.

    Where standard input is no terminal, each of its lines is a message (a command if it begins with /), and the answers are
    printed one after another. A refused line is reported on standard error; the exit status is then 2.
    Sampling options that are not given are as the model's generation_config.json says, or off.

    Examples: `tersor chat demo`, `tersor chat my-model --system "Answer in one sentence." < questions.txt`.
    """
    _check_numbers(context, max_new_tokens)
    jinja = None if chat_template is None else _template(chat_template)
    talk = _start(
        model,
        system,
        jinja,
        context,
        max_new_tokens,
        {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        },
        seed=seed,
        variant=variant,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
    )
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        _say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
    refused = False
    try:
        for line in _lines(at_terminal):
            try:
                if line.startswith("/"):
                    if not _obey(talk, line, at_terminal):
                        break
                else:
                    _answer(talk, line, silent=as_json)
            except TersorError as error:  # and the conversation goes on
                refused = True
                show_notes([str(error)], always=True)
    finally:
        if as_json:
            print_json({"model": model, **talk.transcript()})
    if refused and not at_terminal:
        raise typer.Exit(REFUSED)


def _start(
    model: str,
    system: str | None,
    jinja: str | None,
    context: int,
    max_new_tokens: int,
    sampling: dict[str, Any],
    **where: Any,
) -> Chat:
    from tersor.checkpoint.positions import positions_of
    from tersor.runtime import chat_template
    from tersor.runtime.chat import Chat
    from tersor.runtime.generate import open_writer

    writer = open_writer(model, sampling=sampling, notice=_say, **where)
    form = chat_template.of(writer.tokenizer, jinja)
    if form.plain:
        _say(f"{chat_template.NONE} (--chat-template FILE gives another)")
    most = positions_of(writer.module)
    engine = writer.engine(context if most is None else min(context, most))
    return Chat(writer, engine, form, max_new_tokens=max_new_tokens, system=system)


def _check_numbers(context: int, max_new_tokens: int) -> None:
    from tersor.runtime.generate import NEW_TOKENS

    if not 2 <= context <= NEW_TOKENS:
        raise TersorError(f"--context {context} must be from 2 to {NEW_TOKENS:,} tokens")
    if max_new_tokens < 1:
        raise TersorError(f"--max-new-tokens {max_new_tokens} must be positive")


def _template(file: Path) -> str:
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TersorError(f"--chat-template {file} cannot be read: {error}") from None


def _lines(at_terminal: bool) -> Iterator[str]:
    """The messages and commands, without those that are blank."""
    read = _from_terminal if at_terminal else sys.stdin.readline
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrows and the lines before, in `input`
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            typer.echo(err=True)
            _say("Ctrl-D or /quit ends")
            continue
        except UnicodeDecodeError as error:
            raise TersorError(f"standard input is not UTF-8 text: {error}") from None
        if not line:
            return
        if line.strip():
            yield line.strip()


def _from_terminal() -> str:
    """One line with its line break; empty at the end of the input."""
    try:
        if sys.stdout.isatty():
            return input("> ") + "\n"
        typer.echo("> ", nl=False, err=True)
        return input() + "\n"
    except EOFError:
        typer.echo(err=True)
        return ""


def _obey(talk: Chat, line: str, at_terminal: bool) -> bool:
    """Carry out a command; returns whether the conversation goes on."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command in ("/quit", "/reset", "/help") and rest:
        raise TersorError(f"{command} takes nothing after it, not {rest!r}")
    if command == "/quit":
        return False
    if command == "/help":
        _say(HELP, always=True)
    elif command == "/reset":
        talk.reset()
        _say("the turns are forgotten", always=True)
    elif command == "/system":
        talk.reset()
        talk.system = rest or None
        _say(
            "the system message is set and the turns are forgotten" if rest else "there is no system message now",
            always=True,
        )
    elif command == "/save":
        if not at_terminal:
            raise TersorError(
                "/save is for terminals, so that lines of a file write no files; --json prints the conversation"
            )
        _save(talk, rest)
    else:
        raise TersorError(f"there is no command {command}; {HELP}")
    return True


def _save(talk: Chat, name: str) -> None:
    if not name:
        raise TersorError("/save needs the name of a file")
    file = Path(name).expanduser()
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(json.dumps(talk.transcript(), indent=2, ensure_ascii=False) + "\n")
    except FileExistsError:
        raise TersorError(f"{file} is there already; give another name") from None
    except OSError as error:
        raise TersorError(f"{file} cannot be written: {error.strerror}") from None
    _say(f"the conversation is in {file}", always=True)


def _answer(talk: Chat, text: str, *, silent: bool) -> None:
    begun = False
    with stopped_by_ctrl_c() as stopped:
        for piece in talk.answer(text, stopped):
            shown = piece if begun else piece.lstrip()
            begun = begun or bool(shown)
            if not silent:
                typer.echo(shown, nl=False)
                sys.stdout.flush()
    if not silent:
        typer.echo()
    if talk.ended == "length":
        _say("the answer ends here for want of room: --max-new-tokens and --context give more")


@contextlib.contextmanager
def stopped_by_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed. The first one only says so; a second one interrupts as usual."""
    pressed = False

    def press(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str, *, always: bool = False) -> None:
    show_notes([line], always=always)
