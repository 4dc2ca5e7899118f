"""Choices that were measured on the user's GPU, kept for the processes to come: one small file each, beside the compiled
kernels, under a hash of all that the choice depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tersor.files import replacing
from tersor.kernels import nvrtc


def _file(asked: str) -> Path:
    return nvrtc.CACHE / f"choice-{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"


def recall(asked: str, among: Sequence[str]) -> str | None:
    """What was the fastest `among` these when it was `asked`, or None where that is not known."""
    try:
        microseconds = json.loads(_file(asked).read_text())["microseconds"]
        return min(among, key=lambda name: float(microseconds[name]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(asked: str, microseconds: Mapping[str, float]) -> None:
    """Where the cache cannot be written, the next process measures again."""
    said = json.dumps({"asked": asked, "microseconds": dict(microseconds)}, indent=1)
    try:  # another process may be doing the same
        nvrtc.CACHE.mkdir(parents=True, exist_ok=True)
        with replacing(_file(asked)) as new:
            new.write_text(said)
    except OSError:
        pass
