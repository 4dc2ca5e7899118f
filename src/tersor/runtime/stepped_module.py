"""The language models of `tersor.models`, token by token: by their own `prefill` and `step`, or the whole text each time.

A model's `prefill(ids, state)` and `step(token, state)` return logits and a new state, and leave the old one as it is. So an
engine goes back in a text by taking up a state that it kept: that of the end of the last prompt, or of one token ago.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.models import registry
from tersor.runtime import mamba_token
from tersor.runtime.engine import check_room
from tersor.runtime.prepared_linear import prepare_linears

CHUNK = 512  # prompt tokens that go through the layers together, which bounds the memory
_VOCABULARY = ("vocab_size", "num_tokens", "vocab")  # names of the config's field


def is_registered(module: nn.Module) -> bool:
    return getattr(type(module), "system", None) is not None


def why_not(module: nn.Module) -> str | None:
    """Why this model of `tersor.models` does not continue a text; None where it does."""
    return why_not_named(type(module).system)  # type: ignore[attr-defined]


def why_not_named(system: str) -> str | None:
    """The same for an architecture's name, before anything is loaded."""
    found = registry.find(system)
    if found.task == "language-model":
        return None
    if found.task == "masked-language-model":
        return f"{found.system} fills gaps in a text and does not continue it"
    return f"{found.system} is a model for the task {found.task} and does not continue a text"


def vocabulary_of(module: nn.Module) -> int | None:
    """How many tokens a language model knows. Its logits may have more columns, which stand for no token."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):  # transformers'
        return int(config.get_text_config().vocab_size)
    return next((getattr(config, name) for name in _VOCABULARY if hasattr(config, name)), None)


def why_no_state(module: Any) -> str | None:
    """Why the model cannot go on from a state; None where it can."""
    if not hasattr(module, "prefill"):
        return f"{type(module).__name__} keeps no state"
    try:
        with torch.inference_mode():
            module.prefill(torch.zeros(1, 1, dtype=torch.int64, device=_device_of(module)))
    except TersorError as error:  # as H3 with learned positions says
        return str(error)
    return None


class SteppedModule:
    """An engine of a model with `prefill` and `step`. What a token costs does not grow with the text where the state does not.

    take_over: nobody else needs the module: on a CPU its linear maps may be exchanged (`prepare_linears`), for speed.
    A token then goes through Mamba-1 in one compiled call (mamba_token.py).
    """

    def __init__(self, module: Any, *, capacity: int, batch: int = 1, take_over: bool = False) -> None:
        self.module, self.capacity, self.batch, self.length = module, capacity, batch, 0
        self.device = _device_of(module)
        if take_over and self.device.type == "cpu":
            prepare_linears(module)
        self._step = module.step
        if take_over and batch == 1 and mamba_token.why_not(module) is None:
            self._step = mamba_token.MambaToken(module).step
        self._vocabulary = vocabulary_of(module)
        self._states: dict[int, Any] = {}  # by the number of tokens read before
        self._prompt = 0  # where the last prompt ends

    def reset(self) -> None:
        """Start new sequences."""
        self.rewind(0)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens, or more: back to a place whose state is kept."""
        self._states = {place: state for place, state in self._states.items() if place <= length}
        self.length = max(self._states, default=0)
        self._prompt = min(self._prompt, self.length)

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary], float32, of what follows ids [batch, tokens], which are read."""
        check_room(self, ids)
        ids, before = ids.to(self.device), self.length
        state = self._states.get(before)
        if ids.shape[1] == 1 and state is not None:
            logits, state = self._step(ids[:, 0], state)
        else:
            for piece in torch.split(ids, CHUNK, dim=1):
                logits, state = self.module.prefill(piece, state, last_only=True)
            logits = logits[:, -1]
        self.length = before + ids.shape[1]
        if ids.shape[1] > 1:
            self._prompt = self.length
        kept = (self._prompt, before, self.length)
        self._states = {place: each for place, each in {**self._states, self.length: state}.items() if place in kept}
        found: Tensor = logits[:, : self._vocabulary].float()
        return found


class RecomputedModule:
    """An engine of a model without a state: every token is computed from the whole text. reason: why."""

    def __init__(self, module: Any, reason: str, *, capacity: int, batch: int = 1) -> None:
        self.module, self.reason, self.capacity, self.batch = module, reason, capacity, batch
        self.device = _device_of(module)
        self._vocabulary = vocabulary_of(module)
        self._read = torch.empty(batch, 0, dtype=torch.int64, device=self.device)
        self.length = 0

    def reset(self) -> None:
        """Start new sequences."""
        self.rewind(0)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._read = self._read[:, :length]
        self.length = self._read.shape[1]

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary], float32, of what follows ids [batch, tokens], which are read."""
        check_room(self, ids)
        read = torch.cat([self._read, ids.to(self.device)], dim=1)
        found: Tensor = self.module(input_ids=read)[:, -1, : self._vocabulary].float()
        self._read, self.length = read, read.shape[1]
        return found


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
