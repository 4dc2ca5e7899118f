from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from tersor.data.series import SeriesConfig, SingleVariates, load_series, read_table
from tersor.data.time_grid import time_marks
from tersor.errors import TersorError

SHORT = SeriesConfig(seq_len=4, pred_len=2)


def write(path: Path, rows: int, *, header: bool = True, dates: bool = True) -> Path:
    days = np.datetime64("2020-01-01T00:00:00") + np.arange(rows).astype("timedelta64[h]")
    lines = ["date,a,b"[0 if dates else 5 :]] if header else []
    for n in range(rows):
        lines.append((f"{days[n]}," if dates else "") + f"{n},{-2 * n + 1}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_windows_hold_what_follows_as_target(tmp_path: Path) -> None:
    parts = load_series(write(tmp_path / "x.csv", 100), SHORT)
    window, last = parts.train[3], parts.train[len(parts.train) - 1]
    rows = torch.arange(3, 9)[:, None] * torch.tensor([1, -2]) + torch.tensor([0, 1])
    scaled = ((rows - parts.mean) / parts.std).float()
    torch.testing.assert_close(window["x_enc"], scaled[:4])
    torch.testing.assert_close(window["target"], scaled[4:])
    assert window["x_mark_enc"].shape == (4, 4)
    assert last["target"][-1, 0] * parts.std[0] + parts.mean[0] == pytest.approx(69)  # 70 % of 100 rows
    with pytest.raises(IndexError):
        parts.train[len(parts.train)]


def test_scale_is_of_the_training_part_alone(tmp_path: Path) -> None:
    parts = load_series(write(tmp_path / "x.csv", 100), SHORT)
    assert parts.mean.tolist() == pytest.approx([np.arange(70).mean(), 1 - 2 * np.arange(70).mean()])
    assert parts.std.tolist() == pytest.approx([np.arange(70).std(), 2 * np.arange(70).std()])


def test_later_parts_look_back_into_the_part_before(tmp_path: Path) -> None:
    parts = load_series(write(tmp_path / "x.csv", 100), SHORT)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [65, 9, 19]
    for part, first in ((parts.validation, 70), (parts.test, 80)):
        assert part[0]["target"][0, 0] * parts.std[0] + parts.mean[0] == pytest.approx(first)


def test_ett_split_counts_months_of_thirty_days(tmp_path: Path) -> None:
    parts = load_series(write(tmp_path / "x.csv", 14_400 + 50), SeriesConfig(split="ett"))
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [8449, 2785, 2785]


def test_marks_are_those_of_the_papers() -> None:
    times = np.array(["2016-07-01T00:00:00", "2016-12-31T23:45:00", "2017-01-01T12:00:00"], "datetime64[s]")
    friday, saturday, sunday = 4 / 6 - 0.5, 5 / 6 - 0.5, 0.5
    hours = [
        [-0.5, friday, -0.5, 182 / 365 - 0.5],
        [0.5, saturday, 0.5, 0.5],
        [12 / 23 - 0.5, sunday, -0.5, -0.5],
    ]
    np.testing.assert_allclose(time_marks(times), hours, atol=1e-6)
    np.testing.assert_allclose(time_marks(times, "minutes")[:, 0], [-0.5, 45 / 59 - 0.5, -0.5], atol=1e-6)


def test_a_file_without_dates_has_marks_where_a_start_is_given(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", 100, header=False, dates=False)
    assert "x_mark_enc" not in load_series(path, SHORT).train[0]
    dated = SeriesConfig(seq_len=4, pred_len=2, start="2020-01-01", step_hours=24)
    marks = load_series(path, dated).train[0]["x_mark_enc"]
    torch.testing.assert_close(marks[:, 2], torch.arange(4) / 30 - 0.5)
    without = SeriesConfig(seq_len=4, pred_len=2, start="2020-01-01", marks="none")
    assert "x_mark_enc" not in load_series(path, without).train[0]


def test_reads_gzip_and_slashed_dates(tmp_path: Path) -> None:
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(b"date,a\n1990/1/1 0:00,1\n1990/1/2 0:00,2.5\n"))
    table = read_table(path)
    assert table.names == ("a",)
    assert table.values.tolist() == [[1], [2.5]]
    assert table.times is not None
    assert table.times[1] == np.datetime64("1990-01-02")


def test_a_variate_that_never_moves_stays_zero(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("\n".join(f"{n},7" for n in range(100)))
    assert load_series(path, SHORT).train[0]["x_enc"][:, 1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("date,a\n2020-01-01,1\n2020-01-02,x\n2020-01-03,3\n", "row 3: a is 'x', not a number"),
        ("1,2\n3\n", "row 2: 1 columns, 2 in the first row"),
        ("date,a\n", "0 rows"),
        ("date,a\n2020-01-01,1\n2020-13-01,2\n", "'2020-13-01' is not a date"),
        ("1\n2\n3\n4\n5\n", "too few for look-back"),
    ],
)
def test_says_what_does_not_fit(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(TersorError, match=r"x\.csv") as error:
        load_series(path, SHORT)
    assert said in str(error.value)


def test_ett_split_refuses_a_short_file(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="needs 14400 rows"):
        load_series(write(tmp_path / "x.csv", 500), SeriesConfig(split="ett"))


def test_etth1_is_cut_and_scaled_as_published(data: Path) -> None:
    parts = load_series(data / "ett" / "ETTh1.csv.gz")
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [8449, 2785, 2785]
    mean = [7.93774, 2.02104, 5.07977, 0.74619, 2.78176, 0.78845, 17.12826]
    std = [5.81275, 2.09010, 5.51879, 1.92638, 1.02352, 0.63024, 9.17649]
    assert parts.mean.tolist() == pytest.approx(mean, abs=1e-5)
    assert parts.std.tolist() == pytest.approx(std, abs=1e-5)


def test_exchange_is_cut_as_published(data: Path) -> None:
    parts = load_series(data / "exchange" / "exchange_rate.txt.gz")
    rows = [len(part.values) for part in (parts.train, parts.validation, parts.test)]
    assert rows == [5311, 760 + 96, 1517 + 96]


def test_a_decoder_is_given_the_end_of_the_look_back_and_the_marks_of_the_horizon(tmp_path: Path) -> None:
    parts = load_series(write(tmp_path / "x.csv", 100), SeriesConfig(seq_len=4, pred_len=2, label_len=3))
    window, later = parts.train[5], parts.train[7]
    assert torch.equal(window["x_dec"], torch.cat((window["x_enc"][1:], torch.zeros(2, 2))))
    assert torch.equal(window["x_mark_dec"][:3], window["x_mark_enc"][1:])
    assert torch.equal(window["x_mark_dec"][3:], later["x_mark_enc"][2:])
    with pytest.raises(TersorError, match="label_len of a series is 5, it must be from 0 to seq_len 4"):
        SeriesConfig(seq_len=4, pred_len=2, label_len=5)


def test_single_variates_are_each_window_once_a_variate(tmp_path: Path) -> None:
    windows = load_series(write(tmp_path / "x.csv", 100), SHORT).train
    single = SingleVariates(windows)
    assert len(single) == 2 * len(windows)
    assert torch.equal(single[7]["x_enc"], windows[3]["x_enc"][:, 1:])
    assert torch.equal(single[6]["target"], windows[3]["target"][:, :1])
    assert torch.equal(single[7]["x_mark_enc"], windows[3]["x_mark_enc"])
