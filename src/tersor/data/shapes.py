"""Shapes: closed meshes from files, their signed distance by the winding number, points with normals on them.

    mesh = normalised(read_mesh("spot.obj"))               # vertices (V, 3), faces (F, 3), longest side -0.95 to 0.95
    cloud = surface_points(mesh, 2048)                     # (2048, 6): positions and unit normals, outward
    s = signed_distance(mesh, torch.rand(1000, 3) - 0.5)   # (1000,): exact, negative inside

The winding number of q is the sum over all triangles of the solid angle that they cover seen from q, over 4 pi: 1 inside a closed
surface, 0 outside, with no ray to miss an edge. With a, b, c the corners less q (van Oosterom and Strackee, 1983):

    tan(angle / 2) = det(a, b, c) / (|a||b||c| + (a.b)|c| + (b.c)|a| + (c.a)|b|)

The distance is that to the nearest point of the nearest triangle. A sphere around each triangle bounds its distance from
below, so only few triangles are looked at closely; the result is still exact. All of it is float64.

Files need the extra `meshes` (trimesh): .obj, .ply, .stl, .off, .glb. Corners at the same place are one corner, whatever
textures or normals they carry. For training, `load_shapes(folder)` is a data set of clouds, points in space and their
signed distances.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tersor.data.seeding import mixed_seed
from tersor.errors import TersorError
from tersor.untrusted import check_seed, first_words, read_bytes, readable

SUFFIXES = (".obj", ".ply", ".stl", ".off", ".glb")
FILE_BYTES = 1 << 29
PAIRS = 1 << 21  # of points and triangles at a time
LOOKED_AT = 24  # triangles a point, before all of them


@dataclass(frozen=True)
class Mesh:
    vertices: Tensor  # (V, 3) float64
    faces: Tensor  # (F, 3) int64, counter-clockwise seen from outside

    def corners(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each (F, 3)."""
        a, b, c = self.vertices[self.faces].unbind(1)
        return a, b, c

    def volume(self) -> float:
        """The volume inside a closed surface; negative where its triangles are turned inside out."""
        a, b, c = self.corners()
        return float((a * b.cross(c, dim=1)).sum() / 6)


def read_mesh(path: str | Path) -> Mesh:
    """All triangles of a file. Raises TersorError where it is no mesh or the extra is missing; no other file is opened."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise TersorError(f"{path} is no mesh file: they end in {', '.join(SUFFIXES)}")
    with readable(path):
        if not path.is_file():
            raise TersorError(f"there is no mesh {path}")
    content, trimesh = read_bytes(path, most=FILE_BYTES), package("trimesh")
    try:
        found = trimesh.load_mesh(
            io.BytesIO(content), file_type=path.suffix[1:].lower(), process=False, skip_materials=True
        )
        vertices, faces = torch.tensor(found.vertices).double(), torch.tensor(found.faces).long()
    except Exception as error:  # parsers raise errors of all kinds
        raise TersorError(f"{path} cannot be read as a mesh: {first_words(error) or type(error).__name__}") from None
    if not len(faces):
        raise TersorError(f"{path} has no triangles")
    if not bool(torch.isfinite(vertices).all()) or int(faces.min()) < 0 or int(faces.max()) >= len(vertices):
        raise TersorError(f"{path} has corners that are not finite, or triangles of corners that it does not have")
    return merged(Mesh(vertices, faces))


def merged(mesh: Mesh) -> Mesh:
    """Corners at the same place become one; triangles that then have fewer than three corners are removed."""
    vertices, number = torch.unique(mesh.vertices, dim=0, return_inverse=True)
    faces = number[mesh.faces]
    whole = (faces != faces.roll(1, 1)).all(1)
    return Mesh(vertices, faces[whole])


def open_edges(mesh: Mesh) -> int:
    """How many directed edges have no opposite. 0: the surface is closed and all its triangles are turned the same way."""
    edges = torch.cat([mesh.faces[:, [i, (i + 1) % 3]] for i in range(3)])
    V = len(mesh.vertices)
    forward, counts = torch.unique(edges[:, 0] * V + edges[:, 1], return_counts=True)
    backward, other = torch.unique(edges[:, 1] * V + edges[:, 0], return_counts=True)
    if torch.equal(forward, backward) and torch.equal(counts, other):
        return 0
    return int((~torch.isin(forward, backward)).sum()) or len(forward)


def normalised(mesh: Mesh, *, half: float = 0.95) -> Mesh:
    """Centred, the longest side of its box from -half to half; turned right side out where it is closed."""
    low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
    longest = float((high - low).max())
    if longest <= 0:
        raise TersorError("the mesh is a single point")
    mesh = Mesh((mesh.vertices - (low + high) / 2) * (2 * half / longest), mesh.faces)
    if open_edges(mesh) == 0 and mesh.volume() < 0:
        return Mesh(mesh.vertices, mesh.faces.flip(1))
    return mesh


def surface_points(mesh: Mesh, count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count, 6) float64: positions, uniform over the area, and the unit normals of their triangles."""
    a, b, c = mesh.corners()
    normal = (b - a).cross(c - a, dim=1)
    area = normal.norm(dim=1)
    if not float(area.sum()) > 0:
        raise TersorError("the mesh has no area")
    ends = area.cumsum(0)
    at = torch.rand(count, dtype=torch.float64, generator=generator) * ends[-1]
    rows = torch.searchsorted(ends, at, right=True).clamp(max=len(ends) - 1)
    u, v = torch.rand(2, count, 1, dtype=torch.float64, generator=generator)
    u, v = torch.where(u + v > 1, 1 - u, u), torch.where(u + v > 1, 1 - v, v)
    points = a[rows] + u * (b - a)[rows] + v * (c - a)[rows]
    return torch.cat((points, normal[rows] / area[rows, None]), 1)


def signed_distance(mesh: Mesh, q: Tensor) -> Tensor:
    """(Q,) float64 of q (Q, 3), negative inside. Raises TersorError where the surface is not closed."""
    if missing := open_edges(mesh):
        raise TersorError(
            f"a signed distance needs a closed surface; {missing} edges of this mesh have a triangle on one side only"
        )
    inside = winding_number(mesh, q) > 0.5
    d = distance(mesh, q)
    return torch.where(inside, -d, d)


def winding_number(mesh: Mesh, q: Tensor) -> Tensor:
    """(Q,) float64 of q (Q, 3)."""
    a, b, c = mesh.corners()
    normal = (b - a).cross(c - a, dim=1)
    offset = (normal * a).sum(1)
    ab, bc, ca = ((x - y).square().sum(1) for x, y in ((a, b), (b, c), (c, a)))  # squared edges
    i, j, k = mesh.faces.unbind(1)
    found = []
    for part in torch.split(q.double(), _at_a_time(mesh)):
        away = torch.cdist(part, mesh.vertices, compute_mode="donot_use_mm_for_euclid_dist")  # (q, V)
        A, B, C = away[:, i], away[:, j], away[:, k]  # (q, F): |a|, |b|, |c|
        det = offset - part @ normal.T
        A2, B2, C2 = A.square(), B.square(), C.square()
        below = A * B * C + ((A2 + B2 - ab) * C + (B2 + C2 - bc) * A + (C2 + A2 - ca) * B) / 2
        found.append(torch.atan2(det, below).sum(1) / (2 * math.pi))
    return torch.cat(found)


def distance(mesh: Mesh, q: Tensor) -> Tensor:
    """(Q,) float64 from q (Q, 3) to the surface, unsigned."""
    corners = torch.stack(mesh.corners(), 1)  # (F, 3, 3)
    centre = corners.mean(1)
    radius = (corners - centre[:, None]).norm(dim=2).amax(1)
    found = []
    for part in torch.split(q.double(), _at_a_time(mesh)):
        if part.is_cuda:  # to look at all triangles takes less time than to choose some
            found.append(_squared(part[:, None], corners).amin(1).sqrt())
            continue
        bounds = torch.cdist(part, centre) - radius  # (q, F), never above the distance
        count = min(LOOKED_AT, len(centre))
        lowest, rows = bounds.topk(count, 1, largest=False)
        nearest = _squared(part[:, None], corners[rows]).amin(1).sqrt()
        if count < len(centre):
            unsure = nearest > lowest[:, -1] - 1e-6  # the margin is for cdist's rounding
            for row in unsure.nonzero()[:, 0].tolist():
                near = bounds[row] <= nearest[row] + 1e-6
                nearest[row] = _squared(part[row], corners[near]).min().sqrt()
        found.append(nearest)
    return torch.cat(found)


def _squared(q: Tensor, triangles: Tensor) -> Tensor:
    """Squared distance of q (..., 3) to triangles (..., 3, 3): to the plane where its foot is inside, else to an edge."""
    a, b, c = triangles.unbind(-2)
    edges = []
    for start, end in ((a, b), (b, c), (c, a)):
        along = end - start
        share = ((q - start) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-300)
        edges.append((q - start - share.clamp(0, 1)[..., None] * along).square().sum(-1))
    normal = (b - a).cross(c - a, dim=-1)
    size = normal.square().sum(-1)
    inside = size > 0
    for start, end in ((a, b), (b, c), (c, a)):
        turned = torch.linalg.cross((end - start).expand_as(q - start), q - start)
        inside = inside & ((turned * normal).sum(-1) >= 0)
    plane = ((q - a) * normal).sum(-1).square() / size.clamp(min=1e-300)
    nearest_edge = torch.stack(edges).amin(0)
    return torch.where(inside, plane, nearest_edge)


def _at_a_time(mesh: Mesh) -> int:
    return max(1, PAIRS // max(len(mesh.faces), 1))


def package(name: str) -> Any:
    """An optional library of the extra `meshes`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TersorError(f"meshes need {name.split('.')[0]}; pip install 'tersor[meshes]' ({error})") from None


# ---- for training


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    points: int = 4096  # of a cloud
    queries: int = 1024  # points in space with their distances, half of them near the surface
    items: int = 64  # draws of each mesh an epoch
    pool: int = 20_000  # points in space a mesh whose distances are computed once
    near: float = 0.05  # how far from the surface those near it are: the standard deviation
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("points", "queries", "items", "pool"):
            value = getattr(self, name)
            if not 1 <= value <= 1 << 24:
                raise TersorError(f"the {name} of shapes are {value}, at least 1 and at most {1 << 24} are taken")
        if not 0 < self.near <= 1:
            raise TersorError(f"near is {self.near}, it must be above 0 and at most 1")
        check_seed(self.seed)
        if self.seed < 0:
            raise TersorError(f"the seed of shapes is {self.seed}, it must not be negative")


class Shapes(Dataset[dict[str, Tensor]]):
    """Items: points (P, 6), query_points (Q, 3), target (Q,) signed distances; float32."""

    def __init__(self, meshes: Sequence[Mesh], config: ShapeConfig) -> None:
        self.meshes, self.config, self.epoch = tuple(meshes), config, 0
        self.pools = [_pool(mesh, config, number) for number, mesh in enumerate(meshes)]

    def set_epoch(self, epoch: int) -> None:
        """Draw other points; the trainer calls it at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.meshes) * self.config.items

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, config = index % len(self.meshes), self.config
        chance = torch.Generator().manual_seed(mixed_seed(config.seed, self.epoch, index))
        points = surface_points(self.meshes[number], config.points, chance)
        queries, distances = self.pools[number]
        rows = torch.randint(len(queries), (config.queries,), generator=chance)
        return {"points": points.float(), "query_points": queries[rows].float(), "target": distances[rows].float()}


def _pool(mesh: Mesh, config: ShapeConfig, number: int) -> tuple[Tensor, Tensor]:
    """Points near the surface and anywhere in the box of +-1, in turn, and their signed distances."""
    chance = torch.Generator().manual_seed(mixed_seed(config.seed, 1 << 32, number))
    half = -(-config.pool // 2)
    near = surface_points(mesh, half, chance)[:, :3]
    near = near + config.near * torch.randn(half, 3, dtype=torch.float64, generator=chance)
    anywhere = 2 * torch.rand(half, 3, dtype=torch.float64, generator=chance) - 1
    q = torch.stack((near, anywhere), 1).flatten(0, 1)[: config.pool]
    return q, signed_distance(mesh, q)


def load_shapes(path: str | Path, config: ShapeConfig) -> Shapes:
    """A mesh file, or all that lie in a folder, each brought to a box of +-0.95. Every one must be closed."""
    path = Path(path).expanduser()
    with readable(path):
        files = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise TersorError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
    meshes = []
    for file in files:
        mesh = normalised(read_mesh(file))
        if missing := open_edges(mesh):
            raise TersorError(f"{file} is not closed: {missing} edges have a triangle on one side only")
        meshes.append(mesh)
    return Shapes(meshes, config)
