"""A conversation with a language model. What the engine has read before is not computed again.

Every turn, the whole conversation becomes tokens by the model's template. The engine goes back to where these differ from what it
has read, which is usually the end of the last answer, and reads the rest. Where the conversation outgrows the engine's
capacity, the oldest turns are left out of what the model reads; the transcript keeps them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tersor.errors import TersorError
from tersor.runtime.chat_template import Message, Template, until
from tersor.runtime.engine import Engine
from tersor.runtime.generate import Writer, tokens
from tersor.runtime.text_stream import TextStream

_SHARE = 4  # of the capacity, at most one in so many tokens is kept free for an answer before old turns are dropped
_SEEDS = 1 << 63


class Chat:
    """messages: all turns so far. ended: how the last answer ended: "end", "length" or "interrupted". tokens_read: tokens that
    went through the engine, of all turns together."""

    def __init__(
        self, writer: Writer, engine: Engine, template: Template, *, max_new_tokens: int, system: str | None = None
    ) -> None:
        self._writer, self._engine, self._template = writer, engine, template
        self._max_new_tokens, self.system = max_new_tokens, system
        self.messages: list[Message] = []
        self.ended = ""
        self.tokens_read = 0
        self._first = 0  # message that the model still reads
        self._turns = 0
        self._held: list[int] = []  # what the engine has read

    def reset(self) -> None:
        """Forget all turns. The system message stays."""
        self.messages, self._first = [], 0

    def answer(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The pieces of the answer to one message, as they come. Ends when `stopped()` is true after a token.

        Raises TersorError where the message leaves no room for an answer or the template refuses it; the message is then not
        part of the conversation.
        """
        before = len(self.messages), self._first
        self.messages.append({"role": "user", "content": text})
        made: list[str] = []
        try:
            for piece in self._pieces(stopped):
                made.append(piece)
                yield piece
        except TersorError:
            del self.messages[before[0] :]
            self._first = before[1]
            raise
        finally:  # also where nobody takes the rest of the pieces
            if len(self.messages) > before[0]:
                self.messages.append({"role": "assistant", "content": "".join(made).strip()})

    def _pieces(self, stopped: Callable[[], bool]) -> Iterator[str]:
        ids = self._read_by_the_model()
        stream, made = TextStream(self._writer.tokenizer, ids), list[int]()
        rest = self._go_back_to(ids)
        before = self._engine.length
        room = min(self._max_new_tokens, self._engine.capacity - len(ids))
        self._turns += 1
        seed = (self._writer.sampling.seed + self._turns) % _SEEDS
        found = tokens(
            self._engine,
            torch.tensor([rest]),
            max_new_tokens=room,
            sampling=dataclasses.replace(self._writer.sampling, seed=seed),
            end=self._writer.end,
        )

        def pieces() -> Iterator[str]:
            for token in found:
                made.append(token)
                if piece := stream.push(token):
                    yield piece
                if stopped():
                    self.ended = "interrupted"
                    break
            if piece := stream.finish():
                yield piece

        self.ended = ""
        try:
            yield from until(pieces(), self._template.stops)
        finally:
            self.tokens_read += self._engine.length - before
            self._held = (ids + made)[: self._engine.length]
            self._engine.rewind(len(self._held))  # it may have read a token more than is known here
            self._held = self._held[: self._engine.length]
        if not self.ended:
            self.ended = "length" if len(made) == room else "end"

    def _read_by_the_model(self) -> list[int]:
        """The tokens of the system message and of as many of the last turns as leave room for an answer."""
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        free = min(self._max_new_tokens, max(1, self._engine.capacity // _SHARE))
        dropped = 0
        while True:
            ids = self._template.ids([*system, *self.messages[self._first :]])
            if ids.shape[1] + free <= self._engine.capacity:
                break
            if self._first + 2 >= len(self.messages):
                raise TersorError(
                    f"the message is {ids.shape[1]} tokens with what belongs to it; with {free} for the answer it does not fit "
                    f"in the context of {self._engine.capacity}"
                )
            self._first += 2  # a message and its answer
            dropped += 1
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            self._writer.notice(f"the context is full: the oldest {turns} dropped")
        self._writer.check(ids)
        found: list[int] = ids[0].tolist()
        if not found:
            raise TersorError("the conversation has no tokens")
        return found

    def _go_back_to(self, ids: list[int]) -> list[int]:
        """Take the engine back to where it has read only the first of these tokens; returns those that are left to read."""
        same = next((n for n, (a, b) in enumerate(zip(self._held, ids, strict=False)) if a != b), None)
        same = min(len(self._held), len(ids)) if same is None else same
        self._engine.rewind(min(same, len(ids) - 1))  # at least one is read again, for its logits
        return ids[self._engine.length :]

    def transcript(self) -> dict[str, Any]:
        """The whole conversation, ready for JSON."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {"messages": [*system, *self.messages], "tokens_read": self.tokens_read}
