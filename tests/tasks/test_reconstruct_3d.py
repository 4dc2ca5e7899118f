"""Multi-view reconstruction: from pictures of an object in a folder to its voxels and a mesh."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tersor.data.shapes import Mesh, read_mesh
from tersor.data.views import ViewsConfig, load_views, picture_of, view_of, voxelized
from tersor.errors import TersorError
from tersor.models import find
from tersor.tasks.reconstruct_3d import drawn, surface_in

pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
trimesh = pytest.importorskip("trimesh", reason="meshes need trimesh")
pytest.importorskip("skimage", reason="meshes need scikit-image")


def write_box(folder: Path, low: tuple[int, int, int], high: tuple[int, int, int], *, voxels: bool = True) -> Path:
    """An object: a box in the grid of 32, seen along each axis, white where it is and transparent around it."""
    folder.mkdir(parents=True)
    filled = np.zeros((32, 32, 32), bool)
    filled[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    for axis in range(3):
        picture = np.zeros((32, 32, 4), np.uint8)
        picture[filled.any(axis)] = 255
        pillow.fromarray(picture).save(folder / f"{axis}.png")
    if voxels:
        np.save(folder / "voxels.npy", filled)
    return folder


def test_a_view_is_prepared_as_the_published_code_does(tmp_path: Path) -> None:
    picture = np.zeros((137, 137, 4), np.uint8)
    picture[4:132, 4:132] = (255, 51, 0, 255)  # the part that is kept
    picture[60:70, 60:70] = 0
    pillow.fromarray(picture).save(tmp_path / "a.png")
    view = view_of(tmp_path / "a.png", 224)
    assert view.shape == (3, 224, 224)
    assert view[:, 0, 0].tolist() == pytest.approx([-1, 51 / 255 * 2 - 1, 1])  # B, G, R
    assert view[:, 112, 112].tolist() == pytest.approx([240 / 255 * 2 - 1] * 3)
    assert picture_of(view)[:, 0, 0].tolist() == pytest.approx([1, 0.2, 0])


def test_voxels_of_a_mesh_are_filled_and_keep_its_axes(tmp_path: Path) -> None:
    trimesh.creation.box((4.0, 2.0, 1.0)).export(tmp_path / "box.obj")
    filled = voxelized(read_mesh(tmp_path / "box.obj"), 32)
    expected = torch.zeros(32, 32, 32, dtype=torch.bool)
    expected[:, 8:24, 12:20] = True
    wrong = filled != expected  # the shell of voxels that a face only touches may count
    assert not wrong[:, 9:23, 13:19].any()
    assert not filled[:, :7].any()
    assert filled.sum(0).amax() == 32
    half = Mesh(torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0]]).double(), torch.tensor([[0, 1, 2]]))
    assert 400 < int(voxelized(half, 32).sum()) < 700  # an open surface stays a sheet


def test_the_surface_lies_between_filled_and_empty_voxels(tmp_path: Path) -> None:
    volume = torch.zeros(8, 8, 8)
    volume[0:4, 2:6, 2:6] = 0.8
    mesh = surface_in(volume)
    low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
    assert low.tolist() == pytest.approx([-0.5, -0.25, -0.25])
    assert high.tolist() == pytest.approx([0, 0.25, 0.25])
    with pytest.raises(TersorError, match=r"the largest value is 0\.3, filled are those above 0\.4"):
        surface_in(torch.full((4, 4, 4), 0.3))


def test_views_are_drawn_anew_each_epoch_and_fixed_for_validation(tmp_path: Path) -> None:
    for number in range(3):
        write_box(tmp_path / "class" / str(number), (0, 0, 0), (8 + 4 * number, 16, 32))
    data = load_views(tmp_path, ViewsConfig(views=2), picture=32, side=32)
    assert torch.equal(data[0]["views"], data[0]["views"])
    seen = set()
    for epoch in range(8):
        data.set_epoch(epoch)
        seen.add(tuple(data[0]["views"].sum((1, 2, 3)).tolist()))
    assert len(seen) > 2
    assert data[2]["target"].sum() == 16 * 16 * 32
    fixed = load_views(tmp_path, ViewsConfig(views=2), picture=32, side=32, chance=False)[1]["views"]
    expected = [view_of(tmp_path / "class" / "1" / f"{number}.png", 32) for number in (0, 1)]
    assert torch.equal(fixed, torch.stack(expected))


def test_what_is_wrong_with_objects_is_said(tmp_path: Path) -> None:
    def load(**options: int) -> Any:
        return load_views(tmp_path, ViewsConfig(**options), picture=32, side=32)

    with pytest.raises(TersorError, match="holds no objects"):
        load()
    box = write_box(tmp_path / "box", (0, 0, 0), (8, 8, 8))
    with pytest.raises(TersorError, match=r"box has 3 pictures, a sample takes 4; --set data\.views=3"):
        load(views=4)
    np.save(box / "voxels.npy", np.zeros((16, 16, 16)))
    with pytest.raises(TersorError, match=r"holds float64 \[16, 16, 16\], voxels are numbers \[32, 32, 32\]"):
        load()[0]
    (box / "mesh.obj").touch()
    with pytest.raises(TersorError, match=r"holds voxels\.npy and mesh\.obj; an object has one shape"):
        load()
    (box / "voxels.npy").unlink()
    with pytest.raises(TersorError, match=r"mesh\.obj"):
        load()[0]
    (box / "mesh.obj").unlink()
    with pytest.raises(TersorError, match=r"holds neither voxels\.npy nor mesh\.obj"):
        load()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tersor.cli.main import main

    folder = tmp_path_factory.mktemp("boxes")
    random = np.random.default_rng(0)
    for number in range(16):
        low, high = random.integers(2, 12, 3), random.integers(18, 31, 3)
        write_box(folder / "data" / str(number), tuple(low), tuple(high))
    small = find("lrgt").small
    sizes = [text for name, value in small.items() for text in ("--set", f"model.{name}={json.dumps(value)}")]
    data = str(folder / "data")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("train", "lrgt", "--data", data, "--validation", data, "--out", str(folder / "run")),
                *("--device", "cpu", "--epochs", "5", "--batch-size", "4", "--lr", "0.002", *sizes),
                *("--set", "data.views=2", "--log-every", "1", "--validate-every", "20"),
            ]
        )
    assert ended.value.code == 0
    return folder


def test_the_loss_falls_and_a_sheet_is_left(trained: Path) -> None:
    with (trained / "run" / "log.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] - 0.5 < 0.7 * (losses[0] - 0.5)  # equal volumes have the loss 0.5 in the published form
    sheet = np.asarray(pillow.open(trained / "run" / "samples.png"))
    assert sheet.shape == (8 * 200 + 24, 3 * 200 + 8, 3)
    assert set(np.unique(drawn(torch.ones(2, 2, 2, dtype=torch.bool)))) == {90, 150, 220, 255}


def test_folders_and_files_become_voxels_and_meshes(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    for name in ("a.1", "a.2"):
        write_box(tmp_path / "objects" / name, (8, 8, 8), (24, 24, 24), voxels=False)
    out = tmp_path / "out"
    ran = tersor_command("predict", trained / "run", tmp_path / "objects", "--out", out, "--json")
    assert ran.status == 0, ran.err
    first, second = json.loads(ran.out)
    assert [first["views"], second["mesh"]] == [3, str(out / "a.2.obj")]
    volume = np.load(first["voxels"])
    assert volume.shape == (32, 32, 32)
    assert volume.dtype == np.float32
    assert first["filled"] == (volume > 0.4).sum()
    mesh = trimesh.load_mesh(first["mesh"])
    assert len(mesh.faces) == first["faces"]
    assert mesh.is_watertight
    assert first["closed"]
    views = sorted((tmp_path / "objects" / "a.1").iterdir())
    line = tersor_command("predict", trained / "run", *views, "--out", out).out
    assert line.startswith(f"{views[0]}: 3 views, {first['filled']:,} of 32,768 voxels filled, {first['faces']:,} tri")
    assert np.array_equal(np.load(out / "0.npy"), volume)


def test_an_unreadable_view_leaves_its_object_out(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    for name in ("good", "bad"):
        write_box(tmp_path / "objects" / name, (8, 8, 8), (24, 24, 24), voxels=False)
    (tmp_path / "objects" / "bad" / "1.png").write_bytes(b"no picture")
    ran = tersor_command("predict", trained / "run", tmp_path / "objects", "--out", tmp_path / "out")
    assert ran.status == 1
    assert "bad/1.png cannot be decoded" in ran.err
    assert "1 of 2 files skipped" in ran.err
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["good.npy", "good.obj"]
