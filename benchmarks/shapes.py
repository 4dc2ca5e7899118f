"""Closed meshes as tokens, and out of them: TripoSG's VAE and flow, G3PT's tokenizer and generator.

    python benchmarks/shapes.py --model triposg --device cuda --out shapes     learns, measures, keeps rows and meshes
    python benchmarks/shapes.py --model g3pt --device cuda --out shapes
    python benchmarks/shapes.py --out shapes                                   makes the table of both

The models are small (widths of 128 to 256) and learn the closed meshes of TERSOR_DATA/shapes alone: five of its eight; the
other three have open edges, so no inside. The signed distance is the true one, by the winding number. Told per shape: IoU, the
volume that both have over the volume that either has, on a grid of 40 points a side; chamfer, the mean distance from points of
one surface to the other, both ways, in per cent of the shape's longest side; closed, whether the mesh out of marching cubes (96
cells a side) has no open edge. The clouds that are measured were not learned from, their shapes were.

TripoSG: the VAE makes 256 tokens of 16 numbers of a cloud of 2,048 points; the loss of its normals is weighed 0.1 instead of 10,
which had the best worst IoU of three weights on these shapes. The flow learns the five shapes' tokens, told which by a one-hot
context, and makes them out of noise in 50 steps. G3PT: the tokenizer's tokens in scales of 1 to 128, IoU of the
first scales; then the generator learns the tokens of the five, told which by a label, and writes them scale by scale (the
likeliest tokens), IoU of what it writes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DATA, gpu, learn, machine, write_table
from torch import Tensor

import tersor.models
from tersor.data.shapes import (
    Mesh,
    distance,
    normalised,
    open_edges,
    read_mesh,
    signed_distance,
    surface_points,
    winding_number,
)
from tersor.data.surfaces import distance_grid, surface_of, write_mesh
from tersor.errors import TersorError
from tersor.models.points.triposg_vae import POOL, farthest_points
from tersor.train.rectified_flow import FlowConfig, RectifiedFlow

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
FLOW = {"width": 256, "num_attention_heads": 4, "in_channels": 16, "num_layers": 7, "cross_attention_dim": len(CLOSED)}
WRITER = {"width": 192, "depth": 4, "num_heads": 4, "num_classes": len(CLOSED)}
SIDE = 40  # grid points for the IoU
POINTS, QUERIES, CLOUDS, SPACE, NEAR = 2048, 1024, 24, 40_000, 0.05
BATCH, CELLS = 20, 96
NORMAL = 0.1  # weight of the normals' loss

Field = Callable[[Tensor], Tensor]


def grid() -> Tensor:
    axis = torch.linspace(-1, 1, SIDE)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).flatten(0, 2)


def iou(a: Tensor, b: Tensor) -> float:
    """Of what is inside."""
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


def chamfer(a: Mesh, b: Mesh, points: int = 2000) -> float:
    g = torch.Generator().manual_seed(0)
    there, back = (surface_points(on_cpu(mesh), points, g)[:, :3].to(a.vertices) for mesh in (a, b))
    longest = float((a.vertices.amax(0) - a.vertices.amin(0)).max())
    return float(distance(b, there).mean() + distance(a, back).mean()) / (2 * longest)


def on_cpu(mesh: Mesh) -> Mesh:
    return moved(mesh, "cpu")


def moved(mesh: Mesh, device: str) -> Mesh:
    return Mesh(mesh.vertices.to(device), mesh.faces.to(device))


class Pool:
    """What is learned from, on the device: clouds with normals, which of their points become tokens, and distances in space."""

    def __init__(self, meshes: list[Mesh], device: str, clouds: int, space: int) -> None:
        chance = torch.Generator().manual_seed(0)
        drawn, queries, distances = [], [], []
        for mesh in meshes:
            drawn.append(torch.stack([surface_points(on_cpu(mesh), POINTS, chance) for _ in range(clouds)]))
            near = surface_points(on_cpu(mesh), space // 2, chance)[:, :3]
            near = near + NEAR * torch.randn(near.shape, dtype=near.dtype, generator=chance)
            anywhere = 2 * torch.rand(space // 2, 3, dtype=torch.float64, generator=chance) - 1
            queries.append(torch.cat((near, anywhere)).to(device))
            distances.append(signed_distance(mesh, queries[-1]))
        self.clouds = torch.stack(drawn).float().to(device)  # (shapes, clouds, POINTS, 6)
        self.rows = farthest_rows(self.clouds.flatten(0, 1)).unflatten(0, self.clouds.shape[:2])
        self.queries, self.distances = torch.stack(queries).float(), torch.stack(distances).float()

    def draw(self, count: int) -> dict[str, Tensor]:
        def drawn(most: int, *shape: int) -> Tensor:
            return torch.randint(most, shape, device=self.clouds.device)

        shape, cloud = drawn(len(self.clouds), count), drawn(self.clouds.shape[1], count)
        at = drawn(self.queries.shape[1], count, QUERIES)
        return {
            "points": self.clouds[shape, cloud],
            "rows": self.rows[shape, cloud],
            "query_points": self.queries[shape[:, None], at],
            "distances": self.distances[shape[:, None], at],
        }


def farthest_rows(clouds: Tensor) -> Tensor:
    """(B, tokens): as the VAE chooses them in training. Points of a cloud come in random order, so the first are a draw."""
    return farthest_points(clouds[:, : POOL * VAE["num_tokens"], :3], VAE["num_tokens"])


def of_tokens(model: Any, z: Tensor, *, sign: float) -> Field:
    return lambda p: sign * model.distances(z, p[None].to(z))[0, :, 0]


@torch.no_grad()
def inside_of(field: Field) -> Tensor:
    return torch.cat([field(part).float().cpu() for part in torch.split(grid(), 20_000)]) < 0


@torch.no_grad()
def whole(field: Field, mesh: Mesh, truth: Tensor, file: Path) -> dict[str, Any]:
    found = iou(inside_of(field), truth)
    try:
        made = surface_of(distance_grid(field, cells=CELLS))
    except TersorError as error:  # nothing is inside
        print(f"{file.stem}: {error}")
        return {"IoU": found, "chamfer, %": math.nan, "closed": False}
    write_mesh(made, file)
    apart = chamfer(mesh, moved(made, str(mesh.vertices.device)))
    return {"IoU": found, "chamfer, %": 100 * apart, "closed": open_edges(made) == 0}


def triposg(meshes: dict[str, Mesh], truths: dict[str, Tensor], asked: argparse.Namespace) -> list[dict[str, Any]]:
    device, out = asked.device, asked.out
    pool = Pool(list(meshes.values()), device, asked.clouds, asked.space)
    print("pool drawn", flush=True)
    vae: Any = tersor.models.create("triposg_vae", **VAE).to(device)
    steps = learn(
        [vae],
        lambda: vae.losses(**pool.draw(BATCH), normal_weight=asked.normal)["loss"],
        rate=5e-4,
        seconds=asked.seconds * 0.7,
        steps=asked.steps,
        told="VAE",
        record=True,
    )
    clouds = {
        name: surface_points(on_cpu(mesh), POINTS, torch.Generator().manual_seed(9))[None].float().to(device)
        for name, mesh in meshes.items()
    }
    rows = []
    with torch.no_grad():
        means = {name: vae.encode(cloud).mean for name, cloud in clouds.items()}
    for name, mesh in meshes.items():
        field = of_tokens(vae, vae.tokens(means[name]), sign=1.0)
        rows.append(
            {"of": "VAE", "shape": name, "steps": steps} | whole(field, mesh, truths[name], out / f"vae-{name}.glb")
        )
        print("ROW", json.dumps(rows[-1]), flush=True)

    latents, which = torch.cat(list(means.values())), torch.eye(len(means), len(CLOSED), device=device)[:, None]
    flow: Any = tersor.models.create("triposg", **FLOW).to(device)
    rectified = RectifiedFlow(FlowConfig())

    def velocity(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found: Tensor = flow(x, t, context)
        return found.float()

    def loss() -> Tensor:
        shape = torch.arange(6 * len(latents), device=device) % len(latents)
        s = torch.randn(len(shape), device=device).sigmoid()  # as the flow draws them, but on the device
        return rectified.loss(velocity, latents[shape], which[shape], sigma=s)

    steps = learn([flow], loss, rate=5e-4, seconds=asked.seconds * 0.3, steps=asked.steps, told="flow", record=True)
    chance = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=chance).to(device)
    made = rectified.sample(velocity, noise, which, steps=50)
    for index, (name, mesh) in enumerate(meshes.items()):
        field = of_tokens(vae, vae.tokens(made[index : index + 1]).detach(), sign=1.0)
        off = float((made[index] - latents[index]).square().mean().sqrt() / latents.std())
        row = {"of": "flow", "shape": name, "steps": steps, "latents off": off}
        rows.append(row | whole(field, mesh, truths[name], out / f"flow-{name}.glb"))
        print("ROW", json.dumps(rows[-1]), flush=True)
    return rows


def g3pt(meshes: dict[str, Mesh], truths: dict[str, Tensor], asked: argparse.Namespace) -> list[dict[str, Any]]:
    device = asked.device
    pool = Pool(list(meshes.values()), device, asked.clouds, asked.space)
    print("pool drawn", flush=True)
    tokenizer: Any = tersor.models.create("g3pt_tokenizer", **TOKENIZER).to(device)

    def loss() -> Tensor:
        batch = pool.draw(BATCH)
        found: Tensor = tokenizer.losses(batch["points"], batch["query_points"], batch["distances"])["loss"]
        return found

    steps = learn([tokenizer], loss, rate=5e-4, seconds=asked.seconds * 0.75, steps=asked.steps, told="tokenizer")
    clouds = torch.cat(
        [
            surface_points(on_cpu(mesh), POINTS, torch.Generator().manual_seed(9))[None].float().to(device)
            for mesh in meshes.values()
        ]
    )
    with torch.no_grad():
        tokens = tokenizer.encode(clouds)
    rows = levels(tokenizer, tokens, meshes, truths, asked.out, {"of": "tokenizer", "steps": steps})

    tokenizer.requires_grad_(False)
    writer: Any = tersor.models.create(
        "g3pt",
        **WRITER,
        scales=TOKENIZER["scales"],
        bits=TOKENIZER["bits"],
        num_latents=TOKENIZER["num_latents"],
        latent_width=TOKENIZER["width"],
        latent_heads=TOKENIZER["num_heads"],
    ).to(device)
    writer.take_quantizer(tokenizer)
    label = torch.arange(len(tokens), device=device)
    steps = learn(
        [writer],
        lambda: writer.loss(tokens.repeat(4, 1), label.repeat(4)),
        rate=5e-4,
        seconds=asked.seconds * 0.25,
        steps=asked.steps,
        told="writer",
    )
    written = writer.generate(label, temperature=0)
    same = (written == tokens).float().mean(1).tolist()
    told: dict[str, Any] = {"of": "writer", "steps": steps}
    found = levels(tokenizer, written, meshes, truths, asked.out, told)
    return rows + [row | {"tokens right": right} for row, right in zip(found, same, strict=True)]


@torch.no_grad()
def levels(
    tokenizer: Any, tokens: Tensor, meshes: dict[str, Mesh], truths: dict[str, Tensor], out: Path, told: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for index, (name, mesh) in enumerate(meshes.items()):
        row = told | {"shape": name}
        field: Field = torch.Tensor.sum
        for k, scale in enumerate(tokenizer.config.scales, 1):
            z = tokenizer.tokens(tokenizer.features(tokens[index : index + 1], scales=k))
            field = of_tokens(tokenizer, z, sign=-1.0)
            row[f"IoU to {scale}"] = iou(inside_of(field), truths[name])
        found = whole(field, mesh, truths[name], out / f"{told['of']}-{name}.glb")
        rows.append(row | {column: found[column] for column in ("chamfer, %", "closed")})
        print("ROW", json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    columns = [name for name in rows[0] if name not in ("of", "steps")]
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for row in rows:
        lines.append("| " + " | ".join(_shown(row[name]) for name in columns) + " |")
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


TITLES = {
    "VAE": "TripoSG's VAE: a cloud to tokens and back",
    "flow": "TripoSG's flow: out of noise, told which shape",
    "tokenizer": "G3PT's tokenizer: IoU of the first scales",
    "writer": "G3PT: written scale by scale, told which shape",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=("triposg", "g3pt"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of learning, at most, over both parts")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--normal", type=float, default=NORMAL, help="weight of the normals' loss in TripoSG's VAE")
    parser.add_argument("--clouds", type=int, default=CLOUDS)
    parser.add_argument("--space", type=int, default=SPACE)
    parser.add_argument("--shapes", nargs="+", default=list(CLOSED), choices=CLOSED)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.model is None:
        lines = ["# Shapes as tokens", "", (__doc__ or "")[(__doc__ or "").index("The models are") :].strip(), ""]
        for name in ("triposg", "g3pt"):
            kept = json.loads((asked.out / f"{name}.json").read_text())
            for part in dict.fromkeys(row["of"] for row in kept["rows"]):
                rows = [row for row in kept["rows"] if row["of"] == part]
                lines += [
                    f"## {TITLES[part]}",
                    "",
                    *table(rows),
                    "",
                    f"{rows[0]['steps']:,} steps. {kept['where']}",
                    "",
                ]
        lines += [
            "`python benchmarks/shapes.py --model MODEL --device cuda --out shapes --seconds 330`, then `--out shapes` alone"
        ]
        write_table("shapes", "\n".join(lines))
        return
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    meshes = {
        name: moved(normalised(read_mesh(DATA / "shapes" / f"{name}.obj")), asked.device) for name in asked.shapes
    }
    truths = {name: (winding_number(mesh, grid().to(asked.device)) > 0.5).cpu() for name, mesh in meshes.items()}
    rows = (triposg if asked.model == "triposg" else g3pt)(meshes, truths, asked)
    where = gpu() if asked.device.startswith("cuda") else machine()
    (asked.out / f"{asked.model}.json").write_text(json.dumps({"rows": rows, "where": where}, indent=1) + "\n")


if __name__ == "__main__":
    main()
