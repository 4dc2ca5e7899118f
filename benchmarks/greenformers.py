"""Factorize the built-in models without training on: parameters, loss and speed, side by side.

python benchmarks/greenformers.py [text] [images]     # writes benchmarks/results/greenformers.md
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DATA, hardware, kept_numbers, versions, write_numbers, write_table
from torch import nn

import tersor
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import resolve
from tersor.data.text import read_text
from tersor.evaluate.accuracy import read_images
from tersor.methods.structure.greenformers import Greenformers

SEQ_LEN, WINDOWS, IMAGES = 512, 4, 1000
CHOICES: list[dict[str, float]] = [{"rank": 0.75}, {"budget": 0.81}, {"rank": 0.5}]


def seconds(model: nn.Module, inputs: dict[str, Any]) -> float:
    started = time.process_time()
    with torch.no_grad():
        model(**inputs)
    return time.process_time() - started


def speed(original: nn.Module, lower: nn.Module, inputs: dict[str, Any], turns: int = 5) -> float:
    """How many times faster the second is; each turn runs one after the other."""
    for model in (original, lower):
        seconds(model, inputs)
    return statistics.median(seconds(original, inputs) / seconds(lower, inputs) for _ in range(turns))


def rows(name: str, calibration: Any, inputs: dict[str, Any], score: Callable[[nn.Module], float]) -> list[str]:
    original = tersor.load(name)
    made = [f"| original | | 100.0% | {score(original):.1f} | 1.00 |"]
    print(made[-1], flush=True)
    for choice in CHOICES:
        told = ", ".join(f"{key} {value:g}" for key, value in choice.items())
        faster = 0.0
        for whiten in (False, True):
            length = {"seq_len": 256} if calibration is None else {}  # of the built-in text
            given = {"calibration": calibration, "samples": 32, **length} if whiten else {}
            result = tersor.compress(name, Greenformers(**choice, whiten=whiten), **given)
            lower, summary = result.model, result.summary
            share = summary.parameters_after / summary.parameters_before
            faster = faster or speed(original, lower, inputs)  # the shapes are the same, whitened or not
            made.append(f"| {told} | {'yes' if whiten else ''} | {share:.1%} | {score(lower):.1f} | {faster:.2f} |")
            print(made[-1], flush=True)
    return made


def text(data: Path) -> list[str]:
    tokenizer = load_tokenizer(resolve("demo"))
    content = read_text(data / "text" / "wikitext2_test.txt.gz")
    ids = tokenizer(content, return_tensors="pt", verbose=False)["input_ids"][0]

    def perplexity(model: nn.Module) -> float:
        return float(tersor.perplexity(model, ids, seq_len=SEQ_LEN, max_windows=WINDOWS))

    return rows("demo", None, {"input_ids": ids[None, :SEQ_LEN]}, perplexity)


def images(data: Path) -> list[str]:
    pixels, labels = read_images("demo-vit", data / "images" / "cifar10_test_1000.npz", limit=IMAGES)

    def accuracy(model: nn.Module) -> float:
        return float(tersor.accuracy(model, (pixels, labels)))

    return rows("demo-vit", data / "images" / "cifar10_train_512.npz", {"image": pixels[:32]}, accuracy)


PARTS = {
    "text": (
        text,
        "perplexity",
        f"`demo`, language model: perplexity, {WINDOWS} windows of {SEQ_LEN} tokens, WikiText-2 test",
    ),
    "images": (
        images,
        "accuracy",
        f"`demo-vit`, image classifier: accuracy in percent of {IMAGES:,} test images of CIFAR-10",
    ),
}


def table(results: dict[str, Any]) -> str:
    parts = [
        "# Factorizing trained models, without training on\n",
        "`rank`: the same share of the break-even rank in every layer; `budget`: the share of all parameters that is kept, with",
        "ranks chosen over all layers. Whitened: fitted to the layers' outputs for samples, 32 of 256 tokens of the built-in",
        f"text, 32 training images. Speed: processor time of one pass over {SEQ_LEN} tokens, over 32 images, against the",
        "original in turns, median of 5.",
    ]
    for part, (_, score, title) in PARTS.items():
        if part in results:
            head = [f"\n## {title}\n", f"| ranks | whitened | parameters | {score} | times faster |"]
            parts += [*head, "| --- | --- | ---: | ---: | ---: |", *results[part]["rows"], "", results[part]["where"]]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    chosen = parser.parse_args().parts
    for part in chosen:
        made = PARTS[part][0](DATA)
        where = (
            f"`python benchmarks/greenformers.py {part}` on {hardware()}, a machine that others use too; {versions()}."
        )
        results = kept_numbers("greenformers")
        results[part] = {"rows": made, "where": where}
        write_numbers("greenformers", results)
        write_table("greenformers", table(results))


if __name__ == "__main__":
    main()
