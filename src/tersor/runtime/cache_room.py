"""The one thing that all engines refuse: more tokens than their cache was made for."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tersor.errors import TersorError


class Room(Protocol):
    """An engine's cache: for `batch` sequences of `capacity` tokens, of which `length` are filled."""

    batch: int
    capacity: int
    length: int


def check_room(cache: Room, ids: Tensor, *, more: int = 0) -> None:
    """Raise TersorError where ids [batch, tokens], and as many as `more` after them, do not fit behind what is filled."""
    batch, tokens = ids.shape
    if batch != cache.batch or cache.length + tokens + more > cache.capacity:
        raise TersorError(
            f"{batch} sequences of {cache.length + tokens + more} tokens do not fit in a cache for "
            f"{cache.batch} of {cache.capacity}"
        )
