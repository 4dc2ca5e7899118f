"""Measure a candidate: make it in one process of its own, run it in another, and let go of what was written.

Two processes, so that the memory of running is not that of compressing, and a candidate that fails leaves the others alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tersor.advise.plans import Recipe, methods_of
from tersor.advise.workloads import Run, Workload, run
from tersor.checkpoint.source import open_checkpoint
from tersor.compress import compress
from tersor.compress.settings import counting
from tersor.errors import TersorError
from tersor.untrusted import first_words


class NoTimeError(TersorError):
    """The time given is over."""


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
            seconds = _apart(_make, (model, recipe, dict(settings), made), Path(scratch), deadline)["seconds"]
        found = Run(**_apart(_run, (made, asdict(work)), Path(scratch), deadline))
        low, middle, high = statistics.quantiles(found.seconds, n=4, method="inclusive")
        p95 = statistics.quantiles(found.seconds, n=20, method="inclusive")[-1]
        return Measured(open_checkpoint(made).size(), seconds, middle, p95, (low, high), found)


def _make(model: str, recipe: Recipe, settings: dict[str, Any], out: str) -> dict[str, Any]:
    steps = methods_of(recipe)
    began = time.perf_counter()
    compress(model, steps if len(steps) > 1 else steps[0], out=out, **counting(settings, steps))
    return {"seconds": time.perf_counter() - began}


def _run(model: str, work: dict[str, Any]) -> dict[str, Any]:
    return asdict(run(model, Workload(**{**work, "files": tuple(work["files"])})))


def _apart(
    job: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], scratch: Path, deadline: float | None
) -> Any:
    """What a function returns in a process of its own, as plain values."""
    answer = scratch / "answer.json"
    answer.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_answer, args=(job, arguments, str(answer), torch.get_num_threads()))
    process.start()
    try:
        process.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            raise NoTimeError("the time given is over")
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
    if not answer.exists():
        raise TersorError(f"the process ended with status {process.exitcode}")
    said = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in said:
        raise TersorError(said["error"])
    return said["answer"]


def _answer(job: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], path: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        said: dict[str, Any] = {"answer": job(*arguments)}
    except KeyboardInterrupt:  # the parent says so
        os._exit(130)
    except TersorError as error:
        said = {"error": " ".join(str(error).split())}
    except Exception as error:
        said = {"error": f"{type(error).__name__}: {first_words(error)}"}
    Path(path).write_text(json.dumps(said), encoding="utf-8")
