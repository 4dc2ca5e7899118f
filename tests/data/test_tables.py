"""The user's own tables: what is found in them, what is refused in one line, what is filled."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest

from tersor.data.tables import SeriesTable, TableConfig, read_series, series_of_frame
from tersor.data.time_grid import Step, find_step, time_marks
from tersor.errors import TersorError

DAYS = [f"2024-01-{day:02}" for day in range(1, 11)]


def table(tmp_path: Path, text: str, **config: str) -> SeriesTable:
    path = tmp_path / "x.csv"
    path.write_text(text)
    return read_series(path, TableConfig(**config))


def wide(rows: list[str], head: str = "date,a,b") -> str:
    return "\n".join([head, *rows]) + "\n"


def test_a_wide_table_is_one_series_of_its_columns(tmp_path: Path) -> None:
    found = table(tmp_path, wide([f"{day},{n},{n * n}" for n, day in enumerate(DAYS)]))
    assert (found.names, found.ids, found.time_name, found.id_name) == (("a", "b"), ("",), "date", "")
    assert str(found.step) == "1 d"
    assert found.values[0].tolist() == [[n, n * n] for n in range(10)]
    assert found.times[0][-1] == np.datetime64("2024-01-10")
    assert found.notes == ()


def test_a_long_table_is_a_series_for_each_id_in_their_order(tmp_path: Path) -> None:
    rows = [f"{id},{day},{n}" for id, size in (("z", 10), ("a", 4)) for n, day in enumerate(DAYS[:size])]
    found = table(tmp_path, wide(rows[::-1], "unique_id,ds,y"))
    assert (found.names, found.ids, found.id_name) == (("y",), ("a", "z"), "unique_id")
    assert [len(values) for values in found.values] == [4, 10]
    assert found.rows == 4
    assert found.values[1][:, 0].tolist() == list(range(10))
    assert "order of time" in found.notes[0]


def test_columns_are_named_by_the_user(tmp_path: Path) -> None:
    rows = [f"{shop},{n},{n + 1},{day}" for shop in "AB" for n, day in enumerate(DAYS)]
    text = wide(rows, "shop,sales,price,when")
    found = table(tmp_path, text, id="shop", time="when", target="price")
    assert (found.ids, found.names, found.time_name) == (("A", "B"), ("price",), "when")
    for config, said in (
        ({"time": "day"}, "no column is named 'day'; there are shop, sales, price, when"),
        ({"id": "shop", "time": "when", "target": "when"}, "'when' cannot be two things at once"),
        ({"time": "when"}, "row 2: shop is 'A', not a number, as is the whole column; --id shop if"),
        ({"time": "when", "target": "sales"}, "2024-01-01 comes twice, in rows 2 and 12; is a series' --id missing?"),
    ):
        with pytest.raises(TersorError, match=r"x\.csv: ") as error:
            table(tmp_path, text, **config)
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["2024-01-01,1", "2024-01-02,two", "2024-01-03,3"], "row 3: a is 'two', not a number; --fill takes"),
        (["2024-01-01,1", "2024-01-02,inf", "2024-01-03,3"], "row 3: a is 'inf', not a number"),
        (["2024-01-01,1", "2024-01-02,", "2024-01-03,3"], "a is empty in 1 rows, the first is row 3 (2024-01-02)"),
        (["2024-01-01,1", "2024-01-02,1", "2024-01-02,3"], "2024-01-02 comes twice, in rows 3 and 4"),
        (
            ["2024-01-01,1", "2024-01-02,1", "2024-01-05,3", "2024-01-06,3"],
            "2 time stamps are missing, the first 2024-01-03 (after row 3); the step is 1 d",
        ),
        (
            ["2024-01-01,1", "2024-01-02,1", "2024-01-03,1", "2024-01-03 07:00,3"],
            "irregular: 2024-01-03 07:00:00 (row 5) is off the grid of 1 d that begins with 2024-01-01",
        ),
        (["2024-01-01,1", "2024-13-02,1"], "'2024-13-02' is not a date"),
        (["2024-01-01,x", "2024-01-02,y"], "a is 'x', not a number, as is the whole column; --target names"),
        (["2024-01-01,1"], "1 rows of numbers, too few"),
        (["2024-01-01,1", "2024-01-02"], "row 3: 1 columns, 2 in the first row"),
    ],
)
def test_says_in_one_line_what_is_wrong(tmp_path: Path, rows: list[str], said: str) -> None:
    with pytest.raises(TersorError, match=r"x\.csv") as error:
        table(tmp_path, wide(rows, "date,a"))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fill", "filled"), [("previous", [1, 1, 1, 7, 7, 9]), ("linear", [1, 3, 5, 7, 8, 9]), ("zero", [1, 0, 0, 7, 0, 9])]
)
def test_fills_gaps_empty_cells_and_text(tmp_path: Path, fill: str, filled: list[float]) -> None:
    rows = ["2024-01-01,1", "2024-01-02,?", "2024-01-04,7", "2024-01-05,", "2024-01-06,8", "2024-01-06,9"]
    found = table(tmp_path, wide(rows, "date,a"), fill=fill)
    assert found.values[0][:, 0].tolist() == filled
    assert len(found.times[0]) == 6
    told = " | ".join(found.notes)
    assert "1 cell of text" in told
    assert f"3 values filled ({fill})" in told
    assert "the last were kept" in told


def test_fill_puts_irregular_stamps_on_the_grid(tmp_path: Path) -> None:
    rows = [
        "2024-01-01 00:00,0",
        "2024-01-01 01:00,1",
        "2024-01-01 02:30,4",
        "2024-01-01 03:00,6",
        "2024-01-01 04:00,7",
    ]
    assert table(tmp_path, wide(rows, "date,a"), fill="linear").values[0][:, 0].tolist() == [0, 1, 3, 6, 7]
    assert table(tmp_path, wide(rows, "date,a"), fill="previous").values[0][:, 0].tolist() == [0, 1, 1, 6, 7]
    with pytest.raises(TersorError, match="not 'backwards'"):
        TableConfig(fill="backwards")


def test_a_step_that_would_make_a_sea_of_rows_is_refused(tmp_path: Path) -> None:
    rows = ["2024-01-01 00:00:00,0", "2024-01-01 00:00:01,1", "2025-01-01 00:00:00,2"]
    with pytest.raises(TersorError, match="3 rows would become 31,622,401"):
        table(tmp_path, wide(rows, "date,a"), fill="linear")


def test_a_constant_column_is_kept_and_told(tmp_path: Path) -> None:
    found = table(tmp_path, wide([f"{day},{n},7" for n, day in enumerate(DAYS)]))
    assert found.notes == ("b never changes, it is always 7",)


def test_reads_semicolons_with_decimal_commas_and_tables_without_header_or_dates(tmp_path: Path) -> None:
    found = table(tmp_path, "zeit;a\n01.02.2024;1,5\n02.02.2024;2,5\n")
    assert found.values[0].tolist() == [[1.5], [2.5]]
    assert found.times[0][1] == np.datetime64("2024-02-02")
    bare = table(tmp_path, "1\t2\n3\t4\n")
    assert (bare.names, bare.time_name, bare.step) == (("0", "1"), "", Step(1, "row"))
    assert bare.times[0].tolist() == [0, 1]
    counted = table(tmp_path, "ds,y\n2001,1\n2003,2\n2005,4\n")
    assert (counted.step, counted.times[0].tolist()) == (Step(2, "row"), [2001, 2003, 2005])
    zoned = table(tmp_path, "ds,y\n2024-01-01T00:00:00+02:00,1\n2024-01-01T01:00:00+02:00,2\n")
    assert zoned.times[0][0] == np.datetime64("2023-12-31T22:00:00")


def test_frames_hold_the_same_as_files(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"ds": pandas.to_datetime(DAYS), "y": np.arange(10.0), "unique_id": "s"})
    found = series_of_frame(frame)
    assert (found.ids, found.names, str(found.step)) == (("s",), ("y",), "1 d")
    indexed = series_of_frame(frame.set_index("ds")[["y"]])
    assert indexed.time_name == "ds"
    assert indexed.values[0].tolist() == found.values[0].tolist()
    zoned = frame.assign(ds=frame["ds"].dt.tz_localize("Europe/Berlin"))
    assert series_of_frame(zoned).times[0][0] == np.datetime64("2023-12-31T23:00:00")
    with pytest.raises(TersorError, match="y is empty in 1 rows, the first is row 3"):
        series_of_frame(frame.assign(y=frame["y"].where(frame.index != 3)))
    with pytest.raises(TersorError, match="DataFrame is expected, not list"):
        series_of_frame([1, 2])
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "x.parquet")
    assert read_series(tmp_path / "x.parquet").values[0].tolist() == found.values[0].tolist()
    (tmp_path / "y.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(TersorError, match=r"y\.parquet cannot be read as Parquet"):
        read_series(tmp_path / "y.parquet")


def test_polars_frames_hold_the_same() -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"ds": [datetime.date(2024, 1, day) for day in (1, 2, 3)], "y": [1, 2, 4]})
    assert series_of_frame(frame).values[0].tolist() == [[1], [2], [4]]


@pytest.mark.parametrize(
    ("first", "step", "told", "season"),
    [
        (["2024-01-31", "2024-02-29", "2024-03-31"], Step(1, "M", month_end=True), "1 month", 12),
        (["2024-01-01", "2024-04-01", "2024-07-01"], Step(3, "M"), "3 months", 4),
        (["2022-06-15", "2023-06-15", "2024-06-15"], Step(12, "M"), "12 months", 1),
        (["2024-01-01", "2024-01-08", "2024-01-15"], Step(604_800, "s"), "7 d", 52),
        (["2024-01-01", "2024-01-02", "2024-01-03"], Step(86_400, "s"), "1 d", 7),
        (["2024-01-01T00:00", "2024-01-01T00:15"], Step(900, "s"), "15 min", 96),
        (["2024-01-01T00:00:00", "2024-01-01T00:00:10"], Step(10, "s"), "10 s", 360),
    ],
)
def test_steps_go_on_as_they_began(first: list[str], step: Step, told: str, season: int) -> None:
    times = np.array(first, "datetime64[s]")
    assert find_step([times]) == step
    assert (str(step), step.season()) == (told, season)
    assert step.after(times[:1], np.arange(len(times)))[0].tolist() == times.tolist()
    assert step.positions(times[0], times).tolist() == list(range(len(times)))
    later = step.after(times[-1:], np.arange(1, 40))[0]
    assert find_step([later]) == step


def test_month_ends_follow_leap_years() -> None:
    later = Step(1, "M", month_end=True).after(np.array(["2023-12-31T06:00"], "datetime64[s]"), np.array([1, 2, 3]))
    assert [str(stamp) for stamp in later[0]] == ["2024-01-31T06:00:00", "2024-02-29T06:00:00", "2024-03-31T06:00:00"]


def test_marks_of_the_calendar_are_those_of_the_standard_library() -> None:
    times = np.array(["2024-02-29T23:50:07", "2021-01-03T00:00:00", "2020-12-31T12:15:59"], "datetime64[s]")
    for stamp, calendar, weeks, seconds in zip(
        times.tolist(),
        time_marks(times, "calendar-minutes"),
        time_marks(times, "weeks"),
        time_marks(times, "seconds"),
        strict=True,
    ):
        assert calendar.tolist() == [stamp.month, stamp.day, stamp.weekday(), stamp.hour, stamp.minute // 15]
        np.testing.assert_allclose(
            weeks, [(stamp.day - 1) / 30 - 0.5, (stamp.isocalendar()[1] - 1) / 52 - 0.5], atol=1e-6
        )
        np.testing.assert_allclose(seconds[:2], [stamp.second / 59 - 0.5, stamp.minute / 59 - 0.5], atol=1e-6)
    assert time_marks(np.stack([times, times]), "days").shape == (2, 3, 3)
