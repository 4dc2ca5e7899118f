"""Point clouds from files: .npy arrays, point clouds in .ply and .obj, and meshes, whose surfaces are sampled.

    points = read_cloud(Path("cow.obj"), 1024)        # (1024, 3) float32, on the surface, the same for the same seed
    cloud = centred(points)                           # the mean at the origin, the furthest point at distance 1
    data = load_clouds(Path("shapes"), CloudConfig(points=1024))
    data[0]                                           # {"points": (1024, 3), "target": class number}

.npy holds (N, 3) or more columns, of which the first three are x, y, z. Of a cloud with more points than asked for, that many
are drawn; one with fewer gives all its points and some of them again. A mesh is sampled by area. Meshes and .ply, .obj clouds
need the extra `meshes` (trimesh); no other file is opened, so textures and materials are not.

Data sets are folders with one subfolder a class, classes in alphabetical order. With `augment`, a cloud's points are drawn anew
in each epoch, scaled by 0.9 to 1.1 and turned about the y axis, as Any2Point is trained; `noise` adds a normal deviation.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tersor.data.seeding import mixed_seed
from tersor.errors import TersorError
from tersor.untrusted import check_seed, first_words, read_bytes, read_npy, readable

MESHES = frozenset({".ply", ".obj", ".stl", ".off", ".glb"})
SUFFIXES = MESHES | {".npy"}
FILE_BYTES = 1 << 29
POINTS = 1 << 24  # of one cloud that is drawn


@dataclass(frozen=True, kw_only=True)
class CloudConfig:
    points: int = 1024  # of each cloud
    augment: bool = False
    noise: float = 0.0  # standard deviation that is added to each coordinate, in radii of the cloud
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.points <= POINTS:
            raise TersorError(f"clouds of {self.points} points: 1 to {POINTS:,} are drawn")
        if not math.isfinite(self.noise) or self.noise < 0:
            raise TersorError(f"the noise of clouds is {self.noise}; it is 0 or more")
        check_seed(self.seed)


class Clouds(Dataset[dict[str, Tensor]]):
    """Labelled clouds, read when asked for."""

    def __init__(
        self, files: Sequence[Path], labels: Sequence[int], classes: Sequence[str], config: CloudConfig
    ) -> None:
        self.files, self.labels, self.classes, self.config = files, labels, tuple(classes), config
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation anew; the trainer calls it at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        config = self.config
        seed = mixed_seed(config.seed, self.epoch if config.augment else 0, index)
        chance = torch.Generator().manual_seed(seed)
        cloud = centred(read_cloud(self.files[index], config.points, seed=seed))
        if config.augment:
            cloud = scaled_and_turned(cloud, chance)
        if config.noise:
            cloud = cloud + config.noise * torch.randn(cloud.shape, generator=chance)
        return {"points": cloud, "target": torch.tensor(self.labels[index])}


def read_cloud(path: Path, count: int, *, seed: int = 0) -> Tensor:
    """(count, 3) float32. Raises TersorError where the file is no cloud or mesh, is broken, or trimesh is needed and absent."""
    ending = path.suffix.lower()
    if ending not in SUFFIXES:
        raise TersorError(f"{path} is no point cloud: those end in {', '.join(sorted(SUFFIXES))}")
    with readable(path):
        if not path.is_file():
            raise TersorError(f"there is no point cloud {path}")
    chance = torch.Generator().manual_seed(seed)
    if ending == ".npy":
        vertices, faces = _array(path), None
    else:
        vertices, faces = _parsed(path, ending)
    if not len(vertices):
        raise TersorError(f"{path} holds no points")
    if not bool(torch.isfinite(vertices).all()):
        raise TersorError(f"{path} holds coordinates that are not finite")
    if faces is not None and len(faces):
        return on_surface(vertices, faces, count, chance).float()
    rows = torch.randperm(len(vertices), generator=chance)
    rows = rows.repeat(-(-count // len(rows)))[:count]
    return vertices[rows].float()


def on_surface(vertices: Tensor, faces: Tensor, count: int, chance: torch.Generator) -> Tensor:
    """vertices (V, 3), faces (F, 3) -> (count, 3), evenly by area. Where no triangle has an area, corners are drawn."""
    a, b, c = vertices[faces].unbind(1)
    areas = (b - a).cross(c - a, dim=1).norm(dim=1)
    ends = areas.cumsum(0)
    if not ends[-1] > 0:
        return vertices[torch.randint(len(vertices), (count,), generator=chance)]
    u = torch.rand(count, 3, generator=chance, dtype=vertices.dtype)
    chosen = torch.searchsorted(ends, u[:, 0] * ends[-1]).clamp_max(len(faces) - 1)
    root, share = u[:, 1:2].sqrt(), u[:, 2:]
    return (1 - root) * a[chosen] + root * (1 - share) * b[chosen] + root * share * c[chosen]


def centred(points: Tensor) -> Tensor:
    """(N, 3) with its mean at the origin and its furthest point at distance 1; a single point stays at the origin."""
    points = points - points.mean(0)
    radius = points.norm(dim=1).max()
    return points / radius if radius > 0 else points


def scaled_and_turned(points: Tensor, chance: torch.Generator) -> Tensor:
    """By 0.9 to 1.1, alike on all axes, and by any angle about y."""
    scale, turn = torch.rand(2, generator=chance).unbind()
    cos, sin = (2 * math.pi * turn).cos(), (2 * math.pi * turn).sin()
    x, y, z = points.unbind(1)
    turned = torch.stack((cos * x + sin * z, y, cos * z - sin * x), 1)
    return (0.9 + 0.2 * scale) * turned


def load_clouds(path: Path, config: CloudConfig) -> Clouds:
    """Raises TersorError where the folder has no subfolder with clouds in it."""
    path = path.expanduser()
    files: list[tuple[Path, str]] = []
    with readable(path):
        folders = sorted(each for each in path.iterdir() if each.is_dir()) if path.is_dir() else []
        for folder in folders:
            inside = sorted(each for each in folder.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file())
            shown = [each for each in inside if not _is_hidden(each.relative_to(path))]
            files += [(each, folder.name) for each in shown]
    if not files:
        raise TersorError(
            f"{path} holds no clouds: one subfolder a class is expected, with {', '.join(sorted(SUFFIXES))} files in it"
        )
    classes = sorted({name for _, name in files})
    return Clouds([file for file, _ in files], [classes.index(name) for _, name in files], classes, config)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _array(path: Path) -> Tensor:
    values = read_npy(path, most=FILE_BYTES)
    if values.ndim != 2 or values.shape[1] < 3 or values.dtype.kind not in "fiu":
        raise TersorError(
            f"{path} holds {list(values.shape)} of {values.dtype}; points are rows of at least three numbers"
        )
    return torch.from_numpy(np.array(values[:, :3], np.float64))


def _parsed(path: Path, ending: str) -> tuple[Tensor, Tensor | None]:
    """Vertices (V, 3) and triangles (F, 3), or None for a cloud."""
    content, trimesh = read_bytes(path, most=FILE_BYTES), _trimesh()
    try:
        found = trimesh.load_scene(io.BytesIO(content), file_type=ending[1:], process=False, skip_materials=True)
        parts = [part for part in found.dump() if getattr(part, "vertices", None) is not None]
        vertices = [torch.tensor(np.asarray(part.vertices), dtype=torch.float64) for part in parts]
        faces = [
            torch.tensor(np.asarray(getattr(part, "faces", ())), dtype=torch.int64).reshape(-1, 3) for part in parts
        ]
    except Exception as error:  # parsers raise errors of all kinds
        raise TersorError(f"{path} cannot be read: {first_words(error) or type(error).__name__}") from None
    if any(len(f) and (int(f.min()) < 0 or int(f.max()) >= len(v)) for v, f in zip(vertices, faces, strict=True)):
        raise TersorError(f"{path} has triangles of corners that it does not have")
    if not vertices:
        return torch.empty(0, 3), None
    starts = np.cumsum([0, *(len(each) for each in vertices[:-1])]).tolist()
    triangles = torch.cat([each + start for each, start in zip(faces, starts, strict=True)])
    return torch.cat(vertices), triangles if len(triangles) else None


def _trimesh() -> Any:
    try:
        return importlib.import_module("trimesh")
    except ImportError:
        raise TersorError("reading .ply, .obj and meshes needs trimesh: pip install 'tersor[meshes]'") from None
