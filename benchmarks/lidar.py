"""FlatFormer's flattened windows beside windows filled up to one length, and beside a dense map: time and memory.

    OMP_NUM_THREADS=1 python benchmarks/lidar.py      on the CPU
    python benchmarks/lidar.py --device cuda          on a GPU, in bfloat16

Sweeps are made by a simple LiDAR: 64 beams, from 18 degrees below the horizon to 2 above, closer towards the horizon, on a mast
of 1.8 m above flat ground, among 120 boxes of the sizes of cars, lorries, people and walls within 75 m. Each ray ends at the
first thing that it meets, which hides what is behind; noise of 2 cm along the ray and 0.1 degrees up and down. The number of
directions around sets the number of points. Points become pillars of 0.32 m on the grid of the published Waymo model (468 x
468), each with a mean of its points' coordinates, mapped to 128 channels.

All have the same 8 layers of width 128 (FlatFormer's own, with the same weights) on windows of 13 x 13 cells, every second
layer's windows moved by half:

    flat        FlatFormer: pillars sorted window by window, groups of 144
    filled      each window with a pillar is filled up to the longest one's number of pillars, with a mask
    by length   the same in three batches: windows of up to 36, 72 and 169 pillars, as SST does
    dense       all 468 x 468 cells are tokens, in full windows

Told: median of the turns in milliseconds (on the CPU: of its time, one thread), sorting and indices included, pillars made
beforehand; the most memory beyond what was held before (GPU). "filled up": tokens in attention that are no pillar, in per cent.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import gpu, gpu_seconds, machine, write_table
from torch import Tensor
from torch.nn import functional as F

import tersor.models
from tersor.models.points.flatformer import ORDERS, FlatFormer, group_rows, positions

REACH, CELL, SIDE, WINDOW, TURNS = 74.88, 0.32, 468, 13, 7
AROUND = {"50k": 850, "100k": 1700, "200k": 3400}  # directions, so that about as many rays come back


def sweep(directions: int, seed: int = 0) -> Tensor:
    """Points (N, 3) in metres."""
    chance = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([[4.5, 1.9, 1.6], [9.0, 2.6, 3.4], [0.6, 0.6, 1.7], [20.0, 0.4, 4.0]])  # length, width, height
    kind = torch.multinomial(torch.tensor([0.55, 0.1, 0.25, 0.1]), 120, replacement=True, generator=chance)
    away, side = (6 + 66 * torch.rand(120, generator=chance)), 2 * math.pi * torch.rand(120, generator=chance)
    turn = 2 * math.pi * torch.rand(120, generator=chance)
    centre = torch.stack((away * side.cos(), away * side.sin(), sizes[kind, 2] / 2), 1)

    up = 2 - 20 * torch.linspace(0, 1, 64)[:, None] ** 1.5  # (64, directions), degrees
    up = (up + 0.1 * torch.randn(64, directions, generator=chance)).deg2rad()
    around = torch.arange(directions) * (2 * math.pi / directions)
    rays = torch.stack(
        (
            up.cos() * around.cos(),
            up.cos() * around.sin(),
            up.sin(),
        ),
        -1,
    ).flatten(0, 1)  # (rays, 3)
    start = torch.tensor([0.0, 0.0, 1.8])
    ground = torch.where(rays[:, 2] < 0, -start[2] / rays[:, 2], torch.inf)
    nearest = ground
    for at, angle, size in zip(centre, turn, sizes[kind], strict=True):
        cos, sin = angle.cos(), angle.sin()
        turned = torch.stack((torch.stack((cos, sin)), torch.stack((-sin, cos))))  # into the box's axes
        d = torch.cat((rays[:, :2] @ turned.T, rays[:, 2:]), 1)
        o = torch.cat((turned @ (start - at)[:2], (start - at)[2:]))
        first, second = (-size / 2 - o) / d, (size / 2 - o) / d
        enter, leave = torch.minimum(first, second).amax(1), torch.maximum(first, second).amin(1)
        nearest = torch.where((enter < leave) & (enter > 0), torch.minimum(nearest, enter), nearest)
    distance = nearest + 0.02 * torch.randn(len(rays), generator=chance)
    points = start + distance[:, None] * rays
    return points[(nearest < 100) & (points[:, :2].abs() < REACH).all(1)]


def pillars(points: Tensor) -> tuple[Tensor, Tensor]:
    """Features (P, 128) and coords (P, 4): sample 0, z 0, y, x."""
    cell = ((points[:, :2] + REACH) / CELL).long().clamp(max=SIDE - 1)  # x, y
    numbers, place = torch.unique(cell[:, 1] * SIDE + cell[:, 0], return_inverse=True)
    sums = torch.zeros(len(numbers), 4).index_add(0, place, F.pad(points, (0, 1), value=1.0))
    mean = sums[:, :3] / sums[:, 3:]
    y, x = numbers // SIDE, numbers % SIDE
    middle = torch.stack((x, y), 1) * CELL + CELL / 2 - REACH
    found = torch.cat((mean / REACH, (mean[:, :2] - middle) / CELL, sums[:, 3:].log()), 1)
    to = torch.randn(found.shape[1], 128, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros_like(x)
    return found @ to, torch.stack((zero, zero, y, x), 1)


def layers(model: FlatFormer) -> list[tuple[Any, bool]]:
    """With whether its windows are moved."""
    names = ((layer, name) for block in model.block_list for layer, name in zip(block.block, ORDERS, strict=True))
    return [(layer, name.endswith("_shift")) for layer, name in names]


def windows_of(coords: Tensor, *, shifted: bool) -> Tensor:
    move = WINDOW // 2 if shifted else 0
    across = SIDE // WINDOW + 2
    return (coords[:, 2] + move) // WINDOW * across + (coords[:, 3] + move) // WINDOW


def filled(model: FlatFormer, x: Tensor, coords: Tensor, *, limits: tuple[int, ...]) -> tuple[Tensor, float]:
    """Windows of up to each limit's number of pillars run as one batch. Limits go up to WINDOW^2."""
    p = positions(coords, model.config).to(x.dtype)
    plans = [_batches(windows_of(coords, shifted=shifted), limits) for shifted in (False, True)]
    for layer, shifted in layers(model):
        made = torch.empty_like(x)
        for rows, real in plans[shifted]:
            z = layer(x[rows], p[rows], real[:, None, None])
            made[rows[real]] = z[real]
        x = made
    tokens = [sum(rows.numel() for rows, _ in plan) for plan in plans]
    return x, 100 * (1 - 2 * len(x) / sum(tokens))


def _batches(window: Tensor, limits: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Rows (windows, length) and which of them are real."""
    order = window.argsort(stable=True)
    counts = torch.unique_consecutive(window[order], return_counts=True)[1]
    begin = counts.cumsum(0) - counts
    found, least = [], 0
    for limit in limits:
        chosen = (counts > least) & (counts <= limit)
        least = limit
        if not bool(chosen.any()):
            continue
        count, first = counts[chosen], begin[chosen]
        local = torch.arange(int(count.max()), device=window.device)
        real = local < count[:, None]
        found.append((order[first[:, None] + torch.where(real, local, 0)], real))
    return found


def dense(model: FlatFormer, x: Tensor, coords: Tensor) -> tuple[Tensor, float]:
    """Empty cells hold zeros at first; moved windows wrap around at the edges."""
    every = torch.arange(SIDE * SIDE, device=x.device)
    zero = torch.zeros_like(every)
    p = positions(torch.stack((zero, zero, every // SIDE, every % SIDE), 1), model.config).to(x.dtype)
    cells = coords[:, 2] * SIDE + coords[:, 3]
    z = x.new_zeros(SIDE * SIDE, x.shape[1]).index_copy(0, cells, x).view(SIDE, SIDE, -1)
    p = p.view(SIDE, SIDE, -1)
    n, move = SIDE // WINDOW, WINDOW // 2
    for layer, shifted in layers(model):
        by = (move, move) if shifted else (0, 0)
        parts = [
            y.roll(by, (0, 1)).view(n, WINDOW, n, WINDOW, -1).transpose(1, 2).reshape(n * n, WINDOW**2, -1)
            for y in (z, p)
        ]
        y = layer(parts[0], parts[1], None).view(n, n, WINDOW, WINDOW, -1).transpose(1, 2).reshape(SIDE, SIDE, -1)
        z = y.roll((-by[0], -by[1]), (0, 1))
    return z.flatten(0, 1)[cells], 100 * (1 - len(x) / (SIDE * SIDE))


def flat(model: FlatFormer, x: Tensor, coords: Tensor) -> tuple[Tensor, float]:
    return model.encode(x, coords), 100 * (1 - len(x) / _places(coords, model))


def _places(coords: Tensor, model: FlatFormer) -> int:
    return len(group_rows(coords[:, 0], model.config.group_size).rows)


@torch.no_grad()
def measured(run: Callable[[], object], device: str, turns: int) -> tuple[float, float | None]:
    """Milliseconds and MB."""
    on_gpu = device.startswith("cuda")
    times, held = [], 0
    for turn in range(turns + 2):
        if on_gpu and turn == 1:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        started = time.process_time()
        seconds = gpu_seconds(run) if on_gpu else (run(), time.process_time() - started)[1]
        if turn > 1:
            times.append(seconds)
    peak = (torch.cuda.max_memory_allocated() - held) / 1e6 if on_gpu else None
    return 1000 * statistics.median(times), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--sweeps", nargs="+", default=list(AROUND), choices=AROUND)
    asked = parser.parse_args()
    torch.manual_seed(0)
    on_gpu = asked.device.startswith("cuda")
    model: Any = tersor.models.create("flatformer_waymo")
    model = model.to(asked.device, torch.bfloat16 if on_gpu else torch.float32).eval()
    ways: dict[str, Callable[..., tuple[Tensor, float]]] = {
        "flat": flat,
        "filled": partial(filled, limits=(WINDOW**2,)),
        "by length": partial(filled, limits=(36, 72, WINDOW**2)),
        "dense": dense,
    }
    lines = ["| points | pillars | | ms | filled up, % | memory, MB |", "| ---: | ---: | --- | ---: | ---: | ---: |"]
    for name in asked.sweeps:
        points = sweep(AROUND[name])
        x, coords = pillars(points)
        x, coords = x.to(asked.device, next(model.parameters()).dtype), coords.to(asked.device)
        for way, run in ways.items():
            with torch.no_grad():
                found, empty = run(model, x, coords)
            assert found.shape == x.shape, way
            assert bool(found.isfinite().all()), way
            ms, peak = measured(partial(run, model, x, coords), asked.device, asked.turns)
            memory = "" if peak is None else f"{peak:.0f}"
            lines.append(f"| {len(points):,} | {len(x):,} | {way} | {ms:.1f} | {empty:.0f} | {memory} |")
            print(lines[-1], flush=True)
    described = (__doc__ or "").strip()
    where = f"{gpu()}, bfloat16" if on_gpu else f"{machine()}, float32"
    text = [
        "# LiDAR sweeps",
        "",
        described[described.index("Sweeps are") :],
        "",
        *lines,
        "",
        f"{asked.turns} turns. {where}.",
    ]
    text += ["", f"`python benchmarks/lidar.py --device {asked.device} --turns {asked.turns}`", ""]
    write_table("lidar_h200" if on_gpu else "lidar", "\n".join(text))


if __name__ == "__main__":
    main()
