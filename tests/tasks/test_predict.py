"""From the photo on disk to the answer."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tersor
import tersor.models
from tersor.errors import TersorError
from tersor.tasks import task_named, tasks
from tersor.tasks.predict import input_files

pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `tersor train` on pictures of three colours, and these pictures."""
    from tersor.cli.main import main

    folder = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(8):
            pixels = random.integers(0, 60, (40, 48, 3), np.uint8)
            pixels[..., channel] += 150
            pillow.fromarray(pixels).save(folder / "pictures" / name / f"{number}.png")
    sizes = [text for name, value in SMALL.items() for text in ("--set", f"model.{name}={value}")]
    data = str(folder / "pictures")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("train", "vit", "--data", data, "--validation", data, "--out", str(folder / "run")),
                *("--device", "cpu", "--epochs", "15", "--batch-size", "8", "--lr", "0.003", *sizes),
            ]
        )
    assert ended.value.code == 0
    return folder


def test_a_trained_classifier_names_the_colour(trained: Path, tersor_command: Callable[..., Any]) -> None:
    ran = tersor_command("predict", trained / "run", trained / "pictures" / "green", "--json")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert [each["classes"][0] for each in found] == ["green"] * 8
    assert sum(found[0]["probabilities"]) == pytest.approx(1)
    line = tersor_command("predict", trained / "run", trained / "pictures" / "blue" / "0.png").out
    assert line.splitlines()[-1].startswith(f"{trained / 'pictures' / 'blue' / '0.png'}: blue ")


def test_eval_and_quantized_copies_take_what_train_wrote(trained: Path, tersor_command: Callable[..., Any]) -> None:
    ran = tersor_command("eval", trained / "run", "--images", trained / "pictures", "--json")
    assert json.loads(ran.out)["top1"] == 100
    result = tersor.compress(
        str(trained / "run"),
        tersor.GPTQ(bits=8, group_size=-1),
        format="compressed-tensors",
        calibration=str(trained / "pictures"),
        samples=8,
        out=trained / "quantized",
        overwrite=True,
    )
    assert result.summary.layers
    ran = tersor_command("predict", trained / "quantized", trained / "pictures" / "red", "--csv")
    rows = list(csv.reader(io.StringIO(ran.out)))
    assert {row[1] for row in rows} == {"red"}


def test_one_class_is_not_trained_on(trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "empty").mkdir()
    (tmp_path / "data" / "red").symlink_to(trained / "pictures" / "red")
    ran = tersor_command("train", "vit", "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert ran.status == 2
    assert ran.err == f"tersor: {tmp_path / 'data'} has one class, red; a classifier needs two or more\n"


def test_a_model_without_a_head_names_no_classes(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"num_classes": 0}))
    ran = tersor_command("predict", tmp_path / "run", trained / "pictures")
    assert ran.status == 2
    assert ran.err == f"tersor: {tmp_path / 'run'} has no head (num_classes is 0): it gives features, and no classes\n"


def test_unreadable_files_are_named_and_skipped(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.png").write_bytes(b"")
    pillow.new("RGB", (50, 40), (220, 0, 0)).save(tmp_path / "fine.png")
    ran = tersor_command("predict", trained / "run", tmp_path)
    assert ran.status == 1
    assert "broken.png" in ran.err
    assert "1 of 2 files skipped" in ran.err
    assert len(ran.out.splitlines()) == 1
    assert "red" in ran.out


def test_the_built_in_model_names_its_classes(tmp_path: Path, tersor_command: Callable[..., Any]) -> None:
    pillow.new("RGB", (32, 32), (80, 120, 200)).save(tmp_path / "sky.png")
    told = json.loads(tersor_command("predict", "demo-vit", tmp_path / "sky.png", "--json").out)[0]["classes"]
    ten = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}
    assert set(told) < ten


def test_an_official_checkpoint_in_a_bare_file(tmp_path: Path, tersor_command: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    torch.save({"model": tersor.models.create("shvit_s1").state_dict()}, tmp_path / "shvit_s1.pth")
    pillow.new("RGB", (200, 150)).save(tmp_path / "a.jpg")
    ran = tersor_command("predict", "shvit_s1", tmp_path / "a.jpg", "--checkpoint", tmp_path / "shvit_s1.pth", "--json")
    assert ran.status == 0, ran.err
    assert len(json.loads(ran.out)[0]["classes"]) == 5


def test_what_cannot_be_done_is_said_in_a_line(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    run = trained / "run"
    (tmp_path / "words.pth").write_text("hello\n")
    for arguments, said in (
        ((run, tmp_path / "none.png"), "there is no file"),
        ((run, tmp_path), "holds no file that ends in"),
        ((run, trained / "pictures", "--csv", "--json"), "exclude each other"),
        ((run, trained / "pictures", "--out", tmp_path), "'classify' writes no files"),
        ((run, trained / "pictures", "--reference", tmp_path), "'classify' compares nothing with a reference"),
        (("demo", trained / "pictures"), "tersor generate"),
        (("nothing-here", "x.png"), "no model at nothing-here"),
        (("shvit_s1", "x.png"), "shvit_s1 is an architecture, which knows nothing yet"),
        (
            ("shvit_s1", trained / "pictures", "--checkpoint", tmp_path / "words.pth"),
            "is no checkpoint: neither safetensors nor",
        ),
    ):
        ran = tersor_command("predict", *arguments)
        assert ran.status == 2
        assert said in ran.err
        assert ran.err.count("\n") == 1


def test_patterns_match_and_doubles_count_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.txt"):
        (tmp_path / name).touch()
    found = input_files([str(tmp_path / "*.png"), str(tmp_path / "a.png")], frozenset({".png"}))
    assert [path.name for path in found] == ["a.png", "b.png"]


def test_every_task_has_an_objective_and_an_unknown_one_lists_them() -> None:
    for name in tasks():
        assert task_named(name).objective
    with pytest.raises(TersorError, match="'smell' yet, only on act, classify"):
        task_named("smell")
