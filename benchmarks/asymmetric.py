"""What asymmetric calibration is worth: WikiText-2 perplexity of the built-in model by the share of the correction.

    TERSOR_DATA=../shared/data python benchmarks/asymmetric.py             prints the table
    ... --write                  keeps it in benchmarks/results/asymmetric.md and .json
    ... --only 3 2               measures these numbers of bits
    ... --quick                  few samples and windows, 3 bits: whether it runs, not what it is worth

Everything else is as in the first rung of `ladder.py`. With --write every row is kept at once, and a row that is kept is not
measured again: a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from common import kept_numbers, versions, write_numbers, write_table
from quality import CALIBRATION, MODEL, SEQ_LEN, by_bits, perplexity, where

from tersor.compress import GPTQ, compress
from tersor.formats.grid import Bits

BITS: tuple[Bits, ...] = (3, 2, 4, "ternary")
GROUPS = (128, -1)
SHARES = (0.0, 0.5, 1.0, 0.25)


@dataclass(frozen=True)
class Row:
    bits: str
    group_size: int
    share: float
    perplexity: float
    seconds: float  # to quantize


def measure(bits: Bits, group_size: int, share: float, arguments: argparse.Namespace) -> Row:
    method = GPTQ(bits=bits, group_size=group_size, desc_act=True, static_groups=True, weighted=True, asymmetric=share)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        done = compress(
            MODEL, method, calibration=CALIBRATION, samples=arguments.samples, seq_len=arguments.seq_len, out=out
        )
        return Row(str(bits), group_size, share, perplexity(out, arguments.windows), done.summary.seconds)


def table(rows: list[Row]) -> str:
    shares = sorted(SHARES)
    lines = [f"| bits | group | {' | '.join(f'{share:g}' for share in shares)} |", "| --- " * 2 + "| ---: " * 4 + "|"]
    found = {(row.bits, row.group_size, row.share): f"{row.perplexity:.2f}" for row in rows}
    for bits, group in dict.fromkeys((row.bits, row.group_size) for row in rows):
        cells = " | ".join(found.get((bits, group, share), "") for share in shares)
        lines.append(f"| {bits} | {'row' if group == -1 else group} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    arguments = by_bits(__doc__, quick_samples=4, quick_windows=1)
    rows = kept(arguments) if arguments.write else []
    known = {(row.bits, row.group_size, row.share) for row in rows}
    for group in GROUPS:
        for bits in BITS:
            if arguments.only and str(bits) not in arguments.only:
                continue
            for share in (each for each in SHARES if (str(bits), group, each) not in known):
                rows.append(measure(bits, group, share, arguments))
                print(rows[-1], file=sys.stderr, flush=True)
                if arguments.write:
                    write(rows, arguments)
    print(table(rows))


def kept(arguments: argparse.Namespace) -> list[Row]:
    """The rows of an earlier run with the same settings."""
    found = kept_numbers("asymmetric")
    return [Row(**row) for row in found["rows"]] if found.get("settings") == settings(arguments) else []


def settings(arguments: argparse.Namespace) -> str:
    return f"--samples {arguments.samples} --seq-len {arguments.seq_len} --windows {arguments.windows}"


def write(rows: list[Row], arguments: argparse.Namespace) -> None:
    command = f"python benchmarks/asymmetric.py {settings(arguments)} --write"
    text = f"""# What asymmetric calibration is worth

The built-in model `demo` with symmetric levels, GPTQ with act-order, static groups and ranges by the Hessian: perplexity on
WikiText-2 (test split, the first {arguments.windows} windows of {SEQ_LEN} tokens) by `--asymmetric`, the share of the correction.
Calibrated on {arguments.samples} samples of {arguments.seq_len} tokens of English books; one draw.

{table(rows)}

Command: `{command}`. {where()}; {versions("transformers")}.
"""
    write_table("asymmetric", text)
    content = {"settings": settings(arguments), "machine": where(), "versions": versions("transformers")}
    write_numbers("asymmetric", {**content, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
