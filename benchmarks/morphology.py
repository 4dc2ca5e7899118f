"""SET on a body like a hopper: what it learns facing one way, does it know facing any, and with other limbs?

    OMP_NUM_THREADS=1 python benchmarks/morphology.py --processes 6 --write      kept in benchmarks/results/morphology.md
    ... --quick                 a few steps: whether it runs, not what it is worth

The body: a torso that is held, and a chain of thigh, leg and foot at ball joints, moved by torques along the three axes of each
joint (those of the limb before it), pulled by gravity and damped. Ours, and simpler than a physics engine: no ground, so that it
does not hop, and no limb moves its neighbours by its inertia. Task: bring the foot to a place that is 0.6 of the chain's length
ahead, towards the target, and as far down, and hold it, in 40 steps of 0.05 s. Targets are within 20 degrees of the way that the
body faces.

Both actors learn by the gradient of the simulation, 250 steps of AdamW with 16 targets each, on a body that faces x. Distance: of
the foot from its place, mean of the last 10 steps, over the chain's length; 200 targets of a body that faces x, then of bodies
that face anywhere, then the same with a chain of two and of four limbs. SET: 2 layers, 24 vectors and scalars a limb. MLP: all
limbs' states in one row, two hidden layers, as many parameters; it takes no other limbs. Mean and standard deviation of 3 seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from common import machine, refuse_to_keep_quick, write_table
from torch import Tensor, nn

import tersor.models
from tersor.models.control.morphology import limb_places, limb_relation

STEP, STEPS, LAST, SEEDS, UPDATES, TARGETS = 0.05, 40, 10, range(3), 250, 16
STRENGTH, DAMPING, GRAVITY, NEAR = 30.0, 4.0, 9.81, math.radians(20)
MODELS = ("SET", "MLP")


def turned(w: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of the rotation vectors w [..., 3]."""
    zero = torch.zeros_like(w[..., 0])
    x, y, z = w.unbind(-1)
    K = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).unflatten(-1, (3, 3))
    return torch.matrix_exp(K)


class Body:
    """A chain of `limbs` limbs under a held torso; B of them at once, hanging down. yaw, ahead [B]: angles about gravity, of
    the body from x and of the target from the body."""

    def __init__(self, limbs: int, yaw: Tensor, ahead: Tensor) -> None:
        self.limbs, angles = limbs, yaw + ahead
        self.targets = targets = torch.stack((angles.cos(), angles.sin(), torch.zeros_like(angles)), -1)
        B = len(targets)
        self.parents = [-1, *range(limbs)]
        self.tree = {"traversals": limb_places(self.parents), "relation": limb_relation(self.parents)}
        self.R = [turned(yaw[:, None] * torch.tensor([0.0, 0.0, 1.0]))] * (limbs + 1)
        self.w = [torch.zeros(B, 3)] * (limbs + 1)  # angular velocities, in the world
        down = torch.tensor([0.0, 0.0, -1.0])
        self.down = down.expand(B, 3)
        self.place = limbs * (0.6 * targets + 0.6 * down)  # limbs are of length 1

    def ends(self) -> tuple[list[Tensor], list[Tensor]]:
        """Where each limb ends, and how fast."""
        places, speeds = [torch.zeros_like(self.down)], [torch.zeros_like(self.down)]
        for limb in range(1, self.limbs + 1):
            along = -self.R[limb][..., 2]
            places.append(places[-1] + along)
            speeds.append(speeds[-1] + torch.linalg.cross(self.w[limb], along))
        return places, speeds

    def states(self) -> Tensor:
        """[L, B, 41], as SET takes them. Scalars: torso, foot, others; zeros."""
        places, speeds = self.ends()
        rows = []
        for limb in range(self.limbs + 1):
            axes = self.R[max(limb - 1, 0)].mT.flatten(-2)
            kind = torch.zeros(len(self.down), 17)
            kind[:, 0 if limb == 0 else 1 if limb == self.limbs else 2] = 1
            vectors = (
                places[limb] / self.limbs,
                self.down,
                self.targets,
                speeds[limb] / self.limbs,
                self.w[limb],
                axes,
            )
            rows.append(torch.cat((*vectors, kind), -1))
        return torch.stack(rows)

    def step(self, torques: Tensor) -> None:
        """torques [L, B, 3], from -1 to 1 along the axes of each limb's joint; the torso has none."""
        for limb in range(1, self.limbs + 1):
            along = -self.R[limb][..., 2]
            pull = GRAVITY / 2 * torch.linalg.cross(along, self.down)
            push = (self.R[limb - 1] @ torques[limb][..., None])[..., 0] * STRENGTH
            self.w = list(self.w)
            self.w[limb] = self.w[limb] + STEP * (push + pull - DAMPING * self.w[limb])
        self.R = [self.R[0], *(turned(STEP * w) @ R for w, R in zip(self.w[1:], self.R[1:], strict=True))]

    def distance(self) -> Tensor:
        """[B]"""
        return (self.ends()[0][-1] - self.place).norm(dim=-1) / self.limbs


class Rows(nn.Module):
    """An MLP on the states of all limbs."""

    def __init__(self, limbs: int, width: int) -> None:
        super().__init__()
        inputs, outputs = 41 * (limbs + 1), 3 * (limbs + 1)
        self.net = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                 nn.Linear(width, outputs), nn.Tanh())  # fmt: skip

    def act(self, src: Tensor, traversals: Tensor, relation: Tensor) -> Tensor:
        return self.net(src.transpose(0, 1).flatten(1)).unflatten(-1, (-1, 3)).transpose(0, 1)


def actor(name: str) -> Any:
    if name == "MLP":
        return Rows(3, 570)
    return tersor.models.create("sgrl_actor", ninp=24, nhid=48, nlayers=2)


def angles(count: int, most: float) -> Tensor:
    return (2 * torch.rand(count) - 1) * most


def moved(model: Any, limbs: int, yaw: Tensor, ahead: Tensor) -> Tensor:
    """Distances [steps, B]; without a model nothing moves."""
    body, found = Body(limbs, yaw, ahead), []
    for _ in range(STEPS):
        torques = torch.zeros(limbs + 1, len(yaw), 3) if model is None else model.act(body.states(), **body.tree)
        body.step(torques)
        found.append(body.distance())
    return torch.stack(found)


CASES = {"faces x": (3, 0.0), "faces anywhere": (3, math.pi), "two limbs": (2, math.pi), "four limbs": (4, math.pi)}


@torch.no_grad()
def shown(model: Any, case: str) -> float:
    torch.manual_seed(100)
    limbs, most = CASES[case]
    return float(moved(model, limbs, angles(200, most), angles(200, NEAR))[-LAST:].mean())


def run(name: str, seed: int, updates: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    started, model = time.process_time(), actor(name)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        loss = moved(model, 3, torch.zeros(TARGETS), angles(TARGETS, NEAR)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    found: dict[str, Any] = {case: shown(model, case) for case in CASES if name == "SET" or CASES[case][0] == 3}
    size = sum(p.numel() for p in model.parameters())
    return found | {"name": name, "parameters": size, "seconds": time.process_time() - started}


def table(rows: list[dict[str, Any]]) -> str:
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    lines = ["# SET on other directions and bodies", "", about, ""]
    lines += ["| actor | parameters | " + " | ".join(CASES) + " |", "| --- |" + " ---: |" * (1 + len(CASES))]
    lines.append("| none | | " + " | ".join(f"{shown(None, case):.3f}" for case in CASES) + " |")
    for name in MODELS:
        own = [row for row in rows if row["name"] == name]
        if not own:
            continue
        cells = []
        for case in CASES:
            found = [row[case] for row in own if case in row]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            cells.append(f"{statistics.mean(found):.3f} ± {spread:.3f}" if found else "")
        lines.append(f"| {name} | {own[0]['parameters']:,} | {' | '.join(cells)} |")
    minutes = sum(row["seconds"] for row in rows) / 60
    where = f"{minutes:.0f} minutes of one processor core; {machine()}"
    return "\n".join([*lines, "", where, "`OMP_NUM_THREADS=1 python benchmarks/morphology.py --processes 6 --write`"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the table")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    asked = parser.parse_args()
    refuse_to_keep_quick(asked)
    jobs = [(name, seed) for seed in (range(1) if asked.quick else SEEDS) for name in MODELS]
    with ProcessPoolExecutor(asked.processes) as pool:
        waiting = [pool.submit(run, *job, 3 if asked.quick else UPDATES) for job in jobs]
        rows = []
        for finished in as_completed(waiting):
            rows.append(finished.result())
            print(rows[-1], flush=True)
            if asked.write:
                write_table("morphology", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
