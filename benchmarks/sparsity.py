"""What pruning costs: WikiText-2 perplexity of the built-in model after magnitude, Wanda and SparseGPT.

    TERSOR_DATA=../shared/data python benchmarks/sparsity.py            prints the table
    TERSOR_DATA=../shared/data python benchmarks/sparsity.py --write    and keeps it in benchmarks/results/sparsity.md

Every row compresses `demo` to a directory, as `tersor compress` does, and evaluates what is read back from it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import versions, write_table
from quality import CALIBRATION, MODEL, SEQ_LEN, check_data, perplexity, where

from tersor import GPTQ
from tersor.checkpoint.source import open_checkpoint, resolve
from tersor.compress import Method, compress
from tersor.methods.weights.magnitude import Magnitude
from tersor.methods.weights.sparsegpt import SparseGPT
from tersor.methods.weights.wanda import Wanda

METHODS: dict[str, Method] = {
    "50 %: magnitude": Magnitude(),
    "50 %: Wanda": Wanda(),
    "50 %: SparseGPT": SparseGPT(),
    "2:4: magnitude": Magnitude(pattern="2:4"),
    "2:4: Wanda": Wanda(pattern="2:4"),
    "2:4: SparseGPT": SparseGPT(pattern="2:4"),
    "4 bits: GPTQ": GPTQ(),
    "2:4 and 4 bits: SparseGPT": SparseGPT(pattern="2:4", bits=4),
}


@dataclass(frozen=True)
class Row:
    name: str
    sparsity: float | None  # of the layers that were pruned
    megabytes: float  # of all tensors on disk
    perplexity: float
    seconds: float | None


def measure(name: str, method: Method, samples: int, windows: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "model", time.perf_counter()
        given = {"calibration": CALIBRATION, "samples": samples, "seq_len": SEQ_LEN}
        result = compress(MODEL, method, out=out, **given).summary
        seconds = time.perf_counter() - started
        assert result.size_after is not None
        return Row(name, result.sparsity, result.size_after / 1e6, perplexity(out, windows), seconds)


def table(rows: list[Row]) -> str:
    lines = ["| | zeros | MB on disk | perplexity | seconds |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        zeros = "" if row.sparsity is None else f"{row.sparsity:.1%}"
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        lines.append(f"| {row.name} | {zeros} | {row.megabytes:.1f} | {row.perplexity:.2f} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=32, help="calibration samples of 1024 tokens")
    parser.add_argument("--windows", type=int, default=60, help="evaluation windows of 1024 tokens")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/")
    arguments = parser.parse_args()
    check_data()
    directory = resolve(MODEL)
    size = open_checkpoint(directory).size() / 1e6
    rows = [Row("original", None, size, perplexity(directory, arguments.windows), None)]
    for name, method in METHODS.items():
        rows.append(measure(name, method, arguments.samples, arguments.windows))
        print(f"{rows[-1].perplexity:10.2f}  {name}", file=sys.stderr, flush=True)
        if arguments.write:  # after every row, so that a run that is stopped leaves what it has
            write(rows, arguments.samples, arguments.windows)
    print(table(rows))


def write(rows: list[Row], samples: int, windows: int) -> None:
    command = f"python benchmarks/sparsity.py --samples {samples} --windows {windows} --write"
    text = f"""# What pruning costs

The built-in model `demo` (12.6 million parameters, of which the blocks' linear layers are pruned), perplexity on WikiText-2
(test split, the first {windows} windows of {SEQ_LEN} tokens), calibrated on {samples} samples of {SEQ_LEN} tokens of English
books. 2:4: two weights stay of every four consecutive inputs. Zeros: the share in the pruned layers, with those
that rounding to 4 bits makes. A pruned model is stored in plain numbers and takes as much disk as the original. Seconds are those
of the whole job, reading and writing included; other jobs ran on the machine.

{table(rows)}

Command: `{command}`. {where()}; {versions("transformers")}.
"""
    write_table("sparsity", text)


if __name__ == "__main__":
    main()
