"""What each rung above GPTQ keeps, in the same files: WikiText-2 perplexity of the built-in model, rung by rung.

    TERSOR_DATA=../shared/data python benchmarks/ladder.py             prints the table
    TERSOR_DATA=../shared/data python benchmarks/ladder.py --write     and keeps it in benchmarks/results/ladder.md and .json
    ... --only "3 bits, g128" --rungs best --draws 1             measures these; --write then keeps the others as they were
    ... --processes 14           measures so many at once, for a machine of many cores with a GPU
    ... --quick                  few samples and windows, one grid: whether it runs, not what it is worth

Every rung starts from the file that the rung before it left, as `tersor compress METHOD PACKED --original demo` does; seconds are
those of all rungs up to it. The first draw of calibration samples has all rungs, the others those that users would choose.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import kept_numbers, refuse_to_keep_quick, runs_with_this, versions, write_numbers, write_table
from quality import CALIBRATION, MODEL, SEQ_LEN, check_data, perplexity, where

from tersor.checkpoint.source import resolve
from tersor.compress import GPTQ, RTN, Method, compress
from tersor.compress.best import best_steps
from tersor.methods.training.rounding import Rounding
from tersor.methods.training.scales import Scales

GRIDS: dict[str, dict[str, Any]] = {
    "4 bits, g128": {"bits": 4},
    "4 bits, per channel": {"bits": 4, "group_size": -1, "sym": False},
    "3 bits, g128": {"bits": 3},
    "3 bits, per channel": {"bits": 3, "group_size": -1, "sym": False},
    "2 bits, g128": {"bits": 2},
    "2 bits, g32 asym": {"bits": 2, "group_size": 32, "sym": False},
    "ternary, g128": {"bits": "ternary"},
    "3.25 bits, any mixture": {},
}
TARGETS = {"3.25 bits, any mixture": 3.25}  # bits a weight in all, where the job chooses each layer's
DRAWS = 3
WEIGHTED, ASYMMETRIC = "GPTQ, act-order, static groups, weighted", "the same, asymmetric"
OUTPUTS = "the same, asymmetric, with output factor"
FAST, BEST = "best-fast", "best"
ALWAYS = ("GPTQ", WEIGHTED, ASYMMETRIC, FAST, BEST)  # the rungs of every draw


@dataclass(frozen=True)
class Row:
    grid: str
    rung: str
    draw: int
    bits_per_weight: float  # over the quantized layers, scales and zero points included
    perplexity: float
    seconds: float  # of this rung and those that it stands on
    device: str  # that it ran on


def rungs(grid: dict[str, Any], samples: int, seq_len: int) -> list[tuple[str, str, Method]]:
    """What is measured: a name, the name of the rung that it stands on ("": the original), and the method."""
    fast, best = (
        [step.method for step in best_steps(name, grid, samples=samples, seq_len=seq_len)] for name in (FAST, BEST)
    )
    assert fast[0] == best[0]
    assert isinstance(best[0], GPTQ)
    size = best[1].batch_size  # type: ignore[attr-defined]
    return [
        ("rounding", "", RTN(**grid)),
        ("GPTQ", "", GPTQ(**grid)),
        (WEIGHTED, "", GPTQ(**grid, desc_act=True, static_groups=True, weighted=True)),
        (ASYMMETRIC, "", best[0]),
        (OUTPUTS, "", replace(best[0], output_factor=True)),
        (FAST, ASYMMETRIC, fast[1]),
        (BEST, ASYMMETRIC, best[1]),
        ("best, not asymmetric", WEIGHTED, best[1]),
        ("best, scales only", ASYMMETRIC, Scales(epochs=best[1].epochs, batch_size=size)),  # type: ignore[attr-defined]
        ("asymmetric, then rounding by blocks", ASYMMETRIC, Rounding(batch_size=size)),
    ]


def climb(
    name: str, draw: int, wanted: tuple[str, ...], samples: int, seq_len: int, windows: int, dtype: str
) -> Iterator[Row]:
    """The wanted rows of one grid and one draw, as they are measured. What they stand on is made too."""
    steps = rungs(GRIDS[name], samples, seq_len)
    needed = {below for rung, below, _ in steps if rung in wanted}
    seconds: dict[str, float] = {"": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        made = {rung: Path(folder) / str(n) for n, (rung, *_) in enumerate(steps)}
        for rung, below, method in steps:
            if (rung not in needed and rung not in wanted) or (name in TARGETS and rung == "rounding"):
                continue  # rounding cannot choose
            asked: dict[str, Any] = {"out": made[rung], "dtype": dtype}
            if rung != "rounding":
                asked |= {"calibration": CALIBRATION, "samples": samples, "seq_len": seq_len, "seed": draw}
            if not below and name in TARGETS:
                asked["target_bits"] = TARGETS[name]
            done = compress(made[below], method, original=MODEL, **asked) if below else compress(MODEL, method, **asked)
            seconds[rung] = seconds[below] + done.summary.seconds
            if rung in wanted:
                bits = done.summary.bits_per_weight
                yield Row(name, rung, draw, bits, perplexity(made[rung], windows), seconds[rung], device())


def report(found: Any, *asked: Any) -> None:
    """Put the rows into a queue as they come."""
    for row in climb(*asked):
        found.put(row)


def measured(
    tasks: list[tuple[str, int, tuple[str, ...]]], given: tuple[int, int, int, str], at_once: int
) -> Iterator[Row]:
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(at_once, mp_context=context) as pool:
        found = manager.Queue()
        running = {pool.submit(report, found, *task, *given) for task in tasks}
        while running or not found.empty():
            done, running = wait(running, timeout=1)
            for each in done:
                each.result()  # raises what the process raised
            while not found.empty():
                yield found.get()


def table(rows: list[Row]) -> str:
    lines = [
        "| | | bits a weight | perplexity | draws | seconds | on |",
        "| --- | --- | ---: | ---: | --- | ---: | --- |",
    ]
    for (grid, rung), found in itertools.groupby(rows, lambda row: (row.grid, row.rung)):
        each = list(found)
        values = [row.perplexity for row in each]
        spread = f"{len(each)}: {min(values):.2f} to {max(values):.2f}" if len(each) > 1 else "1"
        seconds = statistics.mean(row.seconds for row in each)
        mean = statistics.mean(values)
        on = ", ".join(sorted({row.device for row in each}))
        bits = each[0].bits_per_weight
        lines.append(f"| {grid} | {rung} | {bits:.3f} | {mean:.2f} | {spread} | {seconds:.0f} | {on} |")
    return "\n".join(lines)


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=64, help="calibration samples")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of these")
    parser.add_argument("--windows", type=int, default=60, help="evaluation windows of 1024 tokens")
    parser.add_argument("--only", nargs="*", default=[], help="grids")
    parser.add_argument("--processes", type=int, default=1, help="how many jobs at once")
    parser.add_argument("--rungs", nargs="*", default=names(), choices=names(), help="rows of each grid")
    parser.add_argument("--draws", type=int, default=DRAWS, help="draws of calibration samples")
    parser.add_argument("--dtype", default="auto", help="of the forward passes while quantizing")
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    check_data()
    refuse_to_keep_quick(arguments)
    if arguments.quick:
        arguments.samples, arguments.seq_len, arguments.windows = 8, 64, 2
        arguments.only = ["3 bits, g128"]
    return arguments


def main() -> None:
    arguments = arguments_of()
    grids = [grid for grid in GRIDS if not arguments.only or grid.startswith(tuple(arguments.only))]
    original = perplexity(resolve(MODEL), arguments.windows)
    others = tuple(rung for rung in arguments.rungs if rung not in ALWAYS)
    always = tuple(rung for rung in arguments.rungs if rung in ALWAYS)
    tasks = [(grid, draw, always) for draw in range(1 if arguments.quick else arguments.draws) for grid in grids]
    tasks += [(grid, 0, others) for grid in grids if others]
    rows = kept() if arguments.write else []
    given = (arguments.samples, arguments.seq_len, arguments.windows, arguments.dtype)
    for row in measured(tasks, given, arguments.processes):
        print(f"{row.perplexity:10.2f}  {row.seconds:6.0f} s  {row.grid}, draw {row.draw}: {row.rung}", file=sys.stderr)
        rows = in_order([*(each for each in rows if place(each) != place(row)), row])
        if arguments.write:  # as they come, so that a run that is stopped leaves what it has
            write(rows, original, arguments)
    print(f"original: {original:.2f}\n\n{table(rows)}")


def names() -> list[str]:
    return [rung for rung, *_ in rungs({}, 1, 1)]


def place(row: Row) -> tuple[int, int, int]:
    """Of a row in the table: by grid, rung and draw."""
    return list(GRIDS).index(row.grid), names().index(row.rung), row.draw


def in_order(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=place)


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def kept() -> list[Row]:
    return [Row(**row) for row in kept_numbers("ladder").get("rows", [])]


def write(rows: list[Row], original: float, arguments: argparse.Namespace) -> None:
    runs = runs_with_this("ladder", f"{where()}; {versions('transformers')}")
    evaluated, learned = (
        f"{arguments.windows} windows of {SEQ_LEN}",
        f"{arguments.samples} samples of {arguments.seq_len}",
    )
    text = f"""# What each rung above GPTQ keeps

The built-in model `demo` (12.6 million parameters), perplexity on WikiText-2 (test split, the first {evaluated}
tokens); the original has {original:.2f}. All rungs calibrate on {learned} tokens of English books and see nothing
else. A mean over draws of these samples has its range beside it. Seconds are those of all rungs up to a row,
the mean over draws, while other such jobs shared the machine. All rows of one grid are files of the same format and size.
Rows on a GPU learned in its default precision, bfloat16, those on a CPU in that of the command.

{table(rows)}

{chr(10).join(f"- {run}" for run in runs)}
"""
    write_table("ladder", text)
    write_numbers("ladder", {"runs": runs, "original": original, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
