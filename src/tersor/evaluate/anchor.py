"""A figure to hold others against: the original in 8 bits by plain rounding, which loses next to nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tersor.checkpoint.source import open_checkpoint
from tersor.compress.job import compress
from tersor.errors import TersorError
from tersor.methods.weights.rtn import RTN
from tersor.progress import Progress

BITS = 8


@contextmanager
def anchor_of(against: str | Path, *, device: str = "auto", progress: Progress | None = None) -> Iterator[Path]:
    """A directory that holds the original, each row of its layers rounded to 8 bits, for as long as the context lasts. Raises
    TersorError where the original is packed already."""
    if "quantization_config" in open_checkpoint(against).config:
        raise TersorError(f"{against} is quantized already and cannot be rounded to {BITS} bits: leave --anchors out")
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        out = Path(folder) / "model"
        more: dict[str, Any] = {} if progress is None else {"progress": progress}
        compress(against, RTN(bits=BITS, group_size=-1), out=out, device=device, **more)
        yield out
