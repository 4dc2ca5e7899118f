"""Objects from pictures: the voxels of what several pictures show, and their surface as a mesh.

Trained on folders of pictures with the object's voxels or mesh (`tersor.data.views`): the Dice loss, and IoU beside it. Predicted
are `NAME.npy`, how likely each voxel is filled, and `NAME.obj`, the surface where that is THRESHOLD, by marching cubes. It
lies in a cube of side 1 around the origin, with the axes of the voxels.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.data.images import SUFFIXES, folders_of_pictures, pictures_in
from tersor.data.shapes import Mesh, open_edges
from tersor.data.surfaces import surface_of, write_mesh
from tersor.data.views import VIEWS, ViewsConfig, load_views, picture_of, view_of
from tersor.errors import TersorError
from tersor.files import replacing
from tersor.layers.volumes import dice_loss, intersection_over_union
from tersor.models.config import checked_config
from tersor.progress import Progress, silent
from tersor.tasks.sheet import TILE, levels
from tersor.tasks.task import Sets, Task, name_of, numbers_of
from tersor.train.objectives import Batch

THRESHOLD = 0.4  # a voxel is filled above it; the paper tries 0.3, 0.4 and 0.5
MESH = ".obj"


@dataclass(frozen=True)
class Reconstructed:
    """What an object looks like in space."""

    path: Path
    voxels: Path  # (side, side, side) of float32, from 0 to 1
    mesh: Path
    views: int
    side: int  # of the voxels
    filled: int  # voxels
    faces: int
    closed: bool  # whether the mesh is

    def line(self) -> str:
        seen = f"{self.path}: {self.views} view{'s' if self.views > 1 else ''}, {self.filled:,} of {self.side**3:,} voxels filled"
        surface = f"{self.faces:,} triangles{'' if self.closed else ' (not closed)'}"
        return f"{seen}, {surface}; {self.voxels}, {self.mesh}"

    def as_dict(self) -> dict[str, Any]:
        found = {"path": str(self.path), "voxels": str(self.voxels), "mesh": str(self.mesh)}
        return found | {"views": self.views, "filled": self.filled, "faces": self.faces, "closed": self.closed}


def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Of views (B, V, 3, H, W) and voxels, target (B, side, side, side)."""
    volume = model(batch["views"]).float()
    overlap = intersection_over_union(volume.detach(), batch["target"], (THRESHOLD,))
    return {"loss": dice_loss(volume, batch["target"]), "iou": overlap.mean()}


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    config, picture, side = checked_config(ViewsConfig, table, "data"), _size_of(model), _side_of(model)
    train = load_views(data, config, picture=picture, side=side)
    held_out = load_views(validation, config, picture=picture, side=side, chance=False) if validation else None
    return Sets(train, held_out)


def _size_of(model: Any) -> int:
    """Pixels of a side of each view."""
    return int(model.example_inputs(1)["views"].shape[-1])


@torch.no_grad()
def _side_of(model: Any) -> int:
    """Voxels of a side of what the model makes. It is run to find out, which works for every model."""
    was_training = model.training
    side = int(model.eval()(**model.example_inputs(1)).shape[-1])
    model.train(was_training)
    return side


@torch.no_grad()
def together(module: nn.Module, paths: Sequence[Path], *, out: Path) -> Reconstructed:
    """Pictures of one object, or the folder with them."""
    first = paths[0]
    pictures = [each for path in paths for each in (pictures_in(path) if path.is_dir() else [path])]
    if len(pictures) > VIEWS:
        raise TersorError(f"{first} and others are {len(pictures)} views; at most {VIEWS} of an object are taken")
    size, like = _size_of(module), numbers_of(module)
    views = torch.stack([view_of(picture, size) for picture in pictures])
    volume = module(views[None].to(like)).float().cpu()[0, 0]
    mesh = surface_in(volume)
    voxels, surface = (out / f"{name_of(first)}{end}" for end in (".npy", MESH))
    with replacing(voxels) as partial, partial.open("wb") as file:
        np.save(file, volume.numpy())
    with replacing(surface) as partial:
        write_mesh(mesh, partial, kind=MESH)
    filled = int((volume > THRESHOLD).sum())
    return Reconstructed(
        first, voxels, surface, len(pictures), len(volume), filled, len(mesh.faces), open_edges(mesh) == 0
    )


def predict(
    module: nn.Module,
    path: Path,
    *,
    settings: Mapping[str, Any],
    labels: Mapping[int, str],
    out: Path | None,
    reference: Path | None,
    progress: Progress = silent,
) -> Reconstructed:
    assert out is not None
    return together(module, [path], out=out)


def surface_in(volume: Tensor) -> Mesh:
    """Where a volume (N, N, N) in a cube of side 1 is THRESHOLD; what reaches the cube is closed there."""
    if not bool((volume > THRESHOLD).any()):
        raise TersorError(
            f"no voxel is filled: the largest value is {float(volume.max()):.2g}, filled are those above {THRESHOLD}"
        )
    around = F.pad(THRESHOLD - volume, (1,) * 6, value=THRESHOLD)  # a ring of empty voxels
    return surface_of(around, bound=(len(volume) + 1) / (2 * len(volume)))


# ---- the sheet


def panels(sample: Mapping[str, Tensor], output: Tensor, sets: Sets) -> tuple[Any, Any, Any]:
    """Up to four views, from left to right and down, and both shapes."""
    pictures = [picture_of(each) for each in sample["views"][:4]]
    pictures += [torch.ones_like(pictures[0])] * (4 - len(pictures))
    a, b, c, d = pictures
    seen = levels(torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1))
    return seen, drawn(sample["target"] > 0.5), drawn(output[0] > THRESHOLD)


def drawn(filled: Tensor) -> Any:
    """A picture (TILE, TILE, 3) of voxels (N, N, N) seen from a corner, the second axis upward."""
    image, draw = (importlib.import_module(f"PIL.{name}") for name in ("Image", "ImageDraw"))
    picture = image.new("RGB", (TILE, TILE), "white")
    pen, n = draw.Draw(picture), len(filled)
    step = TILE / (2 * n)  # pixels an edge; the cube's corners are 2 n of them apart
    across = step * math.sqrt(3) / 2
    axes = np.array([[across, step / 2], [0, -step], [-across, step / 2]])  # of x, y and z in the picture
    corner = np.array([TILE / 2, TILE / 2])  # of the voxel at the origin
    hidden = F.pad(filled, (0, 1) * 3)
    behind_to_front = sorted(filled.nonzero().tolist(), key=sum)
    for x, y, z in behind_to_front:
        for axis, grey in ((0, 150), (1, 220), (2, 90)):
            place = [x, y, z]
            place[axis] += 1
            if hidden[tuple(place)]:
                continue
            start, others = np.array(place) @ axes + corner, [axes[each] for each in range(3) if each != axis]
            edges = [start, start + others[0], start + others[0] + others[1], start + others[1]]
            pen.polygon([tuple(each) for each in edges], fill=(grey, grey, grey))
    return np.asarray(picture)


TASK = Task(
    objective,
    load_data,
    predict,
    frozenset(SUFFIXES),
    inside=folders_of_pictures,
    together=together,
    writes=(".npy", MESH),
    normalises=False,
    panels=panels,
)
