"""Surfaces out of a field of numbers: the grid coarse to fine, marching cubes, and mesh files.

    field = distance_grid(lambda p: p.norm(dim=-1) - 0.5, cells=64)      # (65, 65, 65) over the box of +-1.005
    mesh = surface_of(field)                                             # closed, counter-clockwise from outside
    write_mesh(mesh, "sphere.glb")

The grid is made from the coarse to the fine: where a cell and its neighbours have one sign, the values between are interpolated;
elsewhere the field is asked again. A part of the surface that no coarse grid point sees is lost, as in TripoSG's own extraction.
Marching cubes is scikit-image's, files are trimesh's (the extra `meshes`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.data.shapes import Mesh, package
from tersor.errors import TersorError
from tersor.progress import Progress

Field = Callable[[Tensor], Tensor]  # points (Q, 3) float32 -> (Q,)
BOUND = 1.005  # half a side of the box, as TripoSG's
DENSE = 32  # cells a side that are asked one by one
CHUNK = 50_000  # points at a time
FILES = (".glb", ".obj", ".ply", ".stl")
CELLS = 1024  # a billion grid points


@torch.no_grad()
def distance_grid(field: Field, *, cells: int, bound: float = BOUND, progress: Progress | None = None) -> Tensor:
    """(cells + 1,) * 3 float32 values of the field at the grid's points, x first. `cells` over 32 are halved while even."""
    check_cells(cells)
    sizes = [cells]
    while sizes[0] > DENSE and sizes[0] % 2 == 0:
        sizes.insert(0, sizes[0] // 2)
    grid = torch.empty(0)
    for level, size in enumerate(sizes):
        axis = torch.linspace(-bound, bound, size + 1)
        if level == 0:
            active = torch.ones(size + 1, size + 1, size + 1, dtype=torch.bool)
            fine = torch.empty(active.shape)
        else:
            active = _upsampled(_near(grid).float()) > 0
            fine = _upsampled(grid)
        rows = active.nonzero()
        values = []
        parts = torch.split(rows, CHUNK)
        for number, part in enumerate(parts, 1):
            values.append(field(axis[part]).float().cpu())
            if progress is not None:
                progress(f"grid of {size}", number, len(parts))
        if len(rows):
            fine[rows[:, 0], rows[:, 1], rows[:, 2]] = torch.cat(values)
        grid = fine
    return grid


def check_cells(cells: int) -> None:
    if not 1 <= cells <= CELLS:
        raise TersorError(f"a grid has 1 to {CELLS} cells a side, not {cells}")


def _near(grid: Tensor) -> Tensor:
    """Points whose cells, or the cells next to these, hold both signs."""
    inside = (grid < 0).float()[None, None]
    low, high = -F.max_pool3d(-inside, 5, 1, 2), F.max_pool3d(inside, 5, 1, 2)
    return (low != high)[0, 0]


def _upsampled(grid: Tensor) -> Tensor:
    """n + 1 points a side -> 2n + 1, linear between."""
    side = 2 * grid.shape[0] - 1
    return F.interpolate(grid[None, None], size=(side,) * 3, mode="trilinear", align_corners=True)[0, 0]


def surface_of(field: Tensor, *, bound: float = BOUND) -> Mesh:
    """Where the field (N, N, N) is 0. Its corner [0, 0, 0] is outside; where the shape reaches the box it is closed there.

    Raises TersorError where the field has one sign only, or values that are not finite.
    """
    if not bool(torch.isfinite(field).all()):
        raise TersorError("the field holds NaN or Inf; there is no surface to find")
    outside = -1.0 if float(field[0, 0, 0]) < 0 else 1.0
    values = field.double().numpy() * outside
    if not (values < 0).any():
        raise TersorError("the field has one sign everywhere, so there is no surface; has the model been trained?")
    step = 2 * bound / (field.shape[0] - 1)
    padded = np.pad(values, 1, constant_values=max(float(np.abs(values).max()), 1e-6))
    found, faces, _, _ = package("skimage.measure").marching_cubes(padded, 0.0)
    vertices = torch.tensor(np.asarray(found, np.float64)) * step - bound - step
    mesh = Mesh(vertices, torch.tensor(np.asarray(faces, np.int64)))
    return Mesh(vertices, mesh.faces.flip(1)) if mesh.volume() < 0 else mesh


def write_mesh(mesh: Mesh, path: str | Path, *, kind: str | None = None) -> None:
    """As the path's ending says, or as `kind` (".glb", ".obj", ".ply", ".stl"). The same mesh gives the same bytes."""
    kind = kind or Path(path).suffix.lower()
    if kind not in FILES:
        raise TersorError(f"meshes are written as {', '.join(FILES)}, not as {kind or 'a file without an ending'}")
    made = package("trimesh").Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
    content = made.export(file_type=kind[1:])
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
