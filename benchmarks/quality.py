"""What each number of bits costs: WikiText-2 perplexity of the built-in model, rounded and solved by GPTQ.

    TERSOR_DATA=../shared/data python benchmarks/quality.py            prints the table
    TERSOR_DATA=../shared/data python benchmarks/quality.py --write    and keeps it in benchmarks/results/quality.md and .json
    ... --only "4 bits"          measures the rows whose name begins so; --write then keeps the others as they were

Every row quantizes `demo` to a directory, as `tersor quantize` does, and evaluates what is read back from it. The layers are
read as dense ones: the same numbers as the packed ones, in a third of the time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import DATA, kept_numbers, processor, versions, write_numbers, write_table

import tersor
from tersor import GPTQ, RTN
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import open_checkpoint, resolve
from tersor.compress import Method, compress
from tersor.devices import pick_device

MODEL = "demo"
CALIBRATION, EVALUATION = DATA / "text" / "calibration.txt.gz", DATA / "text" / "wikitext2_test.txt.gz"
SEQ_LEN = 1024


@dataclass(frozen=True)
class Row:
    name: str
    bits_per_weight: float  # over the quantized layers, scales and zero points included
    megabytes: float  # of all tensors on disk
    perplexity: float
    seconds: float | None  # to quantize


def methods() -> dict[str, Method]:
    """What is compared, by the name of its row."""
    found: dict[str, Method] = {}
    for bits in (4, 3, 2, 8):
        ordered = {"desc_act": True, "static_groups": True}
        found |= {
            f"{bits} bits, g128 sym: rounding": RTN(bits=bits),
            f"{bits} bits, g128 sym: GPTQ": GPTQ(bits=bits),
            f"{bits} bits, g128 sym: GPTQ, desc_act, static_groups": GPTQ(bits=bits, **ordered),
            f"{bits} bits, per channel asym: rounding": RTN(bits=bits, group_size=-1, sym=False),
            f"{bits} bits, per channel asym: GPTQ": GPTQ(bits=bits, group_size=-1, sym=False),
        }
        if bits < 8:
            found[f"{bits} bits, g128 sym: rounding, mse"] = RTN(bits=bits, mse=True)
            found[f"{bits} bits, g128 sym: GPTQ, desc_act, static_groups, mse"] = GPTQ(bits=bits, mse=True, **ordered)
            found[f"{bits} bits, g128 sym: GPTQ, desc_act, static_groups, weighted"] = GPTQ(
                bits=bits, weighted=True, **ordered
            )
            found[f"{bits} bits, g128 sym: GPTQ, desc_act, static_groups, weighted, 2 refits"] = GPTQ(
                bits=bits, weighted=True, refits=2, **ordered
            )
    found |= {
        "ternary, g128 sym: rounding": RTN(bits="ternary"),
        "ternary, g128 sym: GPTQ": GPTQ(bits="ternary"),
        "ternary, g128 sym: GPTQ, desc_act, static_groups": GPTQ(bits="ternary", desc_act=True, static_groups=True),
        "ternary, g128 sym: GPTQ, desc_act, static_groups, mse": GPTQ(
            bits="ternary", desc_act=True, static_groups=True, mse=True
        ),
        "ternary, g128 sym: GPTQ, desc_act, static_groups, weighted": GPTQ(
            bits="ternary", desc_act=True, static_groups=True, weighted=True
        ),
        "ternary, g128 sym: GPTQ, desc_act, static_groups, weighted, 2 refits": GPTQ(
            bits="ternary", desc_act=True, static_groups=True, weighted=True, refits=2
        ),
    }
    return found


def perplexity(directory: Path, windows: int) -> float:
    place = pick_device("auto")
    dense = LazyModel(open_checkpoint(directory), dtype=torch.float32, device=place).load_all().to(place)
    tokenizer = load_tokenizer(directory)
    found = tersor.perplexity(dense, EVALUATION, tokenizer=tokenizer, seq_len=SEQ_LEN, max_windows=windows)
    return found.perplexity


def original(windows: int) -> Row:
    directory = resolve(MODEL)
    return Row("original", 16, open_checkpoint(directory).size() / 1e6, perplexity(directory, windows), None)


def measure(name: str, method: Method, samples: int, windows: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        result = compress(MODEL, method, calibration=CALIBRATION, samples=samples, seq_len=SEQ_LEN, out=out).summary
        assert result.size_after is not None
        return Row(name, result.bits_per_weight, result.size_after / 1e6, perplexity(out, windows), result.seconds)


def table(rows: list[Row]) -> str:
    lines = ["| | bits a weight | MB on disk | perplexity | seconds |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        lines.append(
            f"| {row.name} | {row.bits_per_weight:.3f} | {row.megabytes:.1f} | {row.perplexity:.2f} | {seconds} |"
        )
    return "\n".join(lines)


def check_data() -> None:
    for path in (CALIBRATION, EVALUATION):
        if not path.is_file():
            sys.exit(f"no {path}: set TERSOR_DATA to the folder that holds text/{path.name}")


def where() -> str:
    gpu = f"; quantized on an {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}, {os.cpu_count()} cores{gpu}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=64, help="calibration samples of 1024 tokens")
    parser.add_argument("--windows", type=int, default=60, help="evaluation windows of 1024 tokens")
    parser.add_argument("--only", default="", help="rows whose name begins so")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    check_data()

    results = {row.name: row for row in _kept()} if arguments.only else {}
    names = ["original", *methods()]
    for name in names:
        if name.startswith(arguments.only):
            if name == "original":
                results[name] = original(arguments.windows)
            else:
                results[name] = measure(name, methods()[name], arguments.samples, arguments.windows)
            print(f"{results[name].perplexity:10.2f}  {name}", file=sys.stderr, flush=True)
            rows = [results[name] for name in names if name in results]
            if arguments.write:
                _write(rows, arguments.samples, arguments.windows)
    print(table(rows))


def _kept() -> list[Row]:
    return [Row(**row) for row in kept_numbers("quality").get("rows", [])]


def _write(rows: list[Row], samples: int, windows: int) -> None:
    """After every row, so that a run that is stopped leaves what it has."""
    command = f"python benchmarks/quality.py --samples {samples} --windows {windows} --write"
    text = f"""# What each number of bits costs

The built-in model `demo` (12.6 million parameters, of which the blocks' linear layers are quantized), perplexity on
WikiText-2 (test split, the first {windows} windows of {SEQ_LEN} tokens), calibrated on {samples} samples of {SEQ_LEN} tokens of
English books. Seconds are those of the whole job, reading and writing included. Ternary levels are stored in 2 bits.

{table(rows)}

Command: `{command}`. {where()}; {versions("transformers")}.
"""
    write_table("quality", text)
    content = {
        "command": command,
        "machine": where(),
        "versions": versions("transformers"),
        "rows": [asdict(row) for row in rows],
    }
    write_numbers("quality", content)


if __name__ == "__main__":
    main()
