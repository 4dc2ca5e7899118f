"""What AutoRound makes of the built-in model from the same calibration text, evaluated in the same way: a peer of `ladder.py`.

    pip install auto-round                                             into an environment that has tersor
    TERSOR_DATA=../shared/data python benchmarks/peers.py              prints the table
    ... --write                  and keeps it in benchmarks/results/peers.md and .json, row by row
    ... --bits 3                 measures this number of bits; --write then keeps the others as they were

AutoRound runs with its own defaults (200 steps of signed gradients a block) in groups of 128 with symmetric levels, and writes
the gptq format, which tersor reads. Both see samples of the same length from the same text; each draws them in its own way.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import kept_numbers, versions, write_numbers, write_table
from quality import CALIBRATION, MODEL, SEQ_LEN, check_data, perplexity, where

from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import resolve

GROUP = 128


@dataclass(frozen=True)
class Row:
    bits: int
    peer: str
    perplexity: float
    seconds: float  # of the processor of this process, all threads
    samples: int
    seq_len: int


def auto_round(bits: int, samples: int, seq_len: int, windows: int) -> Row:
    from auto_round import AutoRound  # type: ignore[import-not-found]

    source = resolve(MODEL)
    tokenizer = load_tokenizer(source)
    text = gzip.decompress(CALIBRATION.read_bytes()).decode()
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    drawn = torch.randperm(len(ids) // seq_len, generator=torch.Generator().manual_seed(0))[:samples]
    batches = [{"input_ids": each[None]} for each in ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)[drawn]]
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        tool = AutoRound(
            str(source),
            bits=bits,
            group_size=GROUP,
            sym=True,
            dataset=batches,
            seqlen=seq_len,
            nsamples=len(batches),
            device_map="cpu",
        )
        tool.quantize_and_save(folder, format="auto_gptq")
        seconds = time.process_time() - started
        out = next(Path(folder).rglob("config.json")).parent
        return Row(bits, "AutoRound", perplexity(out, windows), seconds, len(batches), seq_len)


def table(rows: list[Row]) -> str:
    lines = ["| bits | | perplexity | CPU seconds | samples |", "| --- | --- | ---: | ---: | --- |"]
    for row in sorted(rows, key=lambda row: -row.bits):
        drawn = f"{row.samples} x {row.seq_len}"
        lines.append(f"| {row.bits} | {row.peer} | {row.perplexity:.2f} | {row.seconds:.0f} | {drawn} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--samples", type=int, default=512, help="calibration samples")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of these")
    parser.add_argument("--windows", type=int, default=60, help="evaluation windows of 1024 tokens")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    check_data()
    rows = [Row(**each) for each in kept_numbers("peers").get("rows", [])] if arguments.write else []
    for bits in arguments.bits:
        found = auto_round(bits, arguments.samples, arguments.seq_len, arguments.windows)
        print(found, file=sys.stderr, flush=True)
        rows = [*(row for row in rows if row.bits != bits), found]
        if arguments.write:
            write(rows, arguments)
    print(table(rows))


def write(rows: list[Row], arguments: argparse.Namespace) -> None:
    machine = f"{where()}; {versions('transformers')}, auto-round {importlib.metadata.version('auto-round')}"
    text = f"""# A peer on the same text

AutoRound with its own defaults on the built-in model `demo`, in groups of {GROUP} with symmetric levels, from English books;
perplexity on WikiText-2 (test split, the first {arguments.windows} windows of {SEQ_LEN} tokens). `ladder.md` has tersor's rows.

{table(rows)}

Command: `python benchmarks/peers.py --samples {arguments.samples} --seq-len {arguments.seq_len} --write`. {machine}.
"""
    write_table("peers", text)
    write_numbers("peers", {"machine": machine, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
