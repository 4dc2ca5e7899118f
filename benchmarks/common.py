"""What the benchmarks share: where data and results are, how fast things are beside each other, and where they were measured."""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import tersor
from tersor.devices import memory_now, peak_memory

Result = TypeVar("Result")
DATA = Path(os.environ.get("TERSOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
RESULTS = Path(__file__).parent / "results"


def speed_ratios(tasks: Mapping[str, Callable[[], object]], *, turns: int = 7) -> dict[str, float]:
    """How many times faster each task is than the first: medians over turns in which all of them run one after the other. CPU
    time of this process is counted, so that other work on the machine counts less; use one thread."""
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


def seconds_of(call: Callable[[], object], device: str) -> float:
    """On the clock; on a GPU until it is done."""
    if device == "cuda":
        return gpu_seconds(call)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def gpu_seconds(call: Callable[[], object]) -> float:
    """On the clock, until the GPU is done."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def learn(
    models: Sequence[nn.Module],
    loss: Callable[[], Tensor],
    *,
    rate: float,
    seconds: float,
    steps: int,
    clip: float = 1.0,
    told: str = "",
    record: bool = False,
) -> int:
    """AdamW with 50 steps of warm-up, then a cosine down to 0 at the last of `steps`, or at the end of `seconds` where that comes
    first. loss() is the sum over all models; each has its own clipping. Returns the number of steps.

    record: on a GPU a step is one CUDA graph. loss() then has the same shapes each time, draws from the device's own generator
    and never waits for a number."""
    learned = [[p for p in model.parameters() if p.requires_grad] for model in models]
    every = [p for part in learned for p in part]
    on_gpu = every[0].is_cuda
    rate_now = torch.tensor(rate / 50, device=every[0].device)  # where a graph reads it
    optimizer = torch.optim.AdamW(
        every, rate_now if record and on_gpu else rate, weight_decay=0.01, fused=on_gpu, capturable=record and on_gpu
    )
    for model in models:
        model.train()

    def take() -> Tensor:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        for part in learned:
            nn.utils.clip_grad_norm_(part, clip)
        optimizer.step()
        return value.detach()

    call = recorded(take) if record and on_gpu else take
    step = 0
    for step, share in enumerate(_shares(seconds, steps), 1):
        now = rate * min(step / 50, (1 + math.cos(math.pi * share)) / 2)
        rate_now.fill_(now)
        for group in optimizer.param_groups:
            group["lr"] = rate_now if record and on_gpu else now
        value = call()
        if step % 100 == 0:
            print(f"{told} step {step}, {100 * share:.0f} %: loss {value.item():.4f}", flush=True)
    for model in models:
        model.eval()
    return step


def recorded(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same work as one CUDA graph, after three calls that warm up. The result is always the same tensor, filled anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()

    def again() -> Tensor:
        graph.replay()
        return found

    return again


def _shares(seconds: float, steps: int) -> Iterator[float]:
    """Before each step, the share of the training that is over."""
    started = time.perf_counter()
    for step in range(steps):
        share = max(step / steps, (time.perf_counter() - started) / seconds)
        if share >= 1:
            return
        yield share


def results_of(
    measure: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], *, at_once: int, minutes: float
) -> Iterator[Result]:
    """measure(*task) of every task, so many processes at once, as they are done. A task that did not begin within the minutes is
    given up; one that fails is told, and left out."""
    started = time.perf_counter()
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(measure, *task): task for task in tasks}
        while waiting:
            left = 60 * minutes - (time.perf_counter() - started)
            done, _ = wait(waiting, timeout=left if left > 0 else None, return_when=FIRST_COMPLETED)
            for future in done:
                task = waiting.pop(future)
                if (error := future.exception()) is None:
                    yield future.result()
                else:
                    print(f"failed: {task}: {error!r}", file=sys.stderr, flush=True)
            if time.perf_counter() - started > 60 * minutes:
                waiting = {future: task for future, task in waiting.items() if not future.cancel()}


def processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def versions(*packages: str) -> str:
    """Of Python, torch, tersor and more."""
    others = "".join(f", {name} {importlib.metadata.version(name)}" for name in packages)
    return f"Python {platform.python_version()}, torch {torch.__version__}, tersor {tersor.__version__}{others}"


def hardware() -> str:
    return f"{processor()}, {torch.get_num_threads()} thread(s), {platform.system()}"


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes that a call needs at its peak beyond what the process held before it. Linux alone."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    cpu = torch.device("cpu")
    before = memory_now(cpu)
    call()
    return max(0, peak_memory(cpu) - before)


def machine() -> str:
    return f"{hardware()}; {versions()}"


def gpu(*packages: str) -> str:
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {versions(*packages)}"


def write_table(name: str, text: str) -> None:
    """Keep a table under its benchmark's name."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def write_numbers(name: str, content: Mapping[str, Any]) -> None:
    """Keep the numbers that a table is made of."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def kept_numbers(name: str) -> dict[str, Any]:
    """What `write_numbers` kept; {} where there is nothing yet."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


@contextmanager
def updating(name: str) -> Iterator[dict[str, Any]]:
    """What is kept, to be added to; it is kept again at the end. Several processes may do so, one waits for the other."""
    with (Path(tempfile.gettempdir()) / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = kept_numbers(name)
        yield found
        write_numbers(name, found)


def command() -> str:
    """This call of a benchmark, as a line for a shell."""
    return f"python {shlex.join([f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]])}"


def runs_with_this(name: str, where: str) -> list[str]:
    """The runs that the kept rows come from, and this one. where: machine and versions."""
    return list(dict.fromkeys([*kept_numbers(name).get("runs", []), f"`{command()}`; {where}"]))


def refuse_to_keep_quick(asked: argparse.Namespace) -> None:
    if asked.quick and asked.write:
        sys.exit("--quick measures nothing that is worth keeping: leave --write out")
