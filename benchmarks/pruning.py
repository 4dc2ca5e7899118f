"""Structural pruning of demo-vit to several latencies, beside two simple ways to choose what goes.

    TERSOR_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/pruning.py
    TERSOR_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/pruning.py --targets 0.9 0.8 --finetune-steps 200

All methods prune until the same latency table (measured at the start) says that the target is reached, and are then
fine-tuned with the same steps, batches, rate and loss on the same 512 training images, mirrored and shifted. NViT also
trains while it prunes; its published latency weight belongs to another scale of the loss (methods/structure/nvit.py).

"uniform, magnitude": the same share of every kind of unit in every block; those of the least sum of squares go. "random":
the same share of every kind, any of them. Accuracy: top-1 on 1,000 CIFAR-10 test images (95 % interval: about +-2 to 3
points), before and after the fine-tuning. Operations: of the matrix products for one image. Speed: times faster than the
original ViT in the same run, CPU time, one image a call, 8 (on which the table is measured)
and 100.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import DATA, command, machine, speed_ratios, write_table
from torch import Tensor

import tersor
from tersor.calibrate.images import image_batches
from tersor.checkpoint.preprocessing import image_settings
from tersor.checkpoint.source import open_checkpoint
from tersor.evaluate.accuracy import accuracy, read_images
from tersor.methods.method import Work
from tersor.methods.structure import nvit_saliency as units
from tersor.methods.structure.nvit import Data, NViTPruning, dense, full_width, train
from tersor.methods.structure.nvit_latency import LatencyTable, measure_table, read_table

PUBLISHED_WEIGHT = "NViT, latency weight 5e-4"
HEADING = (
    "| target | method | embedding, mean heads, qk, v, mlp | params | operations | accuracy %, before | after "
    "| speed, 1 | 8 | 100 |"
)


def same_share(scores: list[Tensor], table: LatencyTable, target: float) -> units.Gates:
    """Gates that keep the best of every list, the same share of each, at the largest share that reaches the target."""

    def at(share: float) -> units.Gates:
        gates = []
        for each in scores:
            gate = torch.zeros(len(each), dtype=torch.bool)
            gate[each.topk(max(1, round(share * len(each)))).indices] = True
            gates.append(gate)
        return gates

    full = units.latency(at(1.0), table)
    return next(gates for n in range(200, 0, -1) if units.latency(gates := at(n / 200), table) <= target * full)


def chosen_scores(model: Any, name: str) -> list[Tensor]:
    if name == "uniform, magnitude":
        return units.unit_sums(model, lambda parameter: parameter.detach().square())
    chance = torch.Generator().manual_seed(0)
    return [torch.rand(len(gate), generator=chance) for gate in units.open_gates(model)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", type=float, default=[0.9, 0.8, 0.7])
    parser.add_argument("--finetune-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    asked = parser.parse_args()

    images = DATA / "images"
    model: Any = tersor.load("demo-vit")
    settings = image_settings(open_checkpoint("demo-vit"))
    work = Work(image_batches(images / "cifar10_train_512.npz", settings, samples=512, seed=0), lambda name: True, say)
    test = read_images("demo-vit", images / "cifar10_test_1000.npz")
    original: Any = full_width(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        measure_table(original.config, torch.device("cpu"), say).save(path)
        rows: list[tuple[list[str], Any]] = [
            (["1.00", "original", *facts(original), "", f"{top1(model, test):.1f}"], model)
        ]
        for target in asked.targets:
            method = NViTPruning(
                latency_target=target,
                latency_table=str(path),
                finetune_steps=asked.finetune_steps,
                batch_size=asked.batch_size,
                lr=asked.lr,
            )
            rows += measure(method, model, work, test)
    tasks: dict[str, Callable[[], object]] = {
        str(n): lambda m=m: [m(test[0][k : k + 1]) for k in range(20)] for n, (_, m) in enumerate(rows)
    }
    one = speed_ratios(tasks, turns=5)
    eight = speed_ratios({str(n): lambda m=m: m(test[0][:8]) for n, (_, m) in enumerate(rows)}, turns=9)
    many = speed_ratios({str(n): lambda m=m: m(test[0][:100]) for n, (_, m) in enumerate(rows)}, turns=3)
    lines = [HEADING, "| ---: | --- | --- |" + " ---: |" * 7]
    lines += [
        f"| {' | '.join(row)} | {one[str(n)]:.2f} | {eight[str(n)]:.2f} | {many[str(n)]:.2f} |"
        for n, (row, _) in enumerate(rows)
    ]
    print("\n".join(lines))
    described = (__doc__ or "").strip()
    text = ["# Structural pruning of demo-vit", "", described[described.index("All methods") :], ""]
    text += [
        f"Fine-tuning: {asked.finetune_steps} steps of {asked.batch_size} images, AdamW, rate {asked.lr} falling to 0. The NViT "
        f"rows prune about {method.prune_per_step} units every {method.prune_interval} batches, trained with the same rate.",
        "",
        *lines,
        "",
        machine(),
        f"`OMP_NUM_THREADS=1 {command()}`",
        "",
    ]
    write_table("pruning", "\n".join(text))


def measure(method: NViTPruning, model: Any, work: Work, test: tuple[Tensor, Tensor]) -> list[tuple[list[str], Any]]:
    rows = []
    for name in ("NViT", PUBLISHED_WEIGHT, "uniform, magnitude", "random"):
        data = Data(work, model, method)
        if name in ("NViT", PUBLISHED_WEIGHT):
            weight = {PUBLISHED_WEIGHT: 5e-4}.get(name, method.latency_weight)
            pruned = replace(method, finetune_steps=0, latency_weight=weight).compress_model(model, work)
        else:
            student = full_width(model)
            gates = same_share(chosen_scores(student, name), read_table(method.latency_table), method.latency_target)
            pruned = dense(student, gates)
        before = top1(pruned, test)
        train(pruned, data, method, work)
        row = [f"{method.latency_target:.2f}", name, *facts(pruned), f"{before:.1f}", f"{top1(pruned, test):.1f}"]
        print(" | ".join(row), flush=True)
        rows.append((row, pruned.eval()))
    return rows


def facts(model: Any) -> list[str]:
    """Widths, parameters and operations."""
    config = model.config
    means = [sum(each) / len(each) for each in (config.heads, config.qk, config.v, config.mlp)]
    return [
        ", ".join([str(config.embed_dim), *(f"{mean:.1f}" for mean in means)]),
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M",
        f"{model.operations() / 1e6:.0f} M",
    ]


def top1(model: Any, test: tuple[Tensor, Tensor]) -> float:
    return accuracy(model, test).top1


def say(what: str, done: int, total: int) -> None:
    if done % 20 == 0:
        print(f"  {what} {done}/{total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
