"""One linear layer on a CPU, packed weights against torch's own: ratios of times taken turn by turn in one run.

    python benchmarks/cpu_matmul.py                    prints the tables
    python benchmarks/cpu_matmul.py --write            and keeps them in benchmarks/results/cpu_matmul.md
    python benchmarks/cpu_matmul.py --one-thread       processor time of one thread, for a machine that others use too

Every turn runs all competitors once, so that each finds the caches filled by the others (weights come from memory) and
all share whatever else the machine does. A cell is the median of the turns' ratios; the table of times has the fastest
turn of each. Weights are random: the time does not depend on the values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import write_table

from tersor.formats.packing import packed_size
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels import quantized_matmul_cpu as cpu
from tersor.kernels import quantized_matmul_int4 as int4

IN_FEATURES, OUT_FEATURES = 4096, 11008
ROWS = (1, 4, 8, 16, 32, 64, 256)
VARIANTS = {  # bits, group size, symmetric, act-order
    "4 bits": (4, 128, True, False),
    "8 bits": (8, 128, True, False),
    "3 bits": (3, 128, True, False),
    "2 bits": (2, 128, True, False),
    "4 bits, groups of 32": (4, 32, True, False),
    "4 bits, groups of 64": (4, 64, True, False),
    "4 bits per channel": (4, -1, True, False),
    "4 bits, asymmetric": (4, 128, False, False),
    "4 bits, act-order": (4, 128, True, True),
}


def random_weight(bits: int, group_size: int, symmetric: bool, act_order: bool) -> QuantizedWeight:
    groups = 1 if group_size == -1 else IN_FEATURES // group_size
    words = torch.randint(-(2**31), 2**31, (packed_size(IN_FEATURES, bits), OUT_FEATURES), dtype=torch.int32)
    zeros = torch.full((groups, OUT_FEATURES), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 2**bits, zeros.shape, dtype=torch.uint8)
    g_idx = (torch.randperm(IN_FEATURES) // group_size).to(torch.int32) if act_order else None
    scales = torch.rand(groups, OUT_FEATURES).to(torch.float16)
    return QuantizedWeight(words, scales, zeros, g_idx, bits, group_size, IN_FEATURES)


def take_turns(
    competitors: dict[str, Callable[[], object]], turns: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(turns + 2):
        for name, call in competitors.items():
            start = clock()
            call()
            if turn >= 2:
                seconds[name].append(clock() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def measure(turns: int, clock: Callable[[], float]) -> dict[int, dict[str, list[float]]]:
    """Seconds of every turn, by rows of x and competitor."""
    weights = {name: random_weight(*variant) for name, variant in VARIANTS.items()}
    torch_int4 = int4.prepare(weights["4 bits"])
    packed = {name: cpu.prepare(weight) for name, weight in weights.items()}
    dense = torch.randn(OUT_FEATURES, IN_FEATURES)
    dense_bf16 = dense.bfloat16()
    seconds = {}
    for rows in ROWS:
        x = torch.randn(rows, IN_FEATURES)
        x_bf16 = x.bfloat16()
        competitors: dict[str, Callable[[], object]] = {
            "F.linear bf16": lambda x=x_bf16: F.linear(x, dense_bf16),
            "F.linear fp32": lambda x=x: F.linear(x, dense),
            "torch int4": lambda x=x_bf16: int4.matmul(x, torch_int4),
            "4 bits, fp32": lambda x=x: cpu.matmul(x, packed["4 bits"]),
        }
        for name, weight in packed.items():
            competitors[name] = lambda x=x_bf16, weight=weight: cpu.matmul(x, weight)
        seconds[rows] = take_turns(competitors, turns if rows <= 64 else turns // 2, clock)
    return seconds


def table(title: str, columns: list[str], cell: Callable[[int, str], str]) -> str:
    lines = [f"### {title}", "", f"| rows | {' | '.join(columns)} |", "| ---: " * (len(columns) + 1) + "|"]
    lines += [f"| {rows} | {' | '.join(cell(rows, column) for column in columns)} |" for rows in ROWS]
    return "\n".join(lines) + "\n"


def report(seconds: dict[int, dict[str, list[float]]]) -> str:
    def against(peer: str) -> Callable[[int, str], str]:
        return lambda rows, name: f"{ratio(seconds[rows][peer], seconds[rows][name]):.2f}"

    bits, others = list(VARIANTS)[:4], list(VARIANTS)[4:]
    columns = ["F.linear bf16", "F.linear fp32", "torch int4", *bits, "4 bits, fp32"]
    return "\n".join(
        [
            table("bf16 activations, times faster than F.linear", ["torch int4", *bits], against("F.linear bf16")),
            table("bf16 activations, times faster than torch's int4 operator", bits[:1], against("torch int4")),
            table("float32 activations, times faster than F.linear", ["4 bits, fp32"], against("F.linear fp32")),
            table("Other grids, bf16 activations, times faster than F.linear", others, against("F.linear bf16")),
            table("Fastest turn, ms", columns, lambda rows, name: f"{min(seconds[rows][name]) * 1e3:.2f}"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument("--one-thread", action="store_true", help="processor time of one thread instead of wall time")
    arguments = parser.parse_args()
    if arguments.one_thread:
        torch.set_num_threads(1)
    clock = time.thread_time if arguments.one_thread else time.perf_counter
    command = f"--turns {arguments.turns}{' --one-thread' if arguments.one_thread else ''} --write"
    text = f"""# A linear layer {IN_FEATURES} -> {OUT_FEATURES} on a CPU

Command: `python benchmarks/cpu_matmul.py {command}`. torch {torch.__version__},
{cpu.describe()}{", processor time" if arguments.one_thread else ""}.
Groups of 128 and symmetric where nothing else is said. Cells are medians of {arguments.turns} turns
({arguments.turns // 2} for 256 rows) in which all competitors run one after the other; above 1 is faster than the peer.

{report(measure(arguments.turns, clock))}"""
    print(text)
    if arguments.write:
        write_table("cpu_matmul", text)


if __name__ == "__main__":
    main()
