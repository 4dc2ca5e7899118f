"""Dense times sparse weights beside low rank of equal size on demo, and how fast their products are.

    TERSOR_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/dense_sparse.py     # writes results/dense_sparse.md

Ratio: how many times smaller each linear map of the blocks is; what is stored counts, places of the sparse numbers too. "Start":
before training. "Trained" (at 2.8, weighted): after 24 steps of 4 samples of 128 tokens of the built-in text, the KL divergence
from the original's predictions, AdamW at 5e-4, the same for both. Weighted: fitted to the layers' outputs for those samples
(for low rank the optimum of SVD-LLM) instead of to the weights. Lost: mean share of the squares of a layer's outputs
(weighted) or weights that the start loses. Perplexity: 8 windows of 512 tokens, WikiText-2 test.

Products: times faster than nn.Linear of the same shape at ratio 2.8, CPU time, median of 7, by number of tokens.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from side_by_side import data_folder, machine, speed_ratios
from torch import Tensor, nn

import tersor
from tersor.calibrate.batches import make_batches
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import resolve
from tersor.data.text import read_text
from tersor.evaluate.perplexity import perplexity
from tersor.layers.linear_map import matrix_shape, weight_matrix
from tersor.methods.method import Work
from tersor.methods.structure.dsformer import DSFormer, StraightThroughFactors, sparsifiable, train
from tersor.methods.structure.factorize import low_rank_layer, svd
from tersor.methods.structure.greenformers import input_hessians

RESULT = Path(__file__).parent / "results" / "dense_sparse.md"
RATIOS, TRAINED = (2.0, 2.8, 3.57), 2.8
SHAPES = ((768, 768), (768, 3072), (3072, 768), (384, 1024), (1024, 384))
TOKENS = (1, 16, 64, 256)


def low_rank(model: Any, ratio: float, work: Work, *, weighted: bool) -> float:
    """Factorize the layers that DSFormer takes, in place; the mean share that is lost."""
    layers, lost = sparsifiable(model, work), []
    hessians = input_hessians(model, layers, work) if weighted else {}
    for name, layer in layers.items():
        rows, columns = matrix_shape(layer)
        W, H = weight_matrix(layer).detach().double(), hessians.get(name)
        rank = int(rows * columns / ratio / (rows + columns))
        factors = svd(W, rank, H)
        error = W - factors.decoder @ factors.encoder
        lost.append(energy(error, H) / energy(W, H))
        model.set_submodule(name, low_rank_layer(layer, rank, factors))
    return sum(lost) / len(lost)


def energy(matrix: Tensor, H: Tensor | None) -> float:
    return float((matrix if H is None else matrix @ H.double()).mul(matrix).sum())


def main() -> None:
    tokenizer = load_tokenizer(resolve("demo"))
    samples = make_batches("builtin", tokenizer, samples=48, seq_len=128, seed=0)
    work = Work(samples, lambda name: True, lambda what, done, total: None)
    text = read_text(data_folder() / "text" / "wikitext2_test.txt.gz")
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    original: Any = tersor.load("demo")

    def score(model: nn.Module) -> str:
        return f"{perplexity(model, ids, seq_len=512, max_windows=8).perplexity:.1f}"

    speeds = [f"| outputs x inputs | {' | '.join(map(str, TOKENS))} |", "| --- |" + " ---: |" * len(TOKENS)]
    for outputs, inputs in SHAPES:
        speeds.append(f"| {outputs} x {inputs} | {' | '.join(products(outputs, inputs))} |")
        print(speeds[-1], flush=True)
    lines = [
        f"Original: {score(original)}.",
        "",
        "| ratio | weights | lost | perplexity, start | trained |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for ratio in RATIOS:
        for weighted in (False, True):
            for kind in ("low rank", "dense x sparse"):
                rates: dict[str, Any] = {"batch_size": 4, "lr": 5e-4, "latent_lr": 5e-4}
                method = DSFormer(ratio=ratio, rounds=3, weighted=weighted, epochs=2, **rates)
                model, after = copy.deepcopy(original), ""
                if kind == "low rank":
                    with torch.no_grad():
                        lost = low_rank(model, ratio, work, weighted=weighted)
                    start = score(model)
                    if weighted and ratio == TRAINED:
                        train(model, original, method, work)
                        after = score(model)
                else:
                    work.reports.clear()
                    start = score(replace(method, epochs=0).compress_model(copy.deepcopy(original), work))
                    lost = sum(report.row()["lost"] for report in work.reports) / len(work.reports)
                    after = score(method.compress_model(model, work)) if weighted and ratio == TRAINED else ""
                row = [f"{ratio:g}", kind + (", weighted" if weighted else ""), f"{lost:.3f}", start, after]
                lines.append(f"| {' | '.join(row)} |")
                print(lines[-1], flush=True)
    described = (__doc__ or "").strip()
    heading = ["# Dense times sparse weights on demo", "", described[described.index("Ratio:") :], ""]
    ending = ["", machine(), "`OMP_NUM_THREADS=1 python benchmarks/dense_sparse.py`", ""]
    RESULT.write_text("\n".join([*heading, *lines, "", *speeds, *ending]))


def products(outputs: int, inputs: int) -> list[str]:
    """How many times faster than nn.Linear, by number of tokens."""
    chance = torch.Generator().manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    p, q, k, s = DSFormer(ratio=2.8).sizes("the layer", outputs, inputs)
    S, D = torch.randn(1, p, k, generator=chance), torch.randn(1, k, q, generator=chance)
    sparse = StraightThroughFactors(layer, S, D, s).exported(layer)
    found = []
    for tokens in TOKENS:
        x = torch.randn(tokens, inputs, generator=chance)
        tasks = {name: lambda m=m, x=x: [m(x) for _ in range(10)] for name, m in (("dense", layer), ("sparse", sparse))}
        found.append(f"{speed_ratios(tasks, turns=7)['sparse']:.2f}")
    return found


if __name__ == "__main__":
    main()
