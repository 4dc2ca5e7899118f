from __future__ import annotations

import csv
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from train.run_toy import MODEL, toy, waves

import tersor.models
from tersor.errors import TersorError
from tersor.train.config import TrainConfig, learning_rate
from tersor.train.objectives import forecasting
from tersor.train.trainer import train, validate

SCRIPT = Path(__file__).with_name("run_toy.py")
EVERYTHING: dict[str, Any] = {
    "max_steps": 13,
    "accumulate": 2,
    "warmup_steps": 4,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "ema": 0.9,
    "validate_every": 5,
    "save_every": 3,
}


def run_toy(launcher: list[str], out: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    said = [f"{name}={value}" for name, value in settings.items()]
    return subprocess.run([sys.executable, *launcher, str(SCRIPT), str(out), *said], capture_output=True, text=True)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    states = [torch.load(out / "last.pt", weights_only=True) for out in (a, b)]
    assert states[0]["run"] == states[1]["run"]
    for part in ("model", "averaged"):
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), name
    steps = [[(row["step"], row["lr"], row["validation"]) for row in rows(out)] for out in (a, b)]
    assert steps[0] == steps[1]


def test_learns_waves(tmp_path: Path) -> None:
    result = toy(tmp_path, epochs=10, ema=0.9, warmup_steps=10, max_grad_norm=1.0)
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert result.validation["loss"] < 0.2  # the waves' variance is 0.5, their noise's 0.01
    assert losses[-1] < losses[0] / 4
    model = tersor.models.load("itransformer", tmp_path / "model.safetensors", **MODEL)
    assert validate(model, waves(80, 1), forecasting) == pytest.approx(result.validation)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    toy(tmp_path / "whole", **EVERYTHING)
    killed = run_toy([], tmp_path / "killed", kill_at=8, **EVERYTHING)  # between two checkpoints, within an epoch
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [int(row["step"]) for row in rows(tmp_path / "killed")][-1] == 7
    toy(tmp_path / "killed", **EVERYTHING)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = toy(tmp_path, max_steps=3)
    before = (tmp_path / "last.pt").stat().st_mtime_ns
    assert toy(tmp_path, max_steps=3) == first
    assert (tmp_path / "last.pt").stat().st_mtime_ns == before


def test_a_run_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    toy(tmp_path, max_steps=3)
    with pytest.raises(TersorError, match=r"a run with lr 0\.003, now it is 0\.001"):
        toy(tmp_path, max_steps=3, lr=0.001)
    with pytest.raises(TersorError, match=r"dropout=0\.1.*dropout=0\.2"):
        toy(tmp_path, max_steps=3, dropout=0.2)
    (tmp_path / "last.pt").unlink()
    with pytest.raises(TersorError, match="a model that no training left there"):
        toy(tmp_path, max_steps=3)


def test_a_run_that_fails_in_its_first_step_does_not_block_its_folder(tmp_path: Path) -> None:
    def failing(model: nn.Module, batch: Any) -> Any:
        raise RuntimeError("out of memory")

    model, config = tersor.models.create("itransformer", **MODEL), TrainConfig(max_steps=2, batch_size=8, device="cpu")
    with pytest.raises(RuntimeError):
        train(model, waves(), objective=failing, out=tmp_path, config=config)  # type: ignore[arg-type]
    smaller = replace(config, batch_size=4)
    assert train(model, waves(), objective=forecasting, out=tmp_path, config=smaller).steps == 2


def test_accumulated_parts_are_one_batch(tmp_path: Path) -> None:
    for parts in (1, 4):
        toy(tmp_path / str(parts), max_steps=5, accumulate=parts, dropout=0.0)
    assert_close(tmp_path / "1", tmp_path / "4")


@pytest.mark.slow
def test_two_devices_train_as_one_does(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "accumulate": 2, "dropout": 0.0, "validate_every": 3, "save_every": 2}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = run_toy(launcher, tmp_path / "two", **settings)
    assert result.returncode == 0, result.stderr
    toy(tmp_path / "one", **settings)  # type: ignore[arg-type]
    assert_close(tmp_path / "one", tmp_path / "two")
    losses = [[float(row["loss"]) for row in rows(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def assert_close(a: Path, b: Path) -> None:
    first, second = (load_file(out / "model.safetensors") for out in (a, b))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_stops_early_and_keeps_the_best(tmp_path: Path) -> None:
    result = toy(tmp_path, epochs=50, validate_every=1, patience=2, lr=0.5)  # far too fast: it soon gets worse
    assert result.steps == result.best_step + 2
    scores = [float(row["validation"]) for row in rows(tmp_path)]
    assert min(scores) == pytest.approx(result.validation["loss"], rel=1e-5)
    assert toy(tmp_path, epochs=50, validate_every=1, patience=2, lr=0.5) == result


def test_says_when_the_loss_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match=r"the loss is (nan|inf) at step \d+"):
        toy(tmp_path, epochs=5, lr=1e30)


def test_trains_in_bfloat16(tmp_path: Path) -> None:
    assert toy(tmp_path, epochs=6, dtype="bfloat16").validation["loss"] < 0.5
    assert load_file(tmp_path / "model.safetensors")["projector.weight"].dtype == torch.float32


def test_runs_without_validation_and_keeps_the_last_weights(tmp_path: Path) -> None:
    model = tersor.models.create("itransformer", **MODEL)
    config = TrainConfig(max_steps=3, device="cpu")
    result = train(model, waves(), objective=forecasting, out=tmp_path, config=config)
    assert (result.steps, result.best_step, result.validation) == (3, 3, {})
    with pytest.raises(TersorError, match="patience 2 needs validation data"):
        train(model, waves(), objective=forecasting, out=tmp_path / "new", config=replace(config, patience=2))


def test_an_epoch_takes_every_sample_once(tmp_path: Path) -> None:
    class Numbers:
        epochs: list[int] = []  # noqa: RUF012
        seen: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            self.seen.append(index)
            return {"input": torch.ones(1), "target": torch.ones(1)}

    data = Numbers()
    config = TrainConfig(epochs=2, batch_size=5, device="cpu")
    train(nn.Linear(1, 1), data, objective=forecasting, out=tmp_path, config=config)
    assert sorted(data.seen[:10]) == sorted(data.seen[10:]) == list(range(10))
    assert data.seen[:10] != data.seen[10:]
    assert data.epochs == [0, 1]


def test_schedules() -> None:
    def rates(**settings: Any) -> list[float]:
        config = TrainConfig(lr=1.0, **settings)
        return [learning_rate(step, 8, 2, config) for step in range(8)]

    assert rates(lr_schedule="halving") == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    assert rates(lr_schedule="constant", warmup_steps=2) == [0.5, 1, 1, 1, 1, 1, 1, 1]
    cosine = rates(warmup_steps=4, min_lr=0.2)
    assert cosine[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert cosine[6] == pytest.approx(0.6)
    assert cosine == sorted(cosine[:5]) + sorted(cosine[5:], reverse=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": 0.0}, "lr is 0.0, it must be positive"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0, it must not be negative"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"lr_schedule": "linear"}, "not 'linear'"),
        ({"dtype": "int8"}, "not 'int8'"),
        ({"batch_size": 15, "accumulate": 2}, "a batch of 15 cannot be shared by 1 x 2 parts"),
        ({"batch_size": 512}, "have 265 samples, less than one batch of 512"),
        ({"device": "gpu"}, "'gpu' is no device"),
    ],
)
def test_says_which_setting_cannot_be(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(TersorError) as error:
        toy(tmp_path, **settings)
    assert said in str(error.value)
