"""Choices that were measured on the user's GPU, kept for the processes to come: one small file each, beside the compiled
kernels, under a hash of all that the choice depends on.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from tersor.files import replacing
from tersor.kernels import nvrtc

GPU_CALLS = 9  # of each way that is measured


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


def gpu_microseconds(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The median time of each, in turns, with a cold L2 cache, as a layer finds it among others."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(max(size, 2**20), dtype=torch.uint8, device=device)
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(1 + GPU_CALLS):
        for run, found in zip(runs, times, strict=True):
            for _ in range(4):  # while these run, the host gets ahead
                scratch.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            end.synchronize()
            if turn:  # the first one loads the kernel
                found.append(start.elapsed_time(end) * 1e3)
    return [statistics.median(found) for found in times]
