"""How long work says how far it is: `progress(what, done, total)`. With total 0, `what` is a line to keep."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """For work that nobody watches."""
