"""What each rung above GPTQ keeps, in the same files: WikiText-2 perplexity of the built-in model, rung by rung.

    TERSOR_DATA=../shared/data python benchmarks/ladder.py             prints the table
    TERSOR_DATA=../shared/data python benchmarks/ladder.py --write     and keeps it in benchmarks/results/ladder.md and .json
    ... --only 2 3               measures these numbers of bits; --write then keeps the others as they were
    ... --quick                  few samples and windows, 3 bits: whether it runs, not what it is worth

Every rung starts from the file that the rung before it left, as `tersor compress METHOD PACKED --original demo` does; seconds are
those of all rungs up to it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import kept_numbers, versions, write_numbers, write_table
from quality import CALIBRATION, MODEL, SEQ_LEN, by_bits, perplexity, where

from tersor.checkpoint.source import resolve
from tersor.compress import GPTQ, Method, compress
from tersor.formats.grid import Bits
from tersor.methods.training.rounding import Rounding
from tersor.methods.training.scales import Scales

BITS: tuple[Bits | float, ...] = (4, 3.25, 3, 2, "ternary")  # 3.25: all told, bits where they pay


@dataclass(frozen=True)
class Row:
    bits: str
    rung: str
    bits_per_weight: float  # over the quantized layers, scales and zero points included
    perplexity: float
    seconds: float  # of this rung and those that it stands on


def rungs(bits: Bits | float) -> list[tuple[str, str, Method]]:
    """What is measured: a name, the name of the rung that it stands on ("": the original), and the method."""
    base = "GPTQ, desc_act, static_groups, weighted"
    whole: Bits = 3 if isinstance(bits, float) else bits  # of a mixture only where it is asked for nothing else
    return [
        (base, "", GPTQ(bits=whole, desc_act=True, static_groups=True, weighted=True)),
        (f"{base}, then scales", base, Scales()),
        (f"{base}, then rounding", base, Rounding()),
        (f"{base}, then rounding, scales with integers", f"{base}, then rounding", Scales(integers=True)),
    ]


def climb(bits: Bits | float, samples: int, seq_len: int, windows: int, folder: Path) -> Iterator[Row]:
    """The rows of one number of bits, as they are measured."""
    rows: dict[str, Row] = {}
    for n, (name, below, method) in enumerate(rungs(bits)):
        out = folder / f"{bits}-{n}"
        asked: dict[str, Any] = {"calibration": CALIBRATION, "samples": samples, "seq_len": seq_len, "out": out}
        if below:
            at = folder / f"{bits}-{[rung for rung, *_ in rungs(bits)].index(below)}"
            done = compress(at, method, original=MODEL, **asked)
        elif isinstance(bits, float):
            done = compress(MODEL, method, target_bits=bits, **asked)
        else:
            done = compress(MODEL, method, **asked)
        seconds = done.summary.seconds + (rows[below].seconds if below else 0)
        found = perplexity(out, windows)
        rows[name] = Row(str(bits), name, done.summary.bits_per_weight, found, seconds)
        print(f"{found:10.2f}  {seconds:6.0f} s  {bits}: {name}", file=sys.stderr, flush=True)
        yield rows[name]


def table(rows: list[Row]) -> str:
    lines = ["| bits | | bits a weight | perplexity | seconds |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row.bits} | {row.rung} | {row.bits_per_weight:.3f} | {row.perplexity:.2f} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = by_bits(__doc__, quick_samples=8, quick_windows=2)
    chosen = [bits for bits in BITS if not arguments.only or str(bits) in arguments.only]
    rows = [row for row in kept() if row.bits not in map(str, chosen)] if arguments.write else []
    original = perplexity(resolve(MODEL), arguments.windows)
    for bits in chosen:
        with tempfile.TemporaryDirectory() as folder:
            for row in climb(bits, arguments.samples, arguments.seq_len, arguments.windows, Path(folder)):
                rows = sorted([*rows, row], key=lambda row: list(map(str, BITS)).index(row.bits))
                if arguments.write:  # after every row, so that a run that is stopped leaves what it has
                    write(rows, original, arguments)
    print(f"original: {original:.2f}\n\n{table(rows)}")


def kept() -> list[Row]:
    return [Row(**row) for row in kept_numbers("ladder").get("rows", [])]


def write(rows: list[Row], original: float, arguments: argparse.Namespace) -> None:
    options = f"--samples {arguments.samples} --seq-len {arguments.seq_len} --windows {arguments.windows}"
    options += f" --only {' '.join(arguments.only)}" if arguments.only else ""
    command = f"python benchmarks/ladder.py {options} --write"
    evaluated = f"the first {arguments.windows} windows of {SEQ_LEN} tokens"
    learned = f"{arguments.samples} samples of {arguments.seq_len} tokens"
    text = f"""# What each rung above GPTQ keeps

The built-in model `demo` (12.6 million parameters) in groups of 128 with symmetric levels, perplexity on WikiText-2 (test split,
{evaluated}); the original has {original:.2f}. All rungs calibrate on {learned} of English
books; one draw. `quality.md` has plain rounding and plain GPTQ. Seconds are those of all rungs up to a
row, on one thread beside other work. All rows of one number of bits are files of the same format and size.

{table(rows)}

Command: `{command}`. {where()}; {versions("transformers")}.
"""
    write_table("ladder", text)
    content = {"command": command, "machine": where(), "versions": versions("transformers"), "original": original}
    content["rows"] = [asdict(row) for row in rows]  # type: ignore[assignment]
    write_numbers("ladder", content)


if __name__ == "__main__":
    main()
