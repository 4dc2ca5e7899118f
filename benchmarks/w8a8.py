"""Eight-bit weights with inputs rounded to 8 bits too: what is lost on the built-in model, and how fast the products are.

    TERSOR_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/w8a8.py            prints the tables
    TERSOR_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/w8a8.py --write    and keeps them in benchmarks/results/w8a8.md

Every row of the first table compresses `demo` to a directory, as `tersor compress` does, and evaluates what is read back from it:
WikiText-2 perplexity over windows of 1,024 tokens.

The speed is that of one square linear layer: times less processor time than F.linear in float32, or in bfloat16, for the same
rows, the rounding of the rows counted. All run turn by turn, so each finds the caches filled by the others; a cell is the
median of the turns' ratios. With two threads the processor time is that of both together: where others
use the machine too, it counts how long they wait for each other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import command, machine, write_table
from quality import CALIBRATION, MODEL, SEQ_LEN, check_data, perplexity

from tersor import GPTQ, RTN
from tersor.checkpoint.source import open_checkpoint, resolve
from tersor.compress import Method, compress
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels import int8_matmul as int8
from tersor.methods.weights.smoothquant import SmoothQuant

ROWS = (1, 16, 64, 512)
WIDTHS = (1024, 2048, 4096)
METHODS: dict[str, Sequence[Method]] = {
    "W8: rounding": [RTN(bits=8, group_size=-1)],
    "W8A8: rounding": [RTN(bits=8, group_size=-1, a_bits=8)],
    "W8A8: GPTQ": [GPTQ(bits=8, group_size=-1, a_bits=8)],
    "W8A8: SmoothQuant, rounding": [SmoothQuant(), RTN(bits=8, group_size=-1, a_bits=8)],
    "W8A8: SmoothQuant 0.75, rounding": [SmoothQuant(alpha=0.75), RTN(bits=8, group_size=-1, a_bits=8)],
}


def quality(samples: int, windows: int) -> list[str]:
    lines = ["| | MB on disk | perplexity |", "| --- | ---: | ---: |"]
    rows = [("original", open_checkpoint(resolve(MODEL)).size(), perplexity(resolve(MODEL), windows))]
    for name, methods in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model"
            result = compress(MODEL, list(methods), out=out, calibration=CALIBRATION, samples=samples, seq_len=SEQ_LEN)
            assert result.summary.size_after is not None
            rows.append((name, result.summary.size_after, perplexity(out, windows)))
            print(rows[-1], file=sys.stderr, flush=True)
    return lines + [f"| {name} | {size / 1e6:.1f} | {found:.3f} |" for name, size, found in rows]


def packed_weight(width: int) -> int8.Int8Weight:
    codes = torch.randint(0, 256, (width, width), dtype=torch.uint8)
    zeros = torch.full((1, width), 128, dtype=torch.uint8)
    weight = QuantizedWeight.from_codes(codes, torch.rand(1, width), zeros, bits=8, group_size=-1)
    return int8.prepare(replace(weight, a_bits=8))


def ratios(width: int, rows: int, threads: int, turns: int) -> tuple[float, float]:
    """Times less processor time than float32 and than bfloat16."""
    torch.set_num_threads(threads)
    packed = packed_weight(width)
    x, dense = torch.randn(rows, width), torch.randn(width, width)
    x_bf16, dense_bf16 = x.bfloat16(), dense.bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "float32": lambda: torch.nn.functional.linear(x, dense),
        "8 bits": lambda: int8.matmul(x, packed),
        "bfloat16": lambda: torch.nn.functional.linear(x_bf16, dense_bf16),
        "8 bits, bfloat16": lambda: int8.matmul(x_bf16, packed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    repeats = max(1, 2**22 // (rows * width))
    for turn in range(turns + 1):
        for name, call in calls.items():
            began = time.process_time()
            for _ in range(1 if rows * width >= 2**20 else min(repeats, 20)):
                call()
            if turn:
                seconds[name].append(time.process_time() - began)
    torch.set_num_threads(1)

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(s / f for s, f in zip(seconds[slow], seconds[fast], strict=True))

    return ratio("float32", "8 bits"), ratio("bfloat16", "8 bits, bfloat16")


def speed(turns: int) -> list[str]:
    lines = ["| rows | " + " | ".join(f"{w}, {t} thread{'s' * (t > 1)}" for w in WIDTHS for t in (1, 2)) + " |"]
    lines += ["| ---: |" + " ---: |" * (2 * len(WIDTHS))]
    for rows in ROWS:
        cells = []
        for width in WIDTHS:
            for threads in (1, 2):
                float32, bfloat16 = ratios(width, rows, threads, turns if rows * width < 2**21 else 3)
                cells.append(f"{float32:.2f} ({bfloat16:.1f})")
        lines.append(f"| {rows} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="calibration samples of 1024 tokens")
    parser.add_argument("--windows", type=int, default=60, help="evaluation windows of 1024 tokens")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="keep the tables in benchmarks/results/")
    asked = parser.parse_args()
    check_data()
    with torch.inference_mode():
        times = speed(asked.turns)
    lost = quality(asked.samples, asked.windows)
    described = (__doc__ or "").strip()
    text = "\n".join(
        [
            "# Weights and inputs in 8 bits, on a CPU",
            "",
            described[described.index("Every row") :],
            "",
            *lost,
            "",
            "Times less processor time than F.linear in float32, in brackets than in bfloat16. The widths are of the layer's "
            f"inputs and outputs. Kernel: {packed_weight(64).implementation}.",
            "",
            *times,
            "",
            machine(),
            f"`OMP_NUM_THREADS=1 {command()}`",
            "",
        ]
    )
    print(text)
    if asked.write:
        write_table("w8a8", text)


if __name__ == "__main__":
    main()
