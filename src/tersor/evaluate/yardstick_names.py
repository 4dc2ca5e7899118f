"""The names of the yardsticks (yardsticks.py), which need no PyTorch."""

from __future__ import annotations

import difflib
from pathlib import Path

from tersor.errors import TersorError

REPEAT_LAST, SEASONAL_NAIVE, RIDGE = YARDSTICKS = ("repeat-last", "seasonal-naive", "ridge")


def check_spelling(model: str) -> None:
    """Raise TersorError where it is no model, but nearly the name of a yardstick."""
    meant = difflib.get_close_matches(model, YARDSTICKS, n=1)
    if model not in YARDSTICKS and meant and "/" not in model and not Path(model).expanduser().exists():
        raise TersorError(f"no model at {model}; did you mean the yardstick {meant[0]}?")
