"""Pictures of one object from several sides, and its voxels: what multi-view reconstruction learns from.

    data = load_views("chairs/train", ViewsConfig(views=3), picture=224, side=32)
    data[0]             # {"views": (3, 3, 224, 224), "target": (32, 32, 32), 1 where the object is}

A folder that holds pictures is an object: OBJECT/*.png, at any depth, and beside them the object's shape: `voxels.npy` (side,
side, side) or a mesh (`mesh.obj`, `.ply`, `.stl`, `.off`, `.glb`; the extra `meshes`). In training the `views` pictures of a
sample depend on the seed, the epoch and the index alone; otherwise they are the first ones by name.

A picture is prepared as the code of LRGT does: where it is transparent it becomes light grey, the middle is cut out (128 of the
137 pixels of ShapeNet's pictures, and the same share of others), and the values are B, G, R from -1 to 1.

A mesh is scaled until its longest side fills the grid, and centred, as ShapeNet's voxels are. Voxels are those that its surface
passes through, and all that these enclose; the surface need not be closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from tersor.data.images import folders_of_pictures, open_with_alpha, pictures_in
from tersor.data.seeding import mixed_seed
from tersor.data.shapes import SUFFIXES, Mesh, package, read_mesh
from tersor.errors import TersorError
from tersor.untrusted import check_seed, read_npy, readable

VIEWS = 64  # of an object: the memory grows with their square
KEPT = 128 / 137  # of the shorter side
BACKGROUND = 240 / 255  # where a picture is transparent
STEP = 0.5  # voxels at most from a point of a mesh to the next
VOXELS, MESH = "voxels.npy", "mesh"


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    views: int = 3  # of a sample
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.views <= VIEWS:
            raise TersorError(f"a sample has {self.views} views, 1 to {VIEWS} are taken")
        check_seed(self.seed)
        if self.seed < 0:
            raise TersorError(f"the seed of views is {self.seed}, it must not be negative")


class Views(Dataset[dict[str, Tensor]]):
    """objects: the pictures of each, and the file of its shape."""

    def __init__(
        self,
        objects: Sequence[tuple[Sequence[Path], Path]],
        config: ViewsConfig,
        *,
        picture: int,
        side: int,
        chance: bool,
    ) -> None:
        self.objects, self.config, self.picture, self.side, self.chance = objects, config, picture, side, chance
        self.epoch = 0
        self.known: dict[int, Tensor] = {}  # voxels of meshes, which take a while

    def set_epoch(self, epoch: int) -> None:
        """Take other views; the trainer calls it at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pictures, shape = self.objects[index]
        chosen = list(range(self.config.views))
        if self.chance:
            generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, self.epoch, index))
            chosen = torch.randperm(len(pictures), generator=generator)[: self.config.views].tolist()
        if index not in self.known:
            self.known[index] = voxels_of(shape, self.side)
        views = torch.stack([view_of(pictures[number], self.picture) for number in chosen])
        return {"views": views, "target": self.known[index].float()}


def load_views(path: str | Path, config: ViewsConfig, *, picture: int, side: int, chance: bool = True) -> Views:
    """picture: pixels of a side of each view. side: voxels of a side. Raises TersorError where an object has no shape, or too
    few pictures."""
    path = Path(path).expanduser()
    with readable(path):
        folders = folders_of_pictures(path) if path.is_dir() else []
    if not folders:
        raise TersorError(f"{path} holds no objects: folders are expected, each with an object's pictures and {VOXELS}")
    objects = []
    for folder in folders:
        pictures, shape = pictures_in(folder), _shape_in(folder)
        if len(pictures) < config.views:
            raise TersorError(
                f"{folder} has {len(pictures)} pictures, a sample takes {config.views}; --set data.views={len(pictures)}"
            )
        objects.append((pictures, shape))
    return Views(objects, config, picture=picture, side=side, chance=chance)


def _shape_in(folder: Path) -> Path:
    found = [each for each in (folder / VOXELS, *(folder / f"{MESH}{end}" for end in SUFFIXES)) if each.is_file()]
    if len(found) != 1:
        told = " and ".join(each.name for each in found) or f"neither {VOXELS} nor {MESH}{SUFFIXES[0]}"
        raise TersorError(f"{folder} holds {told}; an object has one shape, {VOXELS} or a mesh")
    return found[0]


def view_of(path: Path, size: int) -> Tensor:
    """(3, size, size) of a picture."""
    image = open_with_alpha(path)
    side = max(1, round(KEPT * min(image.size)))
    left, top = ((length - side) // 2 for length in image.size)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + side, top + side)), np.float32) / 255)
    scaled = F.interpolate(
        pixels.permute(2, 0, 1)[None], (size, size), mode="bilinear", antialias=True, align_corners=False
    )[0]
    rgb, alpha = scaled[:3], scaled[3]
    rgb = torch.where(alpha == 0, BACKGROUND, rgb)  # after scaling, as published
    return 2 * rgb.flip(0) - 1


def picture_of(view: Tensor) -> Tensor:
    """(3, size, size) in [0, 1], R, G, B: the way back from view_of."""
    return (view.flip(0) + 1) / 2


def voxels_of(path: Path, side: int) -> Tensor:
    """(side, side, side), bool, of voxels.npy or a mesh file."""
    if path.suffix != ".npy":
        return voxelized(read_mesh(path), side)
    values = read_npy(path)
    if values.dtype.kind not in "biuf" or values.shape != (side,) * 3:
        raise TersorError(f"{path} holds {values.dtype} {list(values.shape)}, voxels are numbers {[side] * 3}")
    if not (values >= 0).all() or not (values <= 1).all():
        raise TersorError(f"{path} holds values that are not from 0 (empty) to 1 (filled)")
    return torch.from_numpy(values > 0.5)


def voxelized(mesh: Mesh, side: int) -> Tensor:
    """(side, side, side), bool: the voxels that the surface passes through, and those that they enclose."""
    low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
    longest = float((high - low).max())
    if longest <= 0:
        raise TersorError("the mesh is a single point")
    within = (mesh.vertices - (low + high) / 2) * (side / longest) + side / 2
    points, _ = package("trimesh.remesh").subdivide_to_size(within.numpy(), mesh.faces.numpy(), max_edge=STEP)
    x, y, z = points.astype(np.int64).clip(0, side - 1).T
    filled = np.zeros((side,) * 3, bool)
    filled[x, y, z] = True
    return torch.from_numpy(package("scipy.ndimage").binary_fill_holes(filled))
