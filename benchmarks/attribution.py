"""Does `tersor attribute` find the layers that matter? Its ten layers are given 8 bits, and ten random ones, on demo.

    OMP_NUM_THREADS=1 python benchmarks/attribution.py --write

GPTQ at 3 and at 4 bits, groups of 64, 32 samples of 256 tokens. Layers are attributed on 6 windows of 256 tokens of the built-in
evaluation text; every model is then measured on the 16 windows that follow, which attribution has not seen. "Random": ten of
the 42 layers, five draws. KL: mean divergence of next-token distributions from the original's, nats; ± is half of the 95 %
interval of the difference from the row "none", paired over windows. Size: of the tensor files, beside the row "none". Ten layers
are not equally large, so the last column is the fall of the KL for each percent of size.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import command, machine, write_table
from torch import Tensor

import tersor
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import open_checkpoint, resolve
from tersor.evaluate.attribute import attribute
from tersor.evaluate.interval import half_width
from tersor.evaluate.measures import Meter, text_measure
from tersor.evaluate.perplexity import tokens_of
from tersor.evaluate.suggestion import most_costly

SEQ_LEN, SEEN, UNSEEN = 256, 6, 16
COUNT, MORE, SEEDS = 10, 8, 5
HEADING = "| bits | layers with 8 bits | KL | change | size % | KL % | KL % for each % of size |"


def quantized(bits: int, chosen: Sequence[str], out: Path) -> Path:
    rules = [{"match": name, "bits": MORE} for name in chosen]
    method = tersor.GPTQ(bits=bits, group_size=64)
    tersor.compress("demo", method, rules=rules, samples=32, seq_len=SEQ_LEN, out=out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="*", type=int, default=[3, 4])
    parser.add_argument("--write", action="store_true", help="keep the table in attribution.md")
    asked = parser.parse_args()

    base = tersor.load("demo").eval()
    tokens = tokens_of("builtin", load_tokenizer(resolve("demo")))
    first = SEEN * SEQ_LEN
    seen, unseen = (
        Meter(text_measure(base, part, seq_len=SEQ_LEN, max_windows=None), base)
        for part in (tokens[:first], tokens[first : first + UNSEEN * SEQ_LEN])
    )
    lines = [HEADING, "| ---: | --- |" + " ---: |" * 5]
    for bits in asked.bits:
        with tempfile.TemporaryDirectory() as folder:
            lines += rows_of(bits, Path(folder), base, seen, unseen)
    print("\n".join(lines))
    if asked.write:
        about = (__doc__ or "").split("\n\n", 2)[2].strip()
        text = ["# Attribution on demo: ten layers that it names, and ten random ones", "", about, "", *lines, ""]
        write_table("attribution", "\n".join([*text, machine(), f"`OMP_NUM_THREADS=1 {command()}`", ""]))


def rows_of(bits: int, folder: Path, base: object, seen: Meter, unseen: Meter) -> list[str]:
    plain = quantized(bits, [], folder / "all")
    model = tersor.load(plain).eval()
    found = attribute(model, base, seen, progress=say)  # type: ignore[arg-type]
    total, size = unseen(model), open_checkpoint(plain).size()
    layers = sorted(name for row in found.rows if row.bits is not None for name in row.members)
    best = most_costly(found.rows, frozenset(layers), most=COUNT, bits=MORE)
    draws = {f"random, draw {seed}": random.Random(seed).sample(layers, COUNT) for seed in range(SEEDS)}
    lines = [f"| {bits} | none | {float(total.mean()):.4f} | | | | |"]
    for label, chosen in {"the ten that cost most": best, **draws}.items():
        made = quantized(bits, chosen, folder / label.replace(" ", "-").replace(",", ""))
        lines.append(row(bits, label, total, unseen(tersor.load(made).eval()), open_checkpoint(made).size() / size))
        print(lines[-1], flush=True)
    return lines


def row(bits: int, label: str, total: Tensor, after: Tensor, size: float) -> str:
    change, grown = after - total, 100 * (size - 1)
    fallen = 100 * float(change.mean() / total.mean())
    return (
        f"| {bits} | {label} | {float(after.mean()):.4f} | {float(change.mean()):+.4f} ± {half_width(change):.4f} | {grown:+.1f} "
        f"| {fallen:+.1f} | {fallen / grown:+.2f} |"
    )


def say(what: str, done: int, total: int) -> None:
    print(f"{what} {done}/{total}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
