"""Point clouds: every kind of file, surfaces by area, folders of classes, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tersor.data.clouds import CloudConfig, centred, load_clouds, on_surface, read_cloud, scaled_and_turned
from tersor.errors import TersorError

POINTS_PLY = """ply
format ascii 1.0
element vertex 3
property float x
property float y
property float z
end_header
0 0 1
0 2 0
3 0 0
"""
SQUARE = "v 0 0 0\nv 2 0 0\nv 2 2 0\nv 0 2 0\nf 1 2 3 4\n"  # OBJ counts from 1, and a face may have four corners


def rows(points: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in points.tolist()}


def test_arrays_give_points_and_repeat_them_where_there_are_too_few(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.int32).reshape(6, 4)  # a fourth column: an intensity, say
    np.save(tmp_path / "a.npy", values)
    expected = {tuple(map(float, row)) for row in values[:, :3].tolist()}
    assert rows(read_cloud(tmp_path / "a.npy", 6)) == expected
    assert rows(read_cloud(tmp_path / "a.npy", 4)) < expected
    again = read_cloud(tmp_path / "a.npy", 13)
    assert again.shape == (13, 3)
    assert rows(again) == expected
    assert again.dtype == torch.float32
    assert torch.equal(again, read_cloud(tmp_path / "a.npy", 13))
    assert not torch.equal(again, read_cloud(tmp_path / "a.npy", 13, seed=1))


def test_clouds_in_ply_and_obj_are_their_points(tmp_path: Path) -> None:
    pytest.importorskip("trimesh", reason="the extra meshes")
    (tmp_path / "a.ply").write_text(POINTS_PLY)
    (tmp_path / "b.obj").write_text("v 0 0 1\nv 0 2 0\nv 3 0 0\n")
    for name in ("a.ply", "b.obj"):
        assert rows(read_cloud(tmp_path / name, 3)) == {(0, 0, 1), (0, 2, 0), (3, 0, 0)}


def test_meshes_are_sampled_on_their_surface(tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh", reason="the extra meshes")
    (tmp_path / "square.obj").write_text("mtllib none.mtl\n" + SQUARE)
    square = read_cloud(tmp_path / "square.obj", 4000)
    assert not square[:, 2].any()
    assert square.min() >= 0
    assert square.max() <= 2
    torch.testing.assert_close(square.mean(0), torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=0.05)
    for name in ("ball.ply", "ball.stl", "ball.off", "ball.glb"):
        ball = trimesh.creation.icosphere(subdivisions=3, radius=2.0)
        ball.export(tmp_path / name)
        radius = read_cloud(tmp_path / name, 500).norm(dim=1)
        assert radius.min() > 1.97
        assert radius.max() < 2.001


def test_a_triangle_gets_points_by_its_area() -> None:
    vertices = torch.tensor([[0, 0, 0], [3, 0, 0], [0, 1, 0], [0, 0, 5], [1, 0, 5], [0, 1, 5]]).double()
    faces = torch.tensor([[0, 1, 2], [3, 4, 5]])
    points = on_surface(vertices, faces, 8000, torch.Generator().manual_seed(0))
    assert abs(float((points[:, 2] == 0).double().mean()) - 0.75) < 0.02
    torch.testing.assert_close(
        points[points[:, 2] == 0].mean(0), vertices[:3].mean(0), rtol=0, atol=0.03
    )  # evenly inside, too
    flat = on_surface(vertices, torch.tensor([[0, 0, 1]]), 5, torch.Generator().manual_seed(0))  # without any area
    assert rows(flat) <= rows(vertices)


def test_centred_clouds_fill_the_unit_sphere() -> None:
    cloud = centred(torch.rand(50, 3) * 7 + 3)
    torch.testing.assert_close(cloud.mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    assert cloud.norm(dim=1).max() == pytest.approx(1)
    assert not centred(torch.ones(4, 3)).any()


def test_augmentation_keeps_heights_and_distances_up_to_the_scale() -> None:
    cloud = torch.randn(20, 3)
    turned = scaled_and_turned(cloud, torch.Generator().manual_seed(3))
    scale = float(turned[0, 1] / cloud[0, 1])
    assert 0.9 <= scale <= 1.1
    torch.testing.assert_close(turned[:, 1], scale * cloud[:, 1])
    torch.testing.assert_close(torch.pdist(turned), scale * torch.pdist(cloud))
    assert not torch.allclose(turned, scale * cloud)


def test_folders_are_classes_and_chance_follows_the_epoch(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", np.random.default_rng(len(name)).random((40, 3)))
    (tmp_path / "a" / "notes.txt").touch()
    plain = load_clouds(tmp_path, CloudConfig(points=16))
    assert plain.classes == ("a", "b")
    assert [int(plain[i]["target"]) for i in range(len(plain))] == [0, 1]
    assert plain[0]["points"].shape == (16, 3)
    chancy = load_clouds(tmp_path, CloudConfig(points=16, augment=True, noise=0.01))
    first = chancy[0]["points"]
    assert torch.equal(chancy[0]["points"], first)
    plain.set_epoch(1)
    chancy.set_epoch(1)
    assert not torch.equal(chancy[0]["points"], first)
    assert torch.equal(plain[0]["points"], load_clouds(tmp_path, CloudConfig(points=16))[0]["points"])


def test_files_that_are_no_clouds_are_said_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("trimesh", reason="the extra meshes")
    np.save(tmp_path / "flat.npy", np.zeros((4, 2)))
    np.save(tmp_path / "words.npy", np.array([["a", "b", "c"]]))
    np.save(tmp_path / "objects.npy", np.array([[None] * 3], dtype=object), allow_pickle=True)
    np.save(tmp_path / "nan.npy", np.full((4, 3), np.nan))
    np.save(tmp_path / "none.npy", np.zeros((0, 3)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "nan.npy").read_bytes()[:-8])
    (tmp_path / "broken.ply").write_bytes(b"ply\nformat ascii 1.0\nelement vertex 9\n")
    (tmp_path / "empty.obj").write_bytes(b"")
    (tmp_path / "far.obj").write_text("v 0 0 0\nv 1 0 0\nf 1 2 9\n")
    for name, told in (
        ("flat.npy", r"rows of at least three numbers"),
        ("words.npy", r"\[1, 3\] of <U1"),
        ("objects.npy", "pickled Python objects"),
        ("nan.npy", "not finite"),
        ("none.npy", "no points"),
        ("cut.npy", "it holds 88 bytes"),
        ("broken.ply", "cannot be read|no points"),
        ("empty.obj", "cannot be read|no points"),
        ("far.obj", "cannot be read|does not have"),
        ("gone.npy", "there is no point cloud"),
        ("notes.txt", "is no point cloud"),
    ):
        with pytest.raises(TersorError, match=told) as error:
            read_cloud(tmp_path / name, 8)
        assert "\n" not in str(error.value)
    with pytest.raises(TersorError, match="holds no clouds: one subfolder a class"):
        load_clouds(tmp_path, CloudConfig())
    with pytest.raises(TersorError, match="the noise of clouds is -1"):
        CloudConfig(noise=-1)
    with pytest.raises(TersorError, match="clouds of 0 points"):
        CloudConfig(points=0)
