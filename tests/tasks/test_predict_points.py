"""From a mesh on disk to its class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

trimesh = pytest.importorskip("trimesh", reason="the extra meshes")
SMALL = {
    "embed_dim": 24,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 2,
    "adapter_dim": 4,
    "input_points": 64,
    "point_channels": 12,
    "patchknn": 8,
    "lastdim": 8,
    "coef_3dgird": 0.5,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `tersor train` on balls and rods, and these."""
    from tersor.cli.main import main

    folder = tmp_path_factory.mktemp("shapes")
    for name in ("ball", "rod"):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(4):
            size = 1 + number
            shape = (
                trimesh.creation.icosphere(subdivisions=1, radius=size)
                if name == "ball"
                else trimesh.creation.cylinder(radius=0.1 * size, height=4 * size, sections=8)
            )
            shape.export(folder / "data" / name / f"{number}.{'ply' if number % 2 else 'obj'}")
    sizes = [text for name, value in SMALL.items() for text in ("--set", f"model.{name}={value}")]
    data = str(folder / "data")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("train", "any2point", "--data", data, "--validation", data, "--out", str(folder / "run")),
                *("--device", "cpu", "--epochs", "20", "--batch-size", "4", "--lr", "0.005", *sizes),
                *("--set", "data.augment=true", "--set", "data.noise=0.01"),
            ]
        )
    assert ended.value.code == 0
    return folder


def test_a_trained_model_tells_balls_from_rods(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    random = np.random.default_rng(0)
    ball = random.standard_normal((300, 3))
    np.save(tmp_path / "ball.npy", 9 * ball / np.linalg.norm(ball, axis=1, keepdims=True) + 30)
    np.save(tmp_path / "rod.npy", random.random((50, 3)) * [0.1, 0.1, 5])  # fewer points than the model looks at
    trimesh.creation.box((0.2, 0.2, 4)).export(tmp_path / "rod.glb")
    ran = tersor_command("predict", trained / "run", tmp_path, "--json")
    assert ran.status == 0, ran.err
    found = {Path(each["path"]).name: each["classes"][0] for each in json.loads(ran.out)}
    assert found == {"ball.npy": "ball", "rod.npy": "rod", "rod.glb": "rod"}
    line = tersor_command("predict", trained / "run", tmp_path / "ball.npy").out
    assert line.startswith(f"{tmp_path / 'ball.npy'}: ball ")


def test_unreadable_clouds_are_named_and_skipped(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((80, 3)))
    (tmp_path / "b.ply").write_bytes(b"no cloud")
    (tmp_path / "photo.png").touch()
    ran = tersor_command("predict", trained / "run", tmp_path, "--csv")
    assert ran.status == 1
    assert "b.ply" in ran.err
    assert "1 of 2 files skipped" in ran.err
    assert len(ran.out.splitlines()) == 1


def test_classes_that_do_not_fit_are_said_in_a_line(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "data" / name).mkdir(parents=True)
        np.save(tmp_path / "data" / name / "x.npy", np.random.default_rng(0).random((80, 3)))
    sizes = [text for name, value in SMALL.items() for text in ("--set", f"model.{name}={value}")]
    arguments = ("train", "any2point", "--data", tmp_path / "data", "--out", tmp_path / "run", *sizes)
    ran = tersor_command(*arguments)
    assert ran.status == 2
    assert "has 3 classes, the model has num_classes 2; --set model.num_classes=3" in ran.err
    ran = tersor_command(*arguments, "--validation", trained / "data", "--set", "model.num_classes=3")
    assert ran.status == 2
    assert "do not have the same classes" in ran.err
    ran = tersor_command(*arguments, "--set", "model.num_classes=5")
    assert "has 3 classes, the model 5, so 2 stay without a name: --set model.num_classes=3" in ran.err
