"""Train small S4 and S4D models on short ListOps; accuracy beside the two trivial answers.

    nice -n 10 python benchmarks/listops.py                # writes benchmarks/results/listops.md
    python benchmarks/listops.py --steps 500 --longest 32  # a look

Expressions of 5 to `longest` tokens (the published task has 500 to 2000), 10 classes, one pass of new samples.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from common import RESULTS, machine
from torch import Tensor, nn
from torch.nn import functional as F

import tersor.models
from tersor.data.listops import PADDING, VOCABULARY, make_listops

MODELS = {"S4": {"mode": "nplr"}, "S4D-Lin": {"mode": "diag", "init": "diag-lin"}}
SIZE = {"vocab": len(VOCABULARY) + 1, "d_model": 48, "n_layers": 3, "d_state": 16, "norm": "layer", "prenorm": True}

BATCH, TEST = 32, 4000


def train(model: nn.Module, tokens: Tensor, answers: Tensor, *, batch_size: int, lr: float) -> None:
    """One pass: AdamW, a hundred steps of warm-up, a cosine."""
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=lr, weight_decay=0.05))
    steps = len(tokens) // batch_size
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 100)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [100])
    for step in range(steps):
        batch = slice(step * batch_size, (step + 1) * batch_size)
        lengths = (tokens[batch] != PADDING).sum(1)
        x = tokens[batch, : int(lengths.max())]
        loss = F.cross_entropy(model(x, lengths=lengths), answers[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"  step {step + 1}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor, answers: Tensor) -> float:
    right = 0
    for x, answer in zip(tokens.split(256), answers.split(256), strict=True):
        right += int((model(x, lengths=(x != PADDING).sum(1)).argmax(-1) == answer).sum())
    return right / len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--longest", type=int, default=48)
    parser.add_argument("--out", type=Path, default=RESULTS / "listops.md")
    args = parser.parse_args()

    tokens, answers = make_listops(TEST + args.steps * BATCH, min_length=4, max_length=args.longest + 1, seed=0)
    tests, samples = (tokens[:TEST], answers[:TEST]), (tokens[TEST:], answers[TEST:])
    rows = []
    for name, options in MODELS.items():
        torch.manual_seed(0)
        model = tersor.models.create("s4", **SIZE, l_max=args.longest, **options)
        start = time.process_time()
        train(model, *samples, batch_size=BATCH, lr=0.004)
        minutes, parameters = (time.process_time() - start) / 60, sum(p.numel() for p in model.parameters())
        rows.append(f"| {name} | {parameters:,} | {minutes:.1f} | {accuracy(model.eval(), *tests):.1%} |")
        print(rows[-1], flush=True)
    always = (tests[1] == samples[1].mode().values).float().mean().item()
    rows += [f"| the commonest answer | | | {always:.1%} |", "| a guess | | | 10.0% |"]

    args.out.write_text(
        f"# Short ListOps: expressions of 5 to {args.longest} tokens\n\n"
        f"| model | parameters | minutes of processor time | accuracy on {TEST:,} unseen expressions |\n"
        "| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n\n"
        f"`nice -n 10 python benchmarks/listops.py --steps {args.steps} --longest {args.longest}`: "
        f"{args.steps:,} steps of {BATCH} new expressions.\n"
        f"{machine()}; {os.cpu_count()} cores that others use too.\n"
        "Not the published task: that has 500 to 2000 tokens, and models of 6 layers of 256 channels.\n"
    )


if __name__ == "__main__":
    main()
