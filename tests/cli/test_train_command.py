from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tersor.models
from tersor.cli.main import main

SMALL = ["--set", "model.d_model=8", "--set", "model.d_ff=8", "--set", "model.n_heads=2", "--set", "model.seq_len=8"]
QUICK = ["--max-steps", "3", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture
def series(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).standard_normal((200, 2)).cumsum(0)
    np.savetxt(tmp_path / "x.csv", rows, delimiter=",")
    return tmp_path / "x.csv"


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("tersor: ")
    assert error.count("\n") == 1
    return error


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments])
    assert stopped.value.code == 0


def test_trains_a_forecaster_that_loads_again(tmp_path: Path, series: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    run("itransformer", "--data", str(series), "--out", str(out), *SMALL, "--set", "model.pred_len=4", *QUICK, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 3
    assert told["validation"].keys() == told["test"].keys() == {"loss", "mae"}
    described = json.loads((out / "config.json").read_text())
    model = tersor.models.load(described.pop("tersor_model"), out / "model.safetensors", **described)
    assert model(torch.zeros(1, 8, 2)).shape == (1, 4, 2)


def test_a_table_with_gaps_names_what_training_takes(
    tmp_path: Path, series: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = series.read_text().splitlines()
    series.write_text("\n".join(["a,b", *lines[:50], "2.5,", *lines[51:]]) + "\n")
    same = ["itransformer", "--data", str(series), "--out", str(tmp_path / "run"), *SMALL, "--set", "model.pred_len=4"]
    assert "--set data.fill=previous|linear|zero says how to fill them" in failure(capsys, *same, *QUICK)
    assert not (tmp_path / "run").exists()
    run(*same, *QUICK, "--set", "data.fill=linear")


def test_a_folder_of_the_architecture_s_name_changes_nothing(
    tmp_path: Path, series: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    same = ["itransformer", "--data", str(series), "--out", "itransformer", *SMALL, "--set", "model.pred_len=4"]
    run(*same, *QUICK, "--json")
    run(*same, *QUICK, "--json")  # goes on, and does not take the folder for the model
    assert "is built already" in failure(capsys, "./itransformer", *same[1:], *QUICK)


def test_a_config_file_is_overruled_by_set_and_set_by_options(
    tmp_path: Path, series: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[model]\npred_len = 2\n[train]\nmax_steps = 1\nbatch_size = 8\nlr = 0.5\n")
    run(
        *("itransformer", "--data", str(series), "--out", str(tmp_path / "run"), "--config", str(config), *SMALL),
        *("--set", "model.pred_len=6", "--set", "train.lr=0.25", "--lr", "0.125", "--device", "cpu"),
    )
    told = capsys.readouterr()
    assert "1 steps" in told.out
    with (tmp_path / "run" / "log.csv").open(newline="") as log:
        loss = float(next(csv.DictReader(log))["loss"])
    assert f"training loss: {loss:.4f}, the mean of the last 1 steps" in told.out
    assert told.err == f"epoch 1, loss {loss:.4g}, 1 of 1\n"
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["settings"]["lr"] == 0.125
    assert state["settings"]["batch_size"] == 8
    assert state["model"]["projector.bias"].shape == (6,)


def test_trains_a_classifier(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for n in range(4):
            pixels = np.random.default_rng(n).integers(0, 255, (64, 64, 3), np.uint8)
            pillow.fromarray(pixels).save(tmp_path / "images" / name / f"{n}.png")
    images = str(tmp_path / "images")
    run(
        *("shvit", "--data", images, "--validation", images, "--out", str(tmp_path / "run"), *QUICK),
        *("--set", "model.embed_dim=[16,24,32]", "--set", "model.partial_dim=[4,5,7]", "--set", "model.num_classes=2"),
        *("--set", "data.size=64", "--set", "data.augment=true"),
    )
    assert (tmp_path / "run" / "config.json").exists()
    sheet = pillow.open(tmp_path / "run" / "samples.png")
    assert sheet.size == (3 * 200 + 8, 8 * 200 + 24)  # eight samples: input, truth, prediction
    tiles = np.asarray(sheet).astype(int)
    for row, (name, n) in enumerate((name, n) for name in "ab" for n in range(4)):
        seen = tiles[24 + 200 * row : 216 + 200 * row : 3, 8:200:3]
        assert abs(seen - np.asarray(pillow.open(tmp_path / "images" / name / f"{n}.png"))).max() <= 1
    truth = tiles[24:, 208:400]
    assert [(part != 255).any() for part in np.split(truth, 8)] == [True] * 8
    assert np.array_equal(truth[:200], truth[200:400])  # the same class
    assert not np.array_equal(truth[:200], truth[800:1000])


def test_tensorboard_gets_what_the_log_says(tmp_path: Path, series: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    usual = ["itransformer", "--data", str(series), "--out", str(tmp_path / "run"), *SMALL, "--set", "model.pred_len=4"]
    run(*usual, *QUICK, "--log-every", "1", "--tensorboard")
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    found: dict[str, list[float]] = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            found.setdefault(value.tag, []).append(value.tensor.float_val[0])
    with (tmp_path / "run" / "log.csv").open(newline="") as log:
        rows = list(csv.DictReader(log))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert found["loss"] == pytest.approx([float(row["loss"]) for row in rows])
    assert found["validation"] == pytest.approx([float(rows[-1]["validation"])])


def test_without_the_package_tensorboard_is_refused(
    tmp_path: Path, series: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    usual = ["itransformer", "--data", str(series), "--out", str(tmp_path / "run"), *SMALL, "--set", "model.pred_len=4"]
    assert "pip install 'tersor[tensorboard]'" in failure(capsys, *usual, *QUICK, "--tensorboard")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "model.d_modle=8"], "no option 'd_modle'; did you mean 'd_model'?"),
        (["--set", "model.d_model=wide"], "d_model"),
        (["--set", "data.split=thirds"], "not 'thirds'"),
        (["--set", "data.marks=3"], "data.marks is 3, a value such as 'hours' is expected"),
        (["--set", "train.lr=fast"], "train.lr is 'fast', a value such as 0.0001 is expected"),
        (["--set", "lr=1"], "SECTION.NAME=VALUE is expected"),
        (["--set", "optimizer.lr=1"], "no table 'optimizer'"),
        (["--config", "missing.toml"], "there is no file or folder missing.toml for --config"),
        (["--validation", __file__], "a validation part of its own"),
        (["--lr-schedule", "linear"], "not 'linear'"),
    ],
)
def test_says_in_one_line_what_is_wrong(
    tmp_path: Path, series: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    usual = ["itransformer", "--data", str(series), "--out", str(tmp_path / "run"), *QUICK]
    assert said in failure(capsys, *usual, *arguments)


def test_says_when_a_file_is_no_config(tmp_path: Path, series: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = ["itransformer", "--data", str(series), "--out", str(tmp_path / "run")]
    for name, text in (("x.toml", "[model"), ("x.json", "{"), ("y.json", "[1]"), ("z.json", '{"model": 1}')):
        (tmp_path / name).write_text(text)
        assert name in failure(capsys, *usual, "--config", str(tmp_path / name))
