"""Eight shapes from 1,024 noisy points: Any2Point's adapters on a frozen transformer that has only ever seen photographs.

    python benchmarks/clouds.py --device cuda

The frozen part is demo-vit's (built in; 9 blocks of width 192, learned on CIFAR-10), its table of 8 x 8 positions stretched to
the 37 x 37 of the source "vision". Learned are point tokens (24 channels at first), adapters of width 8, the views' attention
and the head. Beside it: the same with a frozen part of random weights, and with no part frozen.

A cloud is 1,024 points drawn evenly from the surface of one of the eight meshes of TERSOR_DATA/shapes, open ones too, centred,
within the unit sphere, turned about the y axis by any angle, scaled by 0.9 to 1.1; each point is then moved by a normal deviation
in radii of the cloud, of 0 to 0.1 in learning and as the columns say in testing. Per cent that are right, of 64 clouds a shape
that were drawn apart: 12.5 by chance, half the width of the 95 % interval is 2 points at 95 %.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from common import DATA, gpu, learn, machine, write_table
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
import tersor.models
from tersor.data.clouds import centred, read_cloud, scaled_and_turned

SHAPES = ("beetle", "cheburashka", "cow", "fandisk", "homer", "spot", "suzanne", "teapot")
POINTS, BATCH, TESTS = 1024, 64, 64
NOISE, LEARNED_NOISE = (0.02, 0.05, 0.1, 0.2), 0.1
MODEL = {
    "source": "vision",
    "embed_dim": 192,
    "depth": 9,
    "num_heads": 3,
    "num_classes": len(SHAPES),
    "point_channels": 24,
    "patchknn": 32,
    "adapter_dim": 8,
    "coef_3dgird": 0.16,
    "transpose_positions": True,
}


def source() -> dict[str, Tensor]:
    """demo-vit as a checkpoint of the source: layer scales of 1, and a larger table of positions."""
    state = dict(tersor.load("demo-vit").float().state_dict())
    for block in range(MODEL["depth"]):  # type: ignore[call-overload]
        for scale in ("ls1", "ls2"):
            state[f"blocks.{block}.{scale}.gamma"] = torch.ones(192)
    first, table = state["pos_embed"].split([1, 64], 1)
    grid = F.interpolate(table.mT.unflatten(2, (8, 8)), size=(37, 37), mode="bicubic").flatten(2).mT
    return state | {"pos_embed": torch.cat((first, grid), 1)}


def clouds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(8 count, POINTS, 3) without noise, and their shapes."""
    chance = torch.Generator().manual_seed(seed)
    found = []
    for name in SHAPES:
        many = read_cloud(DATA / "shapes" / f"{name}.obj", count * POINTS, seed=seed)
        found += [scaled_and_turned(centred(part), chance) for part in many[torch.randperm(len(many))].split(POINTS)]
    return torch.stack(found), torch.arange(len(SHAPES)).repeat_interleave(count)


def weights(model: nn.Module, *, learned: bool = False, head: bool = True) -> int:
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if (p.requires_grad or not learned) and (head or not name.startswith("head."))
    )


@torch.no_grad()
def right(model: nn.Module, points: Tensor, labels: Tensor, noise: float) -> float:
    chance = torch.Generator().manual_seed(7)
    points = points + noise * torch.randn(points.shape, generator=chance).to(points)
    guessed = torch.cat([model(part).argmax(-1) for part in points.split(64)])
    return 100 * float((guessed == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of learning, at most, over the three models")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--clouds", type=int, default=256, help="a shape, to learn from")
    parser.add_argument("--tests", type=int, default=TESTS)
    asked = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    device = asked.device
    learning, labels = (each.to(device) for each in clouds(asked.clouds, 0))
    testing, wanted = (each.to(device) for each in clouds(asked.tests, 1))
    print("clouds drawn", flush=True)
    lines = ["| frozen part | steps | learned, million | of all, % | without the head, % | "]
    lines[0] += " | ".join(f"noise {noise}" for noise in NOISE) + " |"
    lines += ["| --- |" + " ---: |" * (4 + len(NOISE))]
    for kind in ("photographs", "random", "none"):
        torch.manual_seed(0)
        model: Any = tersor.models.create("any2point", **MODEL)
        if kind != "random":
            model.load_source(source())
        if kind == "none":
            model.requires_grad_(True)
        model.to(device)
        chance = torch.Generator(device).manual_seed(0)

        def loss(model: nn.Module = model, chance: torch.Generator = chance) -> Tensor:
            rows = torch.randint(len(learning), (BATCH,), generator=chance, device=device)
            deviation = LEARNED_NOISE * torch.rand(BATCH, 1, 1, generator=chance, device=device)
            noise = torch.randn(BATCH, POINTS, 3, generator=chance, device=device)
            return F.cross_entropy(model(learning[rows] + deviation * noise), labels[rows])

        steps = learn([model], loss, rate=2e-3, seconds=asked.seconds / 3, steps=asked.steps, told=kind)
        scores = " | ".join(f"{right(model, testing, wanted, noise):.1f}" for noise in NOISE)
        share, bare = (
            100 * weights(model, learned=True, head=head) / weights(model, head=head) for head in (True, False)
        )
        learned = weights(model, learned=True) / 1e6
        lines.append(f"| {kind} | {steps:,} | {learned:.2f} | {share:.1f} | {bare:.1f} | {scores} |")
        print(lines[-1], flush=True)
    sizes = []
    for name in ("language", "vision", "audio"):
        big = tersor.models.create(f"any2point_{name}")
        sizes.append(f"{name} {100 * weights(big, learned=True, head=False) / weights(big):.2f} %")
    where = gpu() if device.startswith("cuda") else machine()
    command = f"`python benchmarks/clouds.py --device {device} --seconds {asked.seconds:.0f}`"
    described = (__doc__ or "").strip()
    text = ["# Eight shapes from noisy points", "", described[described.index("The frozen") :], "", *lines, ""]
    text += [f"Of the published sizes, without the head, learned is of all weights: {', '.join(sizes)}.", ""]
    write_table("clouds", "\n".join([*text, f"Batches of {BATCH}. {where}.", command, ""]))


if __name__ == "__main__":
    main()
