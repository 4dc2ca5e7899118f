"""What awq-scale before rounding is worth: WikiText-2 perplexity of the built-in model.

    TERSOR_DATA=../shared/data python benchmarks/scaling.py            prints the table
    TERSOR_DATA=../shared/data python benchmarks/scaling.py --write    and keeps it in benchmarks/results/scaling.md and .json

Rows are measured as quality.py does it, on fewer samples and windows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common import versions, write_numbers, write_table
from quality import CALIBRATION, MODEL, SEQ_LEN, check_data, perplexity, where

from tersor import RTN
from tersor.checkpoint.source import resolve
from tersor.compress import Method, compress
from tersor.methods.weights.awq_scale import AWQScale


@dataclass(frozen=True)
class Row:
    name: str
    perplexity: float
    seconds: float | None  # of the whole job


def recipes() -> dict[str, Sequence[Method]]:
    """What is compared, by the name of its row: steps that run one after another."""
    found: dict[str, Sequence[Method]] = {}
    for bits in (4, 3):
        found |= {
            f"{bits} bits, g128 sym: rounding": [RTN(bits=bits)],
            f"{bits} bits, g128 sym: awq-scale, rounding": [AWQScale(bits=bits), RTN(bits=bits)],
        }
    return found


def measure(name: str, steps: Sequence[Method], samples: int, windows: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        job = compress(MODEL, list(steps), calibration=CALIBRATION, samples=samples, seq_len=SEQ_LEN, out=out)
        return Row(name, perplexity(out, windows), job.summary.seconds)


def table(rows: Sequence[Row]) -> str:
    lines = ["| | perplexity | seconds |", "| --- | ---: | ---: |"]
    for row in rows:
        lines.append(f"| {row.name} | {row.perplexity:.2f} | {'' if row.seconds is None else f'{row.seconds:.0f}'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=16, help="calibration samples of 1024 tokens")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 1024 tokens")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    check_data()
    rows = [Row("original", perplexity(resolve(MODEL), arguments.windows), None)]
    for name, steps in recipes().items():
        rows.append(measure(name, steps, arguments.samples, arguments.windows))
        print(f"{rows[-1].perplexity:10.2f}  {name}", file=sys.stderr, flush=True)
    print(table(rows))
    if arguments.write:
        _write(rows, arguments.samples, arguments.windows)


def _write(rows: Sequence[Row], samples: int, windows: int) -> None:
    command = f"python benchmarks/scaling.py --samples {samples} --windows {windows} --write"
    text = f"""# What awq-scale before rounding is worth

The built-in model `demo` (bfloat16; it has grouped queries, so values are not scaled into outputs), perplexity on WikiText-2
(test split, the first {windows} windows of {SEQ_LEN} tokens), calibrated on {samples} samples of {SEQ_LEN} tokens of English
books. Seconds are those of the whole job, reading and writing included.

{table(rows)}

Command: `{command}`. {where()}; {versions("transformers")}.
"""
    write_table("scaling", text)
    content = {
        "command": command,
        "machine": where(),
        "versions": versions("transformers"),
        "rows": [asdict(row) for row in rows],
    }
    write_numbers("scaling", content)


if __name__ == "__main__":
    main()
