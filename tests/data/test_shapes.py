"""Signed distances, sampled points and extracted surfaces, against shapes whose answers are known."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tersor.data import shapes, surfaces
from tersor.data.shapes import Mesh, ShapeConfig
from tersor.errors import TersorError

pytest.importorskip("trimesh", reason="mesh files need the extra meshes")
pytest.importorskip("skimage", reason="marching cubes needs the extra meshes")


def cube(half: float = 0.5) -> Mesh:
    corners = torch.tensor([[x, y, z] for x in (-half, half) for y in (-half, half) for z in (-half, half)]).double()
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [triangle for a, b, c, d in sides for triangle in ((a, b, c), (a, c, d))]
    return Mesh(corners, torch.tensor(faces))


def to_cube(q: Tensor, half: float = 0.5) -> Tensor:
    apart = q.abs() - half
    return apart.clamp(min=0).norm(dim=1) + apart.amax(1).clamp(max=0)


def ball(radius: float = 0.6, cells: int = 24) -> Mesh:
    return surfaces.surface_of(surfaces.distance_grid(lambda p: p.norm(dim=-1) - radius, cells=cells))


def brute_force(mesh: Mesh, q: Tensor) -> Tensor:
    return torch.stack([shapes._squared(each, torch.stack(mesh.corners(), 1)).min().sqrt() for each in q])


def test_the_distance_to_a_cube_is_exact() -> None:
    torch.manual_seed(0)
    q = 2 * torch.rand(500, 3, dtype=torch.float64) - 1
    torch.testing.assert_close(shapes.signed_distance(cube(), q), to_cube(q), rtol=0, atol=1e-12)
    assert cube().volume() == pytest.approx(1)


def test_few_triangles_are_looked_at_and_none_is_missed() -> None:
    torch.manual_seed(0)
    mesh = ball()
    assert len(mesh.faces) > 10 * shapes.LOOKED_AT
    q = torch.cat(
        (torch.zeros(1, 3).double(), 2 * torch.rand(100, 3, dtype=torch.float64) - 1)
    )  # the centre: all are near
    torch.testing.assert_close(shapes.distance(mesh, q), brute_force(mesh, q), rtol=0, atol=1e-9)


def test_the_winding_number_counts_the_surfaces_around() -> None:
    q = torch.tensor([[0.0, 0, 0], [0.6, 0, 0], [0.9, 0.9, 0.9]]).double()
    inner, outer = cube(0.5), cube(0.8)
    both = Mesh(torch.cat((inner.vertices, outer.vertices)), torch.cat((inner.faces, outer.faces + 8)))
    torch.testing.assert_close(
        shapes.winding_number(both, q), torch.tensor([2.0, 1.0, 0.0]).double(), rtol=0, atol=1e-9
    )
    half = Mesh(inner.vertices, inner.faces[:6])  # three of six sides, seen from the centre
    torch.testing.assert_close(shapes.winding_number(half, q[:1]), torch.tensor([0.5]).double(), rtol=0, atol=1e-9)


def test_points_are_uniform_over_the_area_with_outward_normals() -> None:
    g = torch.Generator().manual_seed(0)
    cloud = shapes.surface_points(cube(), 6000, g)
    torch.testing.assert_close(to_cube(cloud[:, :3]), torch.zeros(6000).double(), rtol=0, atol=1e-12)
    moved = cloud[:, :3] + 0.01 * cloud[:, 3:]
    torch.testing.assert_close(to_cube(moved), torch.full((6000,), 0.01).double(), rtol=0, atol=1e-9)
    sides = (cloud[:, 3:].round().long() * torch.tensor([1, 2, 3])).sum(1).unique(return_counts=True)[1]
    assert len(sides) == 6
    assert sides.min() > 880  # of 1000 expected
    assert cloud[:, :3].mean(0).abs().max() < 0.02
    assert torch.equal(cloud, shapes.surface_points(cube(), 6000, torch.Generator().manual_seed(0)))


def test_open_surfaces_have_no_signed_distance() -> None:
    opened = Mesh(cube().vertices, cube().faces[1:])
    assert shapes.open_edges(cube()) == 0
    assert shapes.open_edges(opened) == 3
    with pytest.raises(TersorError, match="needs a closed surface; 3 edges"):
        shapes.signed_distance(opened, torch.zeros(1, 3))
    turned = cube()
    one = torch.cat((turned.faces[:1].flip(1), turned.faces[1:]))
    assert shapes.open_edges(Mesh(turned.vertices, one)) > 0


def test_normalised_centres_scales_and_turns_right_side_out() -> None:
    wrong = Mesh(cube().vertices * torch.tensor([4.0, 2, 1]) + 7, cube().faces.flip(1))
    found = shapes.normalised(wrong)
    torch.testing.assert_close(found.vertices.amax(0), torch.tensor([0.95, 0.475, 0.2375]).double())
    torch.testing.assert_close(found.vertices.amin(0), -found.vertices.amax(0))
    assert found.volume() > 0


@pytest.mark.parametrize("kind", [".obj", ".ply", ".stl", ".glb"])
def test_meshes_survive_their_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"cube{kind}"
    surfaces.write_mesh(cube(), path)
    first = path.read_bytes()
    found = shapes.read_mesh(path)
    assert (len(found.vertices), len(found.faces), shapes.open_edges(found)) == (8, 12, 0)
    assert found.volume() == pytest.approx(1)
    surfaces.write_mesh(cube(), path)
    assert path.read_bytes() == first


def test_texture_seams_do_not_open_a_surface(tmp_path: Path) -> None:
    lines = [f"v {' '.join(map(str, row))}" for row in cube().vertices.tolist()]
    lines += [f"vt {number / 36} 0" for number in range(36)]
    for row, face in enumerate(cube().faces.tolist()):
        lines.append("f " + " ".join(f"{v + 1}/{3 * row + i + 1}" for i, v in enumerate(face)))
    (tmp_path / "seams.obj").write_text("mtllib elsewhere.mtl\n" + "\n".join(lines))
    found = shapes.read_mesh(tmp_path / "seams.obj")
    assert len(found.vertices) == 8
    assert shapes.open_edges(found) == 0


def test_files_that_are_no_meshes_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.ply").write_text("no mesh")
    (tmp_path / "empty.obj").write_text("v 0 0 0\n")
    for name, said in (
        ("text.ply", "cannot be read as a mesh"),
        ("empty.obj", "triangles|cannot be read as a mesh"),
        ("gone.obj", "there is no mesh"),
        ("mesh.doc", "is no mesh file: they end in .obj"),
    ):
        with pytest.raises(TersorError, match=said):
            shapes.read_mesh(tmp_path / name)


# ---- surfaces


def test_a_ball_comes_back_closed_and_of_its_volume() -> None:
    mesh = ball(0.6, 48)
    assert shapes.open_edges(mesh) == 0
    assert mesh.volume() == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.01)
    assert (mesh.vertices.norm(dim=1) - 0.6).abs().max() < 0.003
    inverted = surfaces.surface_of(surfaces.distance_grid(lambda p: 0.6 - p.norm(dim=-1), cells=48))
    assert inverted.volume() == pytest.approx(mesh.volume(), rel=1e-6)


def test_coarse_to_fine_asks_less_and_finds_the_same() -> None:
    asked = []

    def field(p: Tensor) -> Tensor:
        asked.append(len(p))
        return (p - torch.tensor([0.1, 0.0, -0.2])).norm(dim=-1) - 0.5

    fine = surfaces.surface_of(surfaces.distance_grid(field, cells=128))
    assert sum(asked) < 0.2 * 129**3
    axis = torch.linspace(-surfaces.BOUND, surfaces.BOUND, 129)
    dense = surfaces.surface_of(field(torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)))
    torch.testing.assert_close(fine.vertices, dense.vertices, rtol=0, atol=1e-5)
    assert torch.equal(fine.faces, dense.faces)


def test_what_reaches_the_box_is_closed_there() -> None:
    mesh = surfaces.surface_of(surfaces.distance_grid(lambda p: p[:, 0].clone() * -1 - 0.3, cells=8))
    assert shapes.open_edges(mesh) == 0


def test_a_field_without_a_surface_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="one sign everywhere"):
        surfaces.surface_of(torch.ones(4, 4, 4))
    with pytest.raises(TersorError, match="NaN or Inf"):
        surfaces.surface_of(torch.full((4, 4, 4), torch.nan))
    with pytest.raises(TersorError, match="1 to 1024 cells a side, not 0"):
        surfaces.distance_grid(lambda p: p[:, 0], cells=0)
    with pytest.raises(TersorError, match=r"meshes are written as \.glb, \.obj"):
        surfaces.write_mesh(cube(), tmp_path / "cube.txt")


# ---- the data set


def test_items_are_clouds_and_distances_of_one_shape(tmp_path: Path) -> None:
    surfaces.write_mesh(cube(3.0), tmp_path / "cube.obj")
    data = shapes.load_shapes(tmp_path, ShapeConfig(points=50, queries=40, items=3, pool=200))
    assert len(data) == 3
    item = data[1]
    assert {name: list(value.shape) for name, value in item.items()} == {
        "points": [50, 6],
        "query_points": [40, 3],
        "target": [40],
    }
    torch.testing.assert_close(item["target"], to_cube(item["query_points"].double(), 0.95).float(), rtol=0, atol=1e-5)
    assert torch.equal(data[1]["points"], item["points"])
    data.set_epoch(1)
    assert not torch.equal(data[1]["points"], item["points"])


def test_open_meshes_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match=r"holds no file that ends in \.obj"):
        shapes.load_shapes(tmp_path, ShapeConfig())
    surfaces.write_mesh(Mesh(cube().vertices, cube().faces[1:]), tmp_path / "open.obj")
    with pytest.raises(TersorError, match=r"open\.obj is not closed: 3 edges"):
        shapes.load_shapes(tmp_path, ShapeConfig())
    with pytest.raises(TersorError, match="the points of shapes are 0"):
        ShapeConfig(points=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spot", "cow", "fandisk", "homer", "cheburashka"])
def test_real_meshes_have_whole_winding_numbers(name: str) -> None:
    folder = os.environ.get("TERSOR_DATA")
    if folder is None:
        pytest.skip("TERSOR_DATA is not set")
    mesh = shapes.normalised(shapes.read_mesh(Path(folder) / "shapes" / f"{name}.obj"))
    assert shapes.open_edges(mesh) == 0
    torch.manual_seed(0)
    q = 2 * torch.rand(300, 3, dtype=torch.float64) - 1
    w = shapes.winding_number(mesh, q)
    assert (w - w.round()).abs().max() < 1e-6
    cloud = shapes.surface_points(mesh, 100, torch.Generator().manual_seed(0))
    assert shapes.distance(mesh, cloud[:, :3]).max() < 1e-7
    inside = shapes.signed_distance(mesh, cloud[:, :3] - 1e-4 * cloud[:, 3:]) < 0
    assert inside.float().mean() > 0.97  # thin parts apart
