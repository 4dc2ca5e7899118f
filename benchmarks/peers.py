"""tersor beside the tools that a user would otherwise take: the same model, samples, grid and evaluation.

    TERSOR_DATA=../shared/data python benchmarks/peers.py --write      prints tersor's own rows, and keeps them
    ... --tools auto-round llm-compressor --write                      those of installed tools; others stay as they were
    ... --quick                  few samples and steps: whether it runs, not what it is worth

The built-in model `demo`, weights only, symmetric, in groups of 128, the output head left as it is. All tools calibrate on the
same 128 samples of 512 tokens of English books. Each has its own defaults beside these (AutoRound: 200 iterations, batches of 8),
runs in float32 (tersor: its default) and writes its own files. tersor reads these and evaluates: perplexity on WikiText-2 (test
split, the first 60 windows of 1024 tokens). Seconds are on the clock, with the loading of the model, until the files are there.

AutoRound 0.16.1 and llm-compressor 0.14.0.1 (with compressed-tensors 0.19.0, as it asks for) were installed without their
dependencies into folders of their own. GPTQModel 7.7.0 is missing: it asks for torch 2.14.1, and its pypcre is built from source,
which took more than five minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import gpu, kept_numbers, machine, refuse_to_keep_quick, runs_with_this, write_numbers, write_table
from quality import CALIBRATION, MODEL, check_data, perplexity
from torch import Tensor

import tersor
from tersor.calibrate.batches import make_batches
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import resolve
from tersor.compress import GPTQ, Recipe, compress
from tersor.compress.best import best_steps
from tersor.devices import pick_device

GROUP = 128
BITS = (4, 3, 2)
DEVICE = pick_device("auto")


@dataclass(frozen=True)
class Size:
    samples: int = 128
    seq_len: int = 512
    windows: int = 60
    iterations: int = 200  # of AutoRound, its default


@dataclass(frozen=True)
class Row:
    bits: int
    tool: str
    version: str
    perplexity: float
    seconds: float
    on: str


def ours(name: str) -> Callable[[int, Path, Size], None]:
    def quantize(bits: int, out: Path, size: Size) -> None:
        grid = {"bits": bits, "group_size": GROUP}
        if name == "tersor-gptq":
            steps = [Recipe(GPTQ(**grid, desc_act=True, static_groups=True, weighted=True))]  # as the docs advise
        else:
            steps = best_steps(name.removeprefix("tersor-"), grid, samples=size.samples, seq_len=size.seq_len)
        compress(MODEL, steps, out=out, calibration=CALIBRATION, samples=size.samples, seq_len=size.seq_len, seed=0)

    return quantize


def samples_of(size: Size) -> list[Tensor]:
    """The token ids [1, seq_len] that `ours` calibrates on too."""
    tokenizer = load_tokenizer(resolve(MODEL))
    batches = make_batches(CALIBRATION, tokenizer, samples=size.samples, seq_len=size.seq_len, seed=0)
    return [each["input_ids"] for each in batches]


def in_transformers() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = resolve(MODEL)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(DEVICE)
    return model, AutoTokenizer.from_pretrained(directory)


def auto_round(bits: int, out: Path, size: Size) -> None:
    from auto_round import AutoRound

    model, tokenizer = in_transformers()
    loader = torch.utils.data.DataLoader([{"input_ids": each[0]} for each in samples_of(size)], batch_size=1)
    solver = AutoRound(
        model,
        tokenizer,
        scheme=f"W{bits}A16",
        bits=bits,
        group_size=GROUP,
        sym=True,
        dataset=loader,
        nsamples=size.samples,
        seqlen=size.seq_len,
        iters=size.iterations,
        device_map=str(DEVICE),
    )
    solver.quantize_and_save(str(out), format="auto_gptq")


def llm_compressor(bits: int, out: Path, size: Size, *, awq: bool = False) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=GROUP)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if awq:
        from llmcompressor.modifiers.awq import AWQModifier as Modifier
    else:
        from llmcompressor.modifiers.quantization import GPTQModifier as Modifier
    model, tokenizer = in_transformers()
    rows = [{"input_ids": each[0], "attention_mask": torch.ones_like(each[0])} for each in samples_of(size)]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=torch.utils.data.DataLoader(rows, batch_size=1),
        recipe=Modifier(config_groups=groups, ignore=["lm_head"]),
        num_calibration_samples=size.samples,
        max_seq_length=size.seq_len,
        output_dir=str(out),
    )


def llm_compressor_awq(bits: int, out: Path, size: Size) -> None:
    llm_compressor(bits, out, size, awq=True)


TOOLS: dict[str, tuple[str, Callable[[int, Path, Size], None]]] = {
    **{name: ("tersor", ours(name)) for name in ("tersor-gptq", "tersor-best-fast", "tersor-best")},
    "auto-round": ("auto-round", auto_round),
    "llm-compressor": ("llmcompressor", llm_compressor),
    "llm-compressor-awq": ("llmcompressor", llm_compressor_awq),
}


def measure(tool: str, bits: int, size: Size) -> Row:
    package, quantize = TOOLS[tool]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "made"
        started = time.perf_counter()
        quantize(bits, out, size)
        seconds = time.perf_counter() - started
        on = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
        found = next(out.rglob("config.json"), out / "config.json").parent  # AutoRound makes a folder of its own in it
        version = tersor.__version__ if package == "tersor" else importlib.metadata.version(package)
        return Row(bits, tool, version, perplexity(found, size.windows), seconds, on)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    mine = [name for name in TOOLS if name.startswith("tersor")]
    parser.add_argument("--tools", nargs="*", choices=tuple(TOOLS), default=mine, help="which to measure")
    parser.add_argument("--bits", nargs="*", type=int, choices=BITS, default=list(BITS))
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    check_data()
    refuse_to_keep_quick(arguments)
    size = Size(samples=4, seq_len=64, windows=1, iterations=2) if arguments.quick else Size()
    rows = [Row(**each) for each in kept_numbers("peers").get("rows", [])] if arguments.write else []
    for bits in arguments.bits:
        for tool in arguments.tools:
            row = measure(tool, bits, size)
            print(row, flush=True)
            others = (each for each in rows if (each.bits, each.tool) != (bits, tool))
            rows = sorted([*others, row], key=lambda each: (-each.bits, list(TOOLS).index(each.tool)))
            if arguments.write:
                write(rows)
    print(table(rows))


def table(rows: list[Row]) -> str:
    lines = ["| bits | | version | perplexity | seconds | on |", "| --- | --- | --- | ---: | ---: | --- |"]
    lines += [
        f"| {row.bits} | {row.tool} | {row.version} | {row.perplexity:.2f} | {row.seconds:.0f} | {row.on} |"
        for row in rows
    ]
    return "\n".join(lines)


def write(rows: list[Row]) -> None:
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    where = gpu("transformers") if DEVICE.type == "cuda" else machine()
    runs = runs_with_this("peers", where)
    said = "\n".join(f"- {run}" for run in runs)
    write_table("peers", f"# tersor and its peers on one model\n\n{about}\n\n{table(rows)}\n\n{said}")
    write_numbers("peers", {"runs": runs, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
