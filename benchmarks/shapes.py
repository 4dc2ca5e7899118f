"""Shapes as tokens: TripoSG's VAE and G3PT's tokenizer on closed meshes, what comes back of them.

    TERSOR_DATA=... python benchmarks/shapes.py --device cuda --steps 20000        prints the tables
    TERSOR_DATA=... python benchmarks/shapes.py --device cuda --write              and keeps them in benchmarks/results/shapes.md

Both models are small (widths of 128 and 192) and train on the closed meshes of TERSOR_DATA/shapes alone, whose true signed
distance is that of tersor.data.shapes. Told per shape: IoU, the volume that both have over the volume that either has, on a
grid of 40 points a side; chamfer, the mean distance from points of one surface to the other, both ways, in
units of the shape's longest side; closed, whether the mesh out of marching cubes has no open edge. For G3PT the
IoU of each number of scales.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import DATA, write_table
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tersor.models
from tersor.data.shapes import Mesh, ShapeConfig, Shapes, distance, normalised, open_edges, read_mesh, signed_distance
from tersor.data.shapes import surface_points as sampled
from tersor.data.surfaces import distance_grid, surface_of

CLOSED = ("spot", "cow", "fandisk", "homer", "cheburashka")
VAE = {
    "latent_channels": 16,
    "num_attention_heads": 4,
    "width_encoder": 128,
    "width_decoder": 192,
    "num_layers_encoder": 2,
    "num_layers_decoder": 4,
    "num_tokens": 256,
}
TOKENIZER = {
    "num_latents": 128,
    "width": 192,
    "num_heads": 6,
    "num_layers_encoder": 2,
    "num_layers_decoder": 4,
    "scales": (1, 4, 16, 64, 128),
    "bits": 10,
}
SIDE = 40  # grid points for the IoU

Field = Callable[[Tensor], Tensor]


def grid() -> Tensor:
    axis = torch.linspace(-1, 1, SIDE)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).flatten(0, 2)


def iou(a: Tensor, b: Tensor) -> float:
    """Of two fields at the same points, negative inside."""
    return float(((a < 0) & (b < 0)).sum() / ((a < 0) | (b < 0)).sum().clamp(min=1))


def chamfer(a: Mesh, b: Mesh, points: int = 2000) -> float:
    g = torch.Generator().manual_seed(0)
    there, back = distance(b, sampled(a, points, g)[:, :3]), distance(a, sampled(b, points, g)[:, :3])
    longest = float((a.vertices.amax(0) - a.vertices.amin(0)).max())
    return float(there.mean() + back.mean()) / (2 * longest)


def train(model: nn.Module, data: Shapes, steps: int, device: str, batch: int) -> float:
    """Seconds. Adam with a cosine from 3e-4 to 0."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start, done, epoch = time.perf_counter(), 0, 0
    while done < steps:
        data.set_epoch(epoch)
        epoch += 1
        for items in DataLoader(data, batch, shuffle=True, drop_last=True):
            moved = {name: value.to(device) for name, value in items.items()}
            losses = model(moved["points"], moved["query_points"], distances=moved["target"])
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done += 1
            if done % 500 == 0:
                print(f"step {done}: " + ", ".join(f"{name} {value.item():.4f}" for name, value in losses.items()))
            if done == steps:
                break
    model.eval()
    return time.perf_counter() - start


def of_tokens(model: Any, z: Tensor, *, sign: float) -> Field:
    return lambda p: sign * model.distances(z, p[None].to(z))[0, :, 0]


@torch.no_grad()
def whole(field: Field, mesh: Mesh, truth: Tensor) -> tuple[float, float, bool]:
    """IoU, chamfer, closed."""
    values = torch.cat([field(part).float().cpu() for part in torch.split(grid(), 20_000)])
    made = surface_of(distance_grid(field, cells=128))
    return iou(values, truth), chamfer(mesh, made), open_edges(made) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shapes", nargs="+", default=list(CLOSED), choices=CLOSED)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    folder = DATA / "shapes"
    meshes = {name: normalised(read_mesh(folder / f"{name}.obj")) for name in options.shapes}
    truths = {name: signed_distance(mesh, grid()) for name, mesh in meshes.items()}
    data = Shapes(tuple(meshes.values()), ShapeConfig(points=2048, queries=1024, items=64))
    clouds = {
        name: sampled(mesh, 2048, torch.Generator().manual_seed(1))[None].float().to(options.device)
        for name, mesh in meshes.items()
    }
    torch.manual_seed(0)
    how = f"{options.steps:,} steps of {options.batch}, {options.device}"
    lines = ["# Shapes as tokens", "", f"    {command(options)}", ""]

    vae: Any = tersor.models.create("triposg_vae", **VAE)
    took = train(vae, data, options.steps, options.device, options.batch)
    lines += [f"TripoSG's VAE, 256 tokens of 16 numbers: {how}, {took:.0f} s.", ""]
    lines += ["| shape | IoU | chamfer, % of the longest side | closed |", "| --- | --- | --- | --- |"]
    for name, mesh in meshes.items():
        with torch.no_grad():
            field = of_tokens(vae, vae.tokens(vae.encode(clouds[name]).mean), sign=1.0)
        found, apart, closed = whole(field, mesh, truths[name])
        lines.append(f"| {name} | {found:.3f} | {100 * apart:.2f} | {'yes' if closed else 'no'} |")

    tokenizer: Any = tersor.models.create("g3pt_tokenizer", **TOKENIZER)
    took = train(tokenizer, data, options.steps, options.device, options.batch)
    scales = tokenizer.config.scales
    bits = [sum(scales[: k + 1]) * tokenizer.config.bits for k in range(len(scales))]
    lines += ["", f"G3PT's tokenizer, {how}, {took:.0f} s: IoU of the first scales.", ""]
    lines += [
        "| shape | " + " | ".join(f"{sum(scales[: k + 1])} tokens, {bits[k]:,} bits" for k in range(len(scales))) + " |"
    ]
    lines += ["| --- |" + " --- |" * len(scales)]
    for name in meshes:
        row = []
        with torch.no_grad():
            tokens = tokenizer.encode(clouds[name])
            for k in range(1, len(scales) + 1):
                field = of_tokens(tokenizer, tokenizer.tokens(tokenizer.features(tokens, scales=k)), sign=-1.0)
                values = torch.cat([field(part).float().cpu() for part in torch.split(grid(), 20_000)])
                row.append(f"{iou(values, truths[name]):.3f}")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    print("\n".join(lines))
    if options.write:
        write_table("shapes", "\n".join(lines))


def command(options: argparse.Namespace) -> str:
    shapes = "" if options.shapes == list(CLOSED) else f" --shapes {' '.join(options.shapes)}"
    return (
        f"python benchmarks/shapes.py --device {options.device} --steps {options.steps} --batch {options.batch}{shapes}"
    )


if __name__ == "__main__":
    main()
