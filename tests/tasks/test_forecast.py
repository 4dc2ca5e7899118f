"""`tersor train`, `forecast` and `backtest` on a table of one's own, with every registered forecaster."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran
from torch import Tensor

import tersor
import tersor.models
from tersor.data.series_memory import Memory, remember, scaled
from tersor.data.tables import TableConfig, read_series
from tersor.errors import TersorError
from tersor.evaluate.conformal import coverage, interval_radii, windows_needed
from tersor.evaluate.yardsticks import fit_ridge, repeat_last, ridge, seasonal_naive
from tersor.models.registry import ModelInfo
from tersor.tasks import task_named
from tersor.tasks.backtest import backtest
from tersor.tasks.forecast_table import forecast_series, open_model
from tersor.tasks.forecaster import Forecaster, marks_for, model_forecaster
from tersor.tasks.origins import held_out_origins

Command = Callable[..., Ran]
FORECASTERS = {info.system: info for info in reversed(tersor.models.list("forecast"))}
QUICK = ["--max-steps", "2", "--batch-size", "8", "--device", "cpu"]


def table(path: Path, rows: int = 400, columns: str = "ab", *, noise: float = 0.3, seed: int = 0) -> Path:
    """Hourly waves of a day with some noise."""
    draw = np.random.default_rng(seed)
    hours = np.arange(rows)
    stamps = np.datetime64("2024-01-01T00", "h") + hours
    values = [10 * n + np.sin(2 * np.pi * hours / 24 + n) + draw.normal(0, noise, rows) for n in range(len(columns))]
    lines = [
        f"{stamp},{','.join(f'{v:.6f}' for v in row)}"
        for stamp, row in zip(stamps, zip(*values, strict=True), strict=True)
    ]
    path.write_text("\n".join([f"date,{','.join(columns)}", *lines]) + "\n")
    return path


def small(info: ModelInfo, columns: int) -> dict[str, object]:
    """The overrides of a tiny model for so many columns."""
    return {**info.small, **({"enc_in": columns} if "enc_in" in info.small else {})}


def settings(values: dict[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"model.{name}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small iTransformer that was trained on hourly waves, and its table."""
    from tersor.cli.main import main

    folder = tmp_path_factory.mktemp("trained")
    data = table(folder / "waves.csv")
    sizes = {"seq_len": 24, "pred_len": 12, "d_model": 16, "d_ff": 16, "n_heads": 2, "e_layers": 1}
    training = ["--epochs", "6", "--lr", "3e-3", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(["train", "itransformer", "--data", str(data), "--out", str(folder / "run"), *settings(sizes), *training])
    assert ended.value.code == 0
    return folder / "run", data


@pytest.mark.parametrize("system", FORECASTERS)
def test_every_forecaster_is_trained_and_forecasts_with_nothing_else(
    system: str, tmp_path: Path, tersor_command: Command
) -> None:
    data = table(tmp_path / "x.csv", 250)
    run, out = tmp_path / "run", tmp_path / "next.csv"
    ended = tersor_command(
        "train", system, "--data", data, "--out", run, *settings(small(FORECASTERS[system], 2)), *QUICK, "--json"
    )
    assert ended.status == 0, ended.err
    horizon = 30  # beyond what each was trained for
    ended = tersor_command("forecast", run, "--data", data, "--horizon", horizon, "--interval", "80", "--out", out)
    assert ended.status == 0, ended.err
    assert f"the horizon {horizon} is beyond the trained" in ended.err
    assert "80 % held" in ended.out
    rows = list(csv.DictReader(out.open()))
    assert [row["date"] for row in rows[:2]] == ["2024-01-11 10:00:00", "2024-01-11 11:00:00"]
    assert len(rows) == horizon
    assert list(rows[0]) == ["date", "a", "a-lo-80", "a-hi-80", "b", "b-lo-80", "b-hi-80"]
    again = tersor_command("forecast", run, "--data", data, "--horizon", horizon, "--interval", "80", "--json")
    assert json.loads(again.out)["forecast"][3]["a"] == pytest.approx(float(rows[3]["a"]), rel=1e-5)
    assert tersor_command("backtest", run, "--data", data, "--horizon", 6, "--windows", 3).status == 0


def test_forecasts_are_the_models_own_in_the_tables_units(trained: tuple[Path, Path]) -> None:
    run, data = trained
    model = tersor.load(run, device="cpu")
    found = read_series(data)
    made = forecast_series(open_model(run, device="cpu"), found, horizon=12, interval=())
    learned = found.values[0][:280]  # 70 % of 400 rows
    mean, std = learned.mean(0), learned.std(0)
    x = torch.from_numpy(((found.values[0][-24:] - mean) / std).astype(np.float32))[None]
    from tersor.data.time_grid import time_marks

    with torch.no_grad():
        expected = model(x_enc=x, x_mark_enc=torch.from_numpy(time_marks(found.times[0][-24:]))[None])[0].numpy()
    np.testing.assert_allclose(made.values[0], expected * std + mean, atol=1e-4)
    assert (made.levels, made.coverage()) == ((), {})


def test_a_longer_horizon_is_rolled_with_the_marks_of_its_own_rows(trained: tuple[Path, Path]) -> None:
    run, data = trained
    opened = open_model(run, device="cpu")
    assert isinstance(opened, Forecaster)
    found = read_series(data)
    once = forecast_series(opened, found, horizon=12, interval=())
    twice = forecast_series(opened, found, horizon=20, interval=())
    np.testing.assert_allclose(twice.values[0][:12], once.values[0], atol=1e-5)
    from dataclasses import replace

    longer = replace(
        found,
        values=(np.concatenate((found.values[0], once.values[0])),),
        times=(np.concatenate((found.times[0], once.times[0])),),
    )
    after = forecast_series(opened, longer, horizon=12, interval=())
    np.testing.assert_allclose(twice.values[0][12:], after.values[0][:8], atol=1e-4)
    assert any("rolled" in note for note in twice.notes)
    assert not any("rolled" in note for note in once.notes)


def test_a_quantized_run_forecasts_too(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = trained
    model = tersor.load(run, device="cpu")
    result = tersor.compress(model, tersor.GPTQ(bits=8, group_size=-1), calibration=[model.example_inputs(8)])
    result.save(tmp_path / "small")
    (tmp_path / "small" / "preprocessor_config.json").write_bytes((run / "preprocessor_config.json").read_bytes())
    made = [
        forecast_series(open_model(path, device="cpu"), read_series(data), horizon=12, interval=())
        for path in (run, tmp_path / "small")
    ]
    np.testing.assert_allclose(made[0].values[0], made[1].values[0], atol=0.05)
    assert not np.array_equal(made[0].values[0], made[1].values[0])


def test_pandas_in_pandas_out(trained: tuple[Path, Path]) -> None:
    pandas = pytest.importorskip("pandas")
    run, data = trained
    frame = pandas.read_csv(data, parse_dates=["date"])
    later = tersor.forecast(run, frame, horizon=12, interval=(90,), device="cpu")
    assert list(later.columns) == ["date", "a", "a-lo-90", "a-hi-90", "b", "b-lo-90", "b-hi-90"]
    assert later["date"].iloc[0] == pandas.Timestamp("2024-01-17 16:00")
    assert 0.8 < later.attrs["coverage"]["90"] < 1
    by_file = forecast_series(open_model(run, device="cpu"), read_series(data), horizon=12, interval=())
    np.testing.assert_allclose(later["a"], by_file.values[0][:, 0], atol=1e-6)
    assert ((later["a-lo-90"] < later["a"]) & (later["a"] < later["a-hi-90"])).all()
    shuffled = frame.sample(frac=1, random_state=0)[["b", "date", "a"]]
    again = tersor.forecast(run, shuffled.assign(c=1.0), horizon=12, interval=(), device="cpu")
    np.testing.assert_allclose(again["a"], later["a"], atol=1e-6)


def test_polars_in_polars_out(trained: tuple[Path, Path]) -> None:
    polars = pytest.importorskip("polars")
    run, data = trained
    frame = polars.read_csv(data, try_parse_dates=False)
    later = tersor.forecast(run, frame, horizon=12, interval=(), device="cpu")
    assert isinstance(later, polars.DataFrame)
    assert later.shape == (12, 3)


def test_draws_a_picture_that_says_the_measured_coverage(
    trained: tuple[Path, Path], tmp_path: Path, tersor_command: Command
) -> None:
    pytest.importorskip("matplotlib")
    run, data = trained
    pictures = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for picture in pictures:
        ended = tersor_command("forecast", run, "--data", data, "--horizon", 12, "--plot", picture)
        assert ended.status == 0, ended.err
        assert "80 % held" in ended.err
        assert [len(row) for row in csv.reader(ended.out.splitlines())] == [11] * 13  # the table and nothing else
    drawn = pictures[0].read_text()
    assert pictures[1].read_text() == drawn
    assert "held" in drawn
    assert "95 %" in drawn
    ended = tersor_command("forecast", run, "--data", data, "--horizon", 12, "--plot", tmp_path / "a.bmp")
    assert (ended.status, "pictures end in .png, .svg, .pdf" in ended.err) == (2, True)


def long_table(path: Path, sizes: dict[str, int]) -> Path:
    lines = ["unique_id,ds,y"]
    for n, (id, rows) in enumerate(sizes.items()):
        stamps = np.datetime64("2024-01-01T00", "h") + np.arange(rows)
        values = 10.0**n * (3 + np.sin(2 * np.pi * np.arange(rows) / 24))
        lines += [f"{id},{stamp},{value:.8g}" for stamp, value in zip(stamps, values, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_long_table_is_scaled_series_by_series(tmp_path: Path, tersor_command: Command) -> None:
    data = long_table(tmp_path / "x.csv", {"low": 300, "high": 260, "brief": 20})
    sizes = {"seq_len": 24, "pred_len": 12, "d_model": 16, "d_ff": 16, "n_heads": 2, "e_layers": 1}
    run = tmp_path / "run"
    ended = tersor_command("train", "itransformer", "--data", data, "--out", run, *settings(sizes), *QUICK)
    assert ended.status == 0, ended.err
    remembered = json.loads((run / "preprocessor_config.json").read_text())
    assert set(remembered["series"]) == {"low", "high"}  # too short to learn from
    assert remembered["series"]["high"]["mean"][0] == pytest.approx(30, rel=0.02)
    ended = tersor_command("forecast", run, "--data", data, "--horizon", 5, "--json")
    assert "series brief has 20 rows, the look-back of run needs 24" in ended.err.replace(f"{data}: ", "")
    data = long_table(tmp_path / "y.csv", {"low": 300, "new": 260})
    ended = tersor_command("forecast", run, "--data", data, "--horizon", 5, "--json")
    found = json.loads(ended.out)
    assert [row["unique_id"] for row in found["forecast"]] == ["low"] * 5 + ["new"] * 5
    assert any("1 series were not trained on" in note and "(new)" in note for note in found["notes"])
    assert all(10 < row["y"] < 60 for row in found["forecast"][5:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("date,a,b", "date,a,c"), "was trained on the columns"),
        (lambda text: text.replace("date,a,b", "when,a,b"), "no column is named 'date'"),
        (lambda text: "\n".join(text.splitlines()[:20]) + "\n", "19 rows, the look-back of run needs 24"),
        (lambda text: "\n".join(text.splitlines()[:1] + text.splitlines()[1::2]), "learned from rows 1 h apart"),
        (lambda text: text.replace("00,10", "00,ten", 1).replace(",1", ",x", 1), "not a number"),
    ],
)
def test_says_in_one_line_why_a_table_does_not_fit(
    trained: tuple[Path, Path], tmp_path: Path, tersor_command: Command, change: Callable[[str], str], said: str
) -> None:
    run, data = trained
    (tmp_path / "x.csv").write_text(change(data.read_text()))
    ended = tersor_command("forecast", run, "--data", tmp_path / "x.csv", "--horizon", 12)
    if "columns" in said:
        said = "no column is named 'b'"
    assert ended.status == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["itransformer"], "is an architecture, which knows nothing yet: `tersor train itransformer"),
        (["gpt4battery"], "gpt4battery is a model for the task 'regress', not to forecast"),
        (["demo"], "demo is no forecaster"),
        (["rigde"], "no model at rigde; did you mean the yardstick ridge?"),
        (["ridge", "--interval", "80,100"], "an interval of 100 % is none"),
        (["ridge", "--interval", "high"], "levels such as 80,95 are expected"),
        (["ridge", "--interval", "99.9"], "an interval of 99.9 % needs 999 windows"),
        (["repeat-last", "--season", "7"], "--season 7 is for seasonal-naive and ridge"),
        (["ridge", "--out", "x.xlsx"], "a forecast is written as .csv or .parquet"),
        (["ridge", "--out", "DATA"], "is the file that is read; give another name"),
        (["ridge", "--target", "z"], "no column is named 'z'; there are date, a, b"),
        (["ridge", "--fill", "backwards"], "not 'backwards'"),
    ],
)
def test_says_in_one_line_what_is_wrong(
    tmp_path: Path, tersor_command: Command, arguments: list[str], said: str
) -> None:
    data = table(tmp_path / "x.csv")
    arguments = [str(data) if each == "DATA" else each for each in arguments]
    ended = tersor_command("forecast", *arguments, "--data", data, "--horizon", 12)
    assert ended.status == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_earlier_results_are_replaced_only_when_asked(tmp_path: Path, tersor_command: Command) -> None:
    data, out, plot = table(tmp_path / "x.csv"), tmp_path / "next.csv", tmp_path / "next.svg"
    command = ("forecast", "ridge", "--data", data, "--horizon", 3, "--interval", "none")
    out.write_text("an earlier forecast")
    plot.write_text("an earlier picture")
    for option, file in (("--out", out), ("--plot", plot)):
        ended = tersor_command(*command, option, file)
        assert ended.status == 2
        assert ended.err == f"tersor: {option} {file} exists; give another name, or --overwrite to replace it\n"
        assert file.read_text().startswith("an earlier")
    ended = tersor_command(*command, "--out", out, "--plot", plot, "--overwrite")
    assert ended.status == 0, ended.err
    assert len(out.read_text().splitlines()) == 4
    assert "<svg" in plot.read_text()
    assert "give one of them" in tersor_command(*command, "--overwrite").err


def test_a_damaged_memory_is_told(trained: tuple[Path, Path], tmp_path: Path, tersor_command: Command) -> None:
    import shutil

    run, data = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "preprocessor_config.json"
    said = json.loads(file.read_text())
    for name, value in (
        ("mean", [1.0]),
        ("std", [0.0, 1.0]),
        ("marks", "odd"),
        ("step", {"count": -1}),
        ("columns", 3),
    ):
        file.write_text(json.dumps({**said, name: value}))
        ended = tersor_command("forecast", copy, "--data", data, "--horizon", 12)
        assert (ended.status, ended.err.count("\n")) == (2, 1), name
        assert "does not say how the model's series are scaled" in ended.err


def test_models_that_give_no_forecast_say_why() -> None:
    informer = tersor.models.create("informer", **{**FORECASTERS["informer"].small, "c_out": 1})
    with pytest.raises(tersor.TersorError, match="takes 3 columns and has c_out 1"):
        model_forecaster(informer)
    drawing = tersor.models.create("itransformer", **{**FORECASTERS["itransformer"].small, "output_attention": True})
    with pytest.raises(tersor.TersorError, match="gives 2 results, a forecast is one"):
        forecast_series(model_forecaster(drawing), _waves(200), horizon=3)
    with pytest.raises(tersor.TersorError, match="no marks are made for freq 'a'"):
        marks_for(tersor.models.create("autoformer", **FORECASTERS["autoformer"].small, freq="a").config)  # type: ignore[arg-type]
    for freq, kind in (("h", "hours"), ("t", "minutes"), ("w", "weeks"), ("m", "months")):
        config = tersor.models.create("autoformer", **FORECASTERS["autoformer"].small, freq=freq).config  # type: ignore[arg-type]
        assert marks_for(config) == kind
    assert marks_for(tersor.models.create("informer", **FORECASTERS["informer"].small).config) == "calendar"


def _waves(rows: int, noise: float = 0.0) -> tersor.data.tables.SeriesTable:  # type: ignore[name-defined]
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return read_series(table(Path(folder) / "x.csv", rows, noise=noise))


# ---- what it is compared with


def test_yardsticks_are_what_they_are_called() -> None:
    x = torch.arange(12.0).reshape(1, 6, 2)
    assert repeat_last(x, 3)[0, :, 0].tolist() == [10, 10, 10]
    assert seasonal_naive(x, 5, 2)[0, :, 0].tolist() == [8, 10, 8, 10, 8]
    t = torch.arange(300.0)
    line = torch.stack([0.5 * t, 3 - 2 * t], 1)  # a straight line goes on as it is
    weights = fit_ridge([line / 100], look_back=8, horizon=4)
    torch.testing.assert_close(ridge(line[None, :100] / 100, weights), line[None, 100:104] / 100, atol=5e-2, rtol=0)
    with pytest.raises(tersor.TersorError, match="no series has the 12 rows"):
        fit_ridge([line[:10]], look_back=8, horizon=4)


def test_ridge_is_that_of_the_benchmark() -> None:
    """Closed form by least squares with the penalty as further rows."""
    values = torch.randn(90, 2, generator=torch.Generator().manual_seed(0)).cumsum(0)
    whole = values.unfold(0, 10, 1).flatten(0, 1).double()
    whole = whole - whole[:, 5:6]
    X = torch.cat((whole[:, :6], 10**0.5 * torch.eye(6, dtype=torch.float64)))
    Y = torch.cat((whole[:, 6:], torch.zeros(6, 4, dtype=torch.float64)))
    expected = torch.linalg.lstsq(X, Y).solution.float()
    torch.testing.assert_close(fit_ridge([values], look_back=6, horizon=4), expected, atol=1e-5, rtol=1e-4)


def test_conformal_intervals_hold_what_they_promise() -> None:
    draw = torch.Generator().manual_seed(0)
    errors = torch.randn(400, 3, 2, generator=draw).abs()
    radii = interval_radii(errors[:200], (80, 95))
    assert radii.shape == (2, 3, 2)
    assert (errors[:200, 1, 1] <= radii[0, 1, 1]).sum() == 161  # ceil(201 * 0.8)
    low, high = coverage(errors[200:], radii)
    assert 0.76 < low < 0.86
    assert 0.92 < high < 0.99
    assert [windows_needed(level) for level in (50, 80, 90, 95, 99)] == [1, 4, 9, 19, 99]
    with pytest.raises(tersor.TersorError, match="95 % needs 19 windows to calibrate on, there are 18"):
        interval_radii(errors[:18], (95,))
    assert interval_radii(errors[:19], (95,)).shape == (1, 3, 2)


def test_windows_that_are_measured_on_share_no_row_with_those_calibrated_on() -> None:
    found = _waves(400)
    prepared = scaled(found, remember(found, [280], "none"))
    earlier, later = held_out_origins(prepared, 12, 24, [400], measure=True)
    assert min(row for _, row in earlier) == 280
    assert max(row for _, row in earlier) + 12 <= min(row for _, row in later)
    assert max(row for _, row in later) == 388
    assert abs(len(earlier) - len(later)) <= 1


def test_short_series_calibrate_for_each_other(tmp_path: Path) -> None:
    found = read_series(long_table(tmp_path / "x.csv", {f"s{n}": 40 for n in range(50)}))
    prepared = scaled(found, remember(found, [28] * 50, "none"))
    earlier, later = held_out_origins(prepared, 10, 12, [40] * 50, measure=True)
    assert {series for series, _ in earlier} == set(range(0, 50, 2))
    assert {series for series, _ in later} == set(range(1, 50, 2))
    assert {row for _, row in earlier} == {28, 29, 30}
    made = forecast_series("seasonal-naive", found, horizon=10, interval=(80,), season=24)
    assert made.intervals is not None
    assert (made.intervals.windows, made.intervals.held_out, made.intervals.coverage) == (75, 75, (1.0,))


def test_a_long_table_is_backtested_as_its_series_one_by_one(tmp_path: Path) -> None:
    data = long_table(tmp_path / "x.csv", {"low": 200, "high": 180})
    how: dict[str, Any] = {"horizon": 6, "windows": 4, "interval": (), "season": 5}
    whole = backtest("repeat-last", read_series(data), **how)
    alone = []
    for id in ("low", "high"):
        lines = data.read_text().splitlines()
        (tmp_path / "y.csv").write_text("\n".join([lines[0], *(line for line in lines if line.startswith(f"{id},"))]))
        alone.append(backtest("repeat-last", read_series(tmp_path / "y.csv"), **how))
    for measure in ("mse", "mae", "mase"):
        mean = np.mean([getattr(each.rows[0], measure) for each in alone])
        assert getattr(whole.rows[0], measure) == pytest.approx(mean, rel=1e-4)


def test_backtest_counts_as_by_hand(tmp_path: Path) -> None:
    found = _waves(300, noise=0.2)
    result = backtest("repeat-last", found, horizon=6, windows=4, interval=())
    values = found.values[0]
    scale = values[:210].mean(0), values[:210].std(0)
    z = (values - scale[0]) / scale[1]
    errors = np.concatenate([z[start : start + 6] - z[start - 1] for start in (276, 282, 288, 294)])
    naive = np.abs(z[24:276] - z[:252]).mean(0)
    row = result.rows[0]
    assert (row.name, row.yardstick, result.season) == ("repeat-last", True, 24)
    assert row.mse == pytest.approx((errors**2).mean(), rel=1e-5)
    assert row.mae == pytest.approx(np.abs(errors).mean(), rel=1e-5)
    assert row.mase == pytest.approx((np.abs(errors).mean(0) / naive).mean(), rel=1e-4)


def test_backtest_marks_the_winner_even_where_it_is_a_yardstick(
    trained: tuple[Path, Path], tersor_command: Command
) -> None:
    run, data = trained
    ended = tersor_command("backtest", run, "--data", data, "--horizon", 12, "--windows", 3)
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["run", "repeat-last", "seasonal-naive", "ridge"]
    told = json.loads(tersor_command("backtest", run, "--data", data, "--horizon", 12, "--windows", 3, "--json").out)
    best = min(told["rows"], key=lambda row: row["mse"])
    assert told["best"]["mse"] == best["name"]
    starred = [line.split()[0] for line in lines[2:6] if f"{best['mse']:.4f}*" in line]
    assert starred == [best["name"]]
    assert lines[-1].startswith(f"* least MSE: {best['name']}")
    assert (", a yardstick," in lines[-1]) == best["yardstick"]
    assert set(best["coverage"]) == {"80", "95"}


def test_backtest_says_when_the_model_has_seen_the_windows(trained: tuple[Path, Path], tersor_command: Command) -> None:
    run, data = trained
    ended = tersor_command("backtest", run, "--data", data, "--horizon", 12, "--windows", 12)
    assert "2 of 12 windows hold rows that the model was trained on" in ended.err
    assert "no coverage: an interval of 95 % needs 19 windows" in ended.err
    ended = tersor_command("backtest", run, "--data", data, "--horizon", 12, "--windows", 40)
    assert (ended.status, "40 windows of 12 need more than 480" in ended.err) == (2, True)


def test_a_memory_survives_json() -> None:
    found = _waves(100)
    memory = remember(found, [70], "hours")
    again = Memory.from_dict(json.loads(json.dumps(memory.as_dict())), of="x.json")
    assert again.scales[""].until == "2024-01-03 21:00:00"
    assert (again.step, again.columns, again.marks, again.time) == (found.step, ("a", "b"), "hours", "date")
    x: Tensor = scaled(found, again).values[0]
    torch.testing.assert_close(x[:70].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x[:70].std(0, correction=0), torch.ones(2), atol=1e-5, rtol=0)
    assert scaled(found, again).learned == (70,)


def test_early_stopping_is_on_for_series(trained: tuple[Path, Path]) -> None:
    state = torch.load(trained[0] / "last.pt", weights_only=True)
    assert state["settings"]["patience"] == 3


def test_constant_columns_and_unknown_seasons_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    draw = np.random.default_rng(0).normal(size=200).cumsum()
    path.write_text("a,b\n" + "\n".join(f"{value:.5f},7" for value in draw) + "\n")
    result = backtest("ridge", read_series(path, TableConfig()), horizon=5, windows=3)
    told = " | ".join(result.notes)
    assert "b never changes, it is always 7" in told
    assert "no season is known: --season ROWS" in told
    assert "left out of MASE" in told
    assert [row.name for row in result.rows] == ["ridge", "repeat-last"]


def test_lengths_that_the_model_is_not_built_for_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("\n".join(str(n % 7) for n in range(200)) + "\n")
    sizes = {"seq_len": 24, "pred_len": 12, "d_model": 16, "d_ff": 16, "n_heads": 2, "e_layers": 1}
    model = tersor.models.create("itransformer", **sizes)
    for name in ("seq_len", "pred_len"):
        with pytest.raises(TersorError, match=rf"data\.{name} is 7, .*--set model\.{name}=7 sets both"):
            task_named("forecast").load_data(model, tmp_path / "x.csv", None, {name: 7})
