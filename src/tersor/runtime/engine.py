"""What runs a language model: tokens in, logits of what follows out.

`LlamaCPU` and `LlamaGPU` take transformers' LLaMA family, `CachedModule` every other causal language model of transformers,
`SteppedModule` and `RecomputedModule` those of `tersor.models`. `make_engine` in `generate.py` picks one.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tersor.errors import TersorError


class Engine(Protocol):
    """A model with room for `batch` sequences of `capacity` tokens. It has read `length` tokens of each."""

    batch: int
    capacity: int
    length: int
    device: torch.device

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, vocabulary] of what follows ids [batch, tokens], which are read after those before.

        Raises TersorError where they do not fit.
        """

    def reset(self) -> None:
        """Start new sequences."""

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens, so that other tokens can follow them.

        An engine that cannot go back to that place goes back further: its `length` says how many tokens are left.
        """


class Room(Protocol):
    """The sizes that `check_room` looks at."""

    batch: int
    capacity: int
    length: int


def check_room(engine: Room, ids: Tensor, *, more: int = 0) -> None:
    """Raise TersorError where ids [batch, tokens], and `more` tokens after them, do not fit behind what is read."""
    batch, tokens = ids.shape
    if batch != engine.batch or engine.length + tokens + more > engine.capacity:
        raise TersorError(
            f"{batch} sequences of {engine.length + tokens + more} tokens do not fit in a cache for "
            f"{engine.batch} of {engine.capacity}"
        )
