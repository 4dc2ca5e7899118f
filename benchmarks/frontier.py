"""Every method that takes a language model, and stacks of them, on the built-in model: size, perplexity, speed, as one frontier.

    TERSOR_DATA=../shared/data python benchmarks/frontier.py --processes 12 --write      sizes and perplexities
    OMP_NUM_THREADS=1 python benchmarks/frontier.py --speed --write                      tokens per second
    ... --only "gptq" "best"     rows whose name begins so
    ... --again                  table and picture from the kept numbers
    ... --quick                  few samples, steps and windows: whether it runs, not what it is worth

Rows that are kept are not measured again. Every row compresses `demo` to a directory, as `tersor compress` does, and evaluates
what is read back from it.

- All rows calibrate, and learn, on the same 256 samples of 512 tokens of English books, drawn with seeds 0, 1 and 2 (three
  draws), 0 and 1 (two) or 0. Methods that look at no samples need one.
- Perplexity: WikiText-2 (test split), the first 60 windows of 1024 tokens. MB: all tensors on disk; the embedding, which is the
  output head too, takes 6.3 MB of them in every row but where a method takes it.
- Tokens per second: new tokens one after another with a cache, batch 1, 64 of them after a prompt of 32, by the processor time of
  one thread, as `tersor sample` runs the directory on a CPU; median of five turns in which all rows run one after the other. The
  time does not depend on the values of the weights, so these models are compressed on a few samples, on the CPU, and without
  steps that only change integers and scales.
- Options that are not named are the methods' defaults. `advised`: act-order, static groups, weighted. "Per channel": one scale
  and zero point for each output; else groups of 128, symmetric. dsformer and teacher-intervention learn at a rate of 5e-4,
  because their defaults are for more steps than there are here. The latter rounds activations to 8 bits by one grid over all
  tokens, so that a token sees a little of those after it; with ternary weights perplexity refuses it for this reason. No option
  was chosen on the test windows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    kept_numbers,
    machine,
    refuse_to_keep_quick,
    results_of,
    runs_with_this,
    versions,
    write_numbers,
    write_table,
)
from quality import CALIBRATION, MODEL, check_data, perplexity, where

import tersor
from tersor.checkpoint.source import open_checkpoint, resolve
from tersor.compress import GPTQ, RTN, Method, compress
from tersor.compress.best import best_steps
from tersor.methods.activations.bct import BCT
from tersor.methods.method import PackedMethod
from tersor.methods.structure.drop_blocks import DropBlocks
from tersor.methods.structure.dsformer import DSFormer
from tersor.methods.structure.fusegpt import FuseGPT
from tersor.methods.structure.greenformers import Greenformers
from tersor.methods.training.rounding import Rounding
from tersor.methods.training.scales import Scales
from tersor.methods.training.teacher_intervention import TeacherIntervention
from tersor.methods.weights.awq_scale import AWQScale
from tersor.methods.weights.magnitude import Magnitude
from tersor.methods.weights.smoothquant import SmoothQuant
from tersor.methods.weights.sparsegpt import SparseGPT
from tersor.methods.weights.wanda import Wanda
from tersor.runtime.bench import random_prompt
from tersor.runtime.engine import Engine
from tersor.runtime.generate import make_engine

NAME, DRAWS = "frontier", 3
ORIGINAL = "original"
PROMPT, NEW = 32, 64  # tokens of a turn
HIGHEST = 400  # perplexity in the picture


@dataclass(frozen=True)
class Size:
    samples: int = 256
    seq_len: int = 512
    windows: int = 60
    epochs: int = 20  # of dsformer and fusegpt
    steps: int = 600  # of teacher-intervention

    @property
    def text(self) -> dict[str, Any]:
        return {"calibration": CALIBRATION, "samples": self.samples, "seq_len": self.seq_len, "dtype": "float32"}


QUICK = Size(samples=8, seq_len=64, windows=1, epochs=1, steps=3)


@dataclass(frozen=True)
class Row:
    name: str
    draw: int
    megabytes: float
    perplexity: float
    seconds: float  # to compress
    on: str


def advised(bits: int, **options: Any) -> GPTQ:
    return GPTQ(bits=bits, desc_act=True, static_groups=True, weighted=True, **options)


def methods(size: Size) -> dict[str, Sequence[Method]]:
    """One method each, with what it stands on."""
    intervened = TeacherIntervention(
        w_bits=2,
        steps=size.steps,
        intervention_steps=size.steps // 3,
        lr=5e-4,
        batch_size=8,
    )
    return {
        "rtn, 8 bits": [RTN(bits=8)],
        "rtn, 4 bits": [RTN(bits=4)],
        "gptq, 4 bits": [GPTQ(bits=4)],
        "gptq advised, 4 bits": [advised(4)],
        "gptq advised, 3 bits": [advised(3)],
        "gptq advised, 2 bits": [advised(2)],
        "awq-scale and rtn, 4 bits": [AWQScale(bits=4), RTN(bits=4)],
        "smoothquant and rtn, W8A8": [SmoothQuant(), RTN(bits=8, group_size=-1, a_bits=8)],
        "rounding after gptq advised, 3 bits": [advised(3), Rounding()],
        "scales after gptq advised, 3 bits": [advised(3), Scales()],
        "bct, 8 bits": [BCT()],
        "magnitude, 2:4": [Magnitude(pattern="2:4")],
        "wanda, 2:4": [Wanda(pattern="2:4")],
        "sparsegpt, 2:4": [SparseGPT(pattern="2:4")],
        "sparsegpt, 50 %": [SparseGPT()],
        "drop-blocks, 1 of 6": [DropBlocks(blocks=1)],
        "fusegpt, 1 of 6": [FuseGPT(blocks=1, epochs=size.epochs)],
        "greenformers, rank 0.9": [Greenformers(rank=0.9, whiten=True)],
        "greenformers, rank 0.75": [Greenformers(rank=0.75, whiten=True)],
        "dsformer, 2x": [DSFormer(ratio=2.0, epochs=size.epochs, lr=5e-4)],
        "teacher-intervention, 2 bits": [intervened],
    }


def stacks(size: Size) -> dict[str, Sequence[Method]]:
    def best(bits: int, name: str = "best") -> list[Method]:
        grid = {"bits": bits, "group_size": -1, "sym": False}
        return [step.method for step in best_steps(name, grid, samples=size.samples, seq_len=size.seq_len)]

    return {
        "best, 4 bits per channel": best(4),
        "best, 3 bits per channel": best(3),
        "best, 2 bits per channel": best(2),
        "awq-scale, gptq advised, scales: 4 bits": [AWQScale(bits=4), advised(4), Scales()],
        "sparsegpt 2:4 in 4 bits, scales": [SparseGPT(pattern="2:4", bits=4), Scales()],
        "fusegpt 1 of 6, best-fast 4 bits per channel": [
            FuseGPT(blocks=1, epochs=size.epochs),
            *best(4, "best-fast"),
        ],
        "drop-blocks 1 of 6, best 3 bits per channel": [DropBlocks(blocks=1), *best(3)],
        "greenformers rank 0.9, best-fast 4 bits per channel": [
            Greenformers(rank=0.9, whiten=True, multiple=32),
            *best(4, "best-fast"),
        ],
    }


def recipes(size: Size) -> dict[str, Sequence[Method]]:
    return methods(size) | stacks(size)


def measure(name: str, draw: int, size: Size) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        done = compress(MODEL, list(recipes(size)[name]), out=out, seed=draw, **size.text).summary
        assert done.size_after is not None
        return Row(name, draw, done.size_after / 1e6, perplexity(out, size.windows), done.seconds, device())


def original(size: Size) -> Row:
    directory = resolve(MODEL)
    return Row(ORIGINAL, 0, open_checkpoint(directory).size() / 1e6, perplexity(directory, size.windows), 0, device())


def speeds(names: Sequence[str], turns: int) -> dict[str, float]:
    """New tokens per second of processor time, by name."""
    assert torch.get_num_threads() == 1, "set OMP_NUM_THREADS=1: CPU time counts every thread"
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as folder:
        for n, name in enumerate(names):
            out = resolve(MODEL)
            if name != ORIGINAL:
                out = Path(folder) / str(n)
                steps = [step for step in recipes(QUICK)[name] if not isinstance(step, PackedMethod)]
                compress(MODEL, steps, out=out, **QUICK.text)
            engines[name] = make_engine(tersor.load(out), capacity=PROMPT + NEW)
            print(name, type(engines[name]).__name__, file=sys.stderr, flush=True)
    found: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for turn in range(turns + 1):
            for name, engine in engines.items():
                seconds = decode(engine)
                if turn:  # the first one warms up
                    found[name].append(NEW / seconds)
    return {name: statistics.median(each) for name, each in found.items()}


def decode(engine: Engine) -> float:
    """Seconds of processor time for the new tokens."""
    engine.reset()
    token = engine.forward(random_prompt(8192, batch=1, tokens=PROMPT)).argmax(-1, keepdim=True)
    started = time.process_time()
    for _ in range(NEW):
        token = engine.forward(token).argmax(-1, keepdim=True)
    return time.process_time() - started


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (MB, perplexity) that no other is as good as in both and better in one, the smallest first."""
    found = []
    least = float("inf")
    for name, (_, lost) in sorted(points.items(), key=lambda item: item[1]):
        if lost < least:
            found.append(name)
            least = lost
    return found


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    order = [ORIGINAL, *recipes(Size())]
    return {name: each for name in order if (each := [row for row in rows if row.name == name])}


def points_of(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Mean MB and perplexity over the draws."""
    return {
        name: (statistics.mean(row.megabytes for row in each), statistics.mean(row.perplexity for row in each))
        for name, each in by_name(rows).items()
    }


def table(rows: Sequence[Row], tokens: Mapping[str, float]) -> str:
    points, front = points_of(rows), pareto(points_of(rows))
    lines = [
        "| | MB | perplexity | range | draws | tokens/s | seconds | on the frontier |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for name, each in by_name(rows).items():
        values = [row.perplexity for row in each]
        spread = f"{min(values):.2f} to {max(values):.2f}" if len(each) > 1 else ""
        speed = f"{tokens[name]:.0f}" if name in tokens else ""
        seconds = "" if name == ORIGINAL else f"{statistics.mean(row.seconds for row in each):.0f}"
        size, lost = points[name]
        lines.append(
            f"| {name} | {size:.2f} | {lost:.2f} | {spread} | {len(each)} | {speed} | {seconds} | "
            f"{'yes' if name in front else ''} |"
        )
    return "\n".join(lines)


def picture(rows: Sequence[Row], tokens: Mapping[str, float]) -> None:
    """Size and perplexity of all rows with the range of the draws, the colour by speed, the frontier named; where matplotlib is
    installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = points_of(rows)
    front = pareto(points)
    figure, axis = pyplot.subplots(figsize=(10, 6.5))
    for name, each in by_name(rows).items():
        values = [row.perplexity for row in each]
        axis.plot([points[name][0]] * 2, [min(values), max(values)], color="grey", linewidth=1, zorder=1)
    timed = [name for name in points if name in tokens]
    plain = [name for name in points if name not in tokens]
    if plain:
        axis.scatter(*zip(*(points[name] for name in plain), strict=True), color="lightgrey", zorder=2)
    if timed:
        places = list(zip(*(points[name] for name in timed), strict=True))
        dots = axis.scatter(*places, c=[tokens[name] for name in timed], cmap="viridis", zorder=3)
        figure.colorbar(dots, label="new tokens per second, one CPU thread")
    axis.step(*zip(*(points[name] for name in front), strict=True), where="post", color="tab:red", linewidth=1)
    for name, (size, lost) in points.items():
        if lost < HIGHEST:
            up = name in front
            axis.annotate(
                name,
                (size, lost),
                xytext=(2, -3) if up else (2, 3),
                textcoords="offset points",
                fontsize=7 if up else 6,
                color="black" if up else "grey",
                rotation=-75 if up else 35,
                rotation_mode="anchor",
                verticalalignment="top" if up else "bottom",
            )
    left_out = [name for name, (_, lost) in points.items() if lost >= HIGHEST]
    title = "demo: size and perplexity" + (f" (above: {', '.join(left_out)})" if left_out else "")
    axis.set(xlabel="MB on disk", ylabel="perplexity, WikiText-2", yscale="log", ylim=(9, HIGHEST), xlim=(8, 28))
    axis.set_title(title)
    figure.tight_layout()
    figure.savefig(RESULTS.parents[1] / "docs" / "images" / f"{NAME}.png", dpi=80)
    pyplot.close(figure)


def write(rows: Sequence[Row], tokens: Mapping[str, float], runs: Sequence[str]) -> None:
    order = list(by_name(rows))
    rows = sorted(rows, key=lambda row: (order.index(row.name), row.draw))
    about = (__doc__ or "").split("\n\n", 3)[3].strip()
    said = "\n".join(f"- {run}" for run in runs)
    front = ", ".join(f"`{name}`" for name in pareto(points_of(rows)))
    untimed = "" if tokens else "\nThe speeds are not measured yet.\n"
    title = "# The frontier of size and perplexity on demo"
    text = f"""{title}

{table(rows, tokens)}

On the frontier, no other row being smaller and better in the mean: {front}. Picture: docs/images/{NAME}.png.
{untimed}
{about}

{said}
"""
    write_table(NAME, text)
    write_numbers(NAME, {"runs": list(runs), "rows": [asdict(row) for row in rows], "tokens_per_second": dict(tokens)})
    picture(rows, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name begins so")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--processes", type=int, default=1, help="how many jobs at once")
    parser.add_argument("--minutes", type=float, default=600, help="begins no job after so many")
    parser.add_argument("--speed", action="store_true", help="measure the speeds, not the perplexities")
    parser.add_argument("--turns", type=int, default=5, help="of the speeds")
    parser.add_argument("--again", action="store_true", help="table and picture from the kept numbers")
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    asked = parser.parse_args()
    refuse_to_keep_quick(asked)
    kept = kept_numbers(NAME) if asked.write or asked.again else {}
    rows, tokens = [Row(**each) for each in kept.get("rows", [])], dict(kept.get("tokens_per_second", {}))
    if asked.again:
        write(rows, tokens, kept["runs"])
        return
    check_data()
    size = QUICK if asked.quick else Size()
    names = [name for name in recipes(size) if name.startswith(tuple(asked.only))]
    runs = runs_with_this(NAME, machine() if asked.speed else f"{where()}; {versions('transformers')}")
    if asked.speed:
        tokens |= speeds([ORIGINAL, *names], asked.turns)
        if asked.write:
            write(rows, tokens, runs)
        print(table(rows, tokens) if rows else tokens)
        return
    known = {(row.name, row.draw) for row in rows}
    if (ORIGINAL, 0) not in known:
        rows.append(original(size))
    long_first = names[::-1]  # stacks, and methods that learn
    tasks = [
        (name, draw, size)
        for draw in range(1 if asked.quick else asked.draws)
        for name in long_first
        if (name, draw) not in known and (draw == 0 or any(each.needs_samples for each in recipes(size)[name]))
    ]
    for row in results_of(measure, tasks, at_once=asked.processes, minutes=asked.minutes):
        print(f"{row.perplexity:10.2f} {row.megabytes:6.2f} MB {row.seconds:5.0f} s  {row.name}, draw {row.draw}")
        sys.stdout.flush()
        rows.append(row)
        if asked.write:  # as they come, so that a run that is stopped leaves what it has
            write(rows, tokens, runs)
    print(table(rows, tokens))


if __name__ == "__main__":
    main()
