"""Measure a candidate: make it in one process of its own, run it in another, and let go of what was written.

Two processes, so that the memory of running is not that of compressing, and a candidate that fails leaves the others alone.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.advise.plans import Recipe, methods_of
from tersor.advise.workloads import Run, Workload, run
from tersor.apart import apart
from tersor.checkpoint.source import open_checkpoint
from tersor.compress import compress
from tersor.compress.settings import counting


@dataclass(frozen=True)
class Measured:
    """disk: bytes of the tensor files; seconds: of the compression; latency and its quarters: seconds of a turn."""

    disk: int
    seconds: float
    latency: float
    latency_p95: float
    latency_quarters: tuple[float, float]
    run: Run


def measure(
    model: str, recipe: Recipe, settings: Mapping[str, Any], work: Workload, *, deadline: float | None = None
) -> Measured:
    """recipe: empty for the original; settings: of `compress`; deadline: on the clock of time.monotonic.

    Raises TersorError with the reason where the candidate cannot be made or run, NoTimeError where the deadline passes.
    """
    with tempfile.TemporaryDirectory(prefix="tersor-advise-") as scratch:
        made, seconds = model, 0.0
        if recipe:
            made = str(Path(scratch) / "model")
            seconds = apart(_make, model, recipe, dict(settings), made, deadline=deadline)
        found = apart(run, made, work, deadline=deadline)
        low, middle, high = statistics.quantiles(found.seconds, n=4, method="inclusive")
        p95 = statistics.quantiles(found.seconds, n=20, method="inclusive")[-1]
        return Measured(open_checkpoint(made).size(), seconds, middle, p95, (low, high), found)


def _make(model: str, recipe: Recipe, settings: dict[str, Any], out: str) -> float:
    steps = methods_of(recipe)
    began = time.perf_counter()
    compress(model, steps if len(steps) > 1 else steps[0], out=out, **counting(settings, steps))
    return time.perf_counter() - began
