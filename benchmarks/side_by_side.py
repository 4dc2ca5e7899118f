"""What several benchmarks need: how fast things are beside each other, and where they were measured."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import tersor


def data_folder() -> Path:
    return Path(os.environ.get("TERSOR_DATA", Path(__file__).parents[2] / "shared" / "data"))


def speed_ratios(tasks: Mapping[str, Callable[[], object]], *, turns: int = 7) -> dict[str, float]:
    """How many times faster each task is than the first: medians over turns in which all of them run one after the other. CPU
    time of this process is counted, so that other jobs on the machine count less; use one thread."""
    assert torch.get_num_threads() == 1, "set OMP_NUM_THREADS=1: CPU time counts every thread"
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    with torch.no_grad():
        for turn in range(turns + 1):
            for name, task in tasks.items():
                started = time.process_time()
                task()
                if turn:  # the first one warms up
                    seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    first = next(iter(medians.values()))
    return {name: first / each for name, each in medians.items()}


def machine() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return (
        f"{cpu}, {torch.get_num_threads()} thread(s), {platform.system()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, tersor {tersor.__version__}"
    )
