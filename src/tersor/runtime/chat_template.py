"""How a conversation becomes the text that a model continues: by the model's own chat template, or in plain turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.untrusted import first_words

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}
NONE = "the model has no chat template; turns are written as `User: ...` and `Assistant: ...`"
_NAMES = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
_PLAIN_STOPS = ("\nUser:", "\nAssistant:")


@dataclass(frozen=True)
class Template:
    """How a conversation becomes a text."""

    tokenizer: Any
    jinja: str | dict[str, str] | None  # the template's source; None for plain turns

    @property
    def plain(self) -> bool:
        return self.jinja is None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer although the model goes on: it then writes the next turn itself."""
        return _PLAIN_STOPS if self.plain else ()

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation up to the place where the next answer begins. Raises TersorError where the template refuses it."""
        if self.jinja is None:
            turns = [f"{_NAMES[each['role']]}{each['content']}\n" for each in messages]
            return "".join([*turns, "Assistant:"])
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.jinja if isinstance(self.jinja, str) else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # of the template's own text, or jinja2's for a broken one
            raise TersorError(f"the chat template refuses this conversation: {first_words(error)}") from error
        return str(text)

    def ids(self, messages: Sequence[Message]) -> Tensor:
        """The tokens of `text`, int64 [1, tokens]. A template writes the special tokens itself."""
        found: Tensor = self.tokenizer(
            self.text(messages), return_tensors="pt", add_special_tokens=self.plain, verbose=False
        )["input_ids"]
        return found.to(torch.int64)


def of(tokenizer: Any, jinja: str | None = None) -> Template:
    """The template that is given, else the tokenizer's own, else plain turns."""
    if jinja is None:
        return Template(tokenizer, getattr(tokenizer, "chat_template", None))
    if not hasattr(tokenizer, "apply_chat_template"):
        raise TersorError("a model that reads bytes has no special tokens for a template; leave it out")
    return Template(tokenizer, jinja)


def opening(text: str, system: str | None) -> list[Message]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first of the texts `stops`. What may become one of them is held back until it is known."""
    held = ""
    for piece in pieces:
        held += piece
        found = min((place for stop in stops if (place := held.find(stop)) >= 0), default=-1)
        if found >= 0:
            if found:
                yield held[:found]
            return
        known = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if known:
            yield held[:known]
            held = held[known:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
