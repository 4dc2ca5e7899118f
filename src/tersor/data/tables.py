"""The user's own table as series on a regular grid. What it holds is found out; what is wrong with it is said in one line.

    table = read_series("sales.csv", TableConfig(fill="linear"))
    table.names, table.ids      # ("a", "b"), ("",)           wide: a row a time, a column a variate; one series
                                # ("y",), ("shop 1", ...)     long: unique_id, ds, y; a series for each id, alike in columns

The time is the column named `time`, else one called ds, date, time, timestamp or datetime, else a first column of dates;
without any, rows are counted. The id is the column named `id`, else `unique_id`. The targets are those named, else `y` of a
long table, else all columns that are left.

Refused, unless `fill` says how to fill: stamps that are missing, come twice or are off the grid, cells that are empty or
text. "previous" repeats the last known value, "linear" goes straight from one known value to the next, "zero" is 0. Of rows
with one stamp, the last counts then. Rows in another order than time's are sorted, columns that never change are kept; a
note says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersor.data.columns import Columns, frame_columns, is_date, is_text, numbers, read_columns, stamps
from tersor.data.time_grid import Step, find_step
from tersor.errors import TersorError

FILLS = ("previous", "linear", "zero")
TIME_NAMES = ("ds", "date", "time", "timestamp", "datetime")
ID_NAME, TARGET_NAME = "unique_id", "y"
SPARSEST = 20  # times as many rows as were given may come of filling
ON_GRID = 1e-6  # of a step


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    time: str = ""  # column of the time stamps; empty: found by name or content
    target: str = ""  # columns to forecast, separated by commas; empty: all that are left
    columns: tuple[str, ...] = ()  # the same as `target`, of names that may hold commas
    id: str = ""  # column that says which series a row is of
    fill: str = ""  # "previous", "linear", "zero"; empty: what is missing is an error

    def __post_init__(self) -> None:
        if self.fill and self.fill not in FILLS:
            raise TersorError(f"--fill is one of {', '.join(FILLS)}, not {self.fill!r}")


@dataclass(frozen=True)
class SeriesTable:
    """S series of the same N columns, each on the same kind of grid, without gaps."""

    names: tuple[str, ...]  # of the N columns
    ids: tuple[str, ...]  # of the S series; ("",) where the table has no ids
    values: tuple[np.ndarray, ...]  # of each series (rows, N) float64, finite
    times: tuple[np.ndarray, ...]  # of each series (rows,) datetime64[s] or int64
    step: Step  # from row to row
    time_name: str = ""  # as the table calls it; empty: rows are counted
    id_name: str = ""  # empty: one series
    notes: tuple[str, ...] = ()  # what was found on the way and is no error

    @property
    def rows(self) -> int:
        """The rows of the shortest series."""
        return min(len(values) for values in self.values)


def read_series(path: str | Path, config: TableConfig | None = None) -> SeriesTable:
    """A CSV or Parquet file. Raises TersorError where it holds no series."""
    columns = read_columns(path)
    try:
        return series_of(columns, config or TableConfig())
    except TersorError as error:
        raise TersorError(f"{path}: {error}") from None


def series_of_frame(frame: Any, config: TableConfig | None = None) -> SeriesTable:
    """A pandas or polars frame. Raises TersorError where it holds no series."""
    return series_of(frame_columns(frame), config or TableConfig())


def series_of(columns: Columns, config: TableConfig) -> SeriesTable:
    time, id_name, names = _roles(columns, config)
    notes: list[str] = []
    parsed = [numbers(columns, name, text_is_missing=bool(config.fill)) for name in names]
    texts = sum(count for _, count in parsed)
    if texts:
        notes.append(f"{_count(texts, 'cell')} of text filled as missing")
    values = np.stack([column for column, _ in parsed], 1)
    times = stamps(columns, time) if time else np.arange(len(values))
    groups = _groups(columns, id_name, len(values))
    ordered = {id: _in_order(id, times, rows, columns.first_row, config.fill, notes) for id, rows in groups.items()}
    if lonely := [id for id, rows in ordered.items() if len(rows) < 2]:
        raise TersorError(f"{_series(lonely[0])}one row is no series; leave it out")
    step = find_step([times[rows] for rows in ordered.values()])
    filled = {
        id: _on_grid(id, values[rows], times[rows], rows + columns.first_row, names, step, config.fill, notes)
        for id, rows in ordered.items()
    }
    for id, (found, _) in filled.items():
        still = [name for name, column in zip(names, found.T, strict=True) if bool((column == column[0]).all())]
        if still:
            constant = found[0, names.index(still[0])]
            more = f" ({len(still)} such columns)" if len(still) > 1 else ""
            notes.append(f"{_series(id)}{still[0]} never changes, it is always {constant:g}{more}")
    return SeriesTable(
        names=tuple(names),
        ids=tuple(filled),
        values=tuple(found for found, _ in filled.values()),
        times=tuple(grid for _, grid in filled.values()),
        step=step,
        time_name=time,
        id_name=id_name,
        notes=tuple(_together(notes)),
    )


def _roles(columns: Columns, config: TableConfig) -> tuple[str, str, list[str]]:
    """The names of the time column, the id column ("" for none) and the targets."""
    known = list(columns.cells)
    wanted = list(config.columns) or [name.strip() for name in config.target.split(",") if name.strip()]
    for name in (config.time, config.id, *wanted):
        if name and name not in known:
            raise TersorError(f"no column is named {name!r}; there are {', '.join(known[:12])}")
    id_name = config.id or (ID_NAME if ID_NAME in known else "")
    time = config.time or _time_column(columns, [name for name in known if name not in (id_name, *wanted)])
    left = [name for name in known if name not in (id_name, time)]
    if not wanted and id_name and TARGET_NAME in left:
        wanted = [TARGET_NAME]
    targets = wanted or left
    if not targets:
        raise TersorError("no column is left to forecast")
    if twice := next((name for name in targets if name in (time, id_name) or targets.count(name) > 1), None):
        raise TersorError(f"the column {twice!r} cannot be two things at once: time, id or target")
    for name in targets:
        if is_text(columns, name):
            cell = next(each for each in columns.cells[name] if each is not None and str(each).strip())
            if not wanted and id_name == "" and len(targets) > 1:
                way = f"--id {name} if it says which series a row is of, else --target names the columns to forecast"
            else:
                way = "--target names the columns to forecast"
            first = columns.first_row + int(np.argmax(columns.cells[name] == cell))
            raise TersorError(f"row {first}: {name} is {str(cell)[:40]!r}, not a number, as is the whole column; {way}")
    return time, id_name, targets


def _time_column(columns: Columns, names: list[str]) -> str:
    named = [name for name in names if name.lower() in TIME_NAMES]
    if named:
        return named[0]
    for name in names[:1]:
        cells = columns.cells[name]
        if cells.dtype.kind == "M" or (is_text(columns, name) and any(is_date(str(cell)) for cell in cells[:8])):
            return name
    return ""


def _groups(columns: Columns, id_name: str, rows: int) -> dict[str, np.ndarray]:
    """Row numbers by id, in the order in which ids come first."""
    if not id_name:
        return {"": np.arange(rows)}
    ids = np.array([str(cell) for cell in columns.cells[id_name]], dtype=str)
    found, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    by_id = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
    return {str(found[n]): by_id[n] for n in np.argsort(first)}


def _in_order(id: str, times: np.ndarray, rows: np.ndarray, first_row: int, fill: str, notes: list[str]) -> np.ndarray:
    """The rows of one series in the order of time, one for each stamp."""
    stamps = times[rows]
    if bool((np.diff(stamps).astype(np.int64) < 0).any()):
        rows = rows[np.argsort(stamps, kind="stable")]
        stamps = times[rows]
        notes.append(f"{_series(id)}rows were put in the order of time")
    same = np.diff(stamps).astype(np.int64) == 0
    if not bool(same.any()):
        return rows
    if not fill:
        n = int(same.argmax())
        pair = sorted((int(rows[n]) + first_row, int(rows[n + 1]) + first_row))
        raise TersorError(
            f"{_series(id)}{told(stamps[n])} comes twice, in rows {pair[0]} and {pair[1]}; is a series' --id missing? "
            "--fill keeps the last row of each time"
        )
    notes.append(f"{_series(id)}of {int(same.sum()) + 1} rows with times that come again, the last were kept")
    return np.asarray(rows[np.append(~same, True)])


def _on_grid(
    id: str,
    values: np.ndarray,
    times: np.ndarray,
    rows: np.ndarray,
    names: Sequence[str],
    step: Step,
    fill: str,
    notes: list[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Values and stamps of one series without gaps: as they are, or filled. rows: what they are called in messages."""
    at = step.positions(times[0], times)
    whole = np.round(at).astype(np.int64)
    off, gaps = np.abs(at - whole) > ON_GRID, np.diff(whole)
    count = int(np.floor(at[-1] + ON_GRID)) + 1
    if bool(off.any()) and not fill:
        n = int(off.argmax())
        raise TersorError(
            f"{_series(id)}the time stamps are irregular: {told(times[n])} (row {rows[n]}) is off the grid of {step} that "
            f"begins with {told(times[0])}; --fill {'|'.join(FILLS)} puts the series on it"
        )
    if not bool(off.any()) and bool((gaps > 1).any()) and not fill:
        n, missing = int((gaps > 1).argmax()), count - len(times)
        first = step.after(times[n : n + 1], np.array([1]))[0, 0]
        verb = "time stamp is" if missing == 1 else "time stamps are"
        raise TersorError(
            f"{_series(id)}{missing} {verb} missing, the first {told(first)} (after row {rows[n]}); the step is {step}; "
            f"--fill {'|'.join(FILLS)} says how to fill them"
        )
    if count > SPARSEST * len(times) + SPARSEST:
        raise TersorError(
            f"{_series(id)}the time stamps are irregular: at their commonest step, {step}, {len(times)} rows would become "
            f"{count:,}; bring them to one step first"
        )
    grid = step.after(times[:1], np.arange(count))[0]
    placed = np.full((count, values.shape[1]), np.nan)
    inside = whole < count
    placed[whole[inside & ~off]] = values[inside & ~off]
    missing = np.isnan(placed)
    if not bool(missing.any()):
        return placed, grid
    if not fill:
        column = int(missing.any(0).argmax())
        n = int(missing[:, column].argmax())
        empty = int(missing[:, column].sum())
        raise TersorError(
            f"{_series(id)}{names[column]} is empty in {empty} rows, the first is row {rows[n]} ({told(grid[n])}); "
            f"--fill {'|'.join(FILLS)} says how to fill them"
        )
    for column, name in enumerate(names):
        known = ~np.isnan(values[:, column])
        if not bool(known.any()):
            raise TersorError(f"{_series(id)}{name} is empty in every row; leave it out with --target")
        lost = missing[:, column]
        placed[lost, column] = _filled(np.flatnonzero(lost), at[known], values[known, column], fill)
    notes.append(f"{_series(id)}{_count(int(missing.sum()), 'value')} filled ({fill})")
    return placed, grid


def _filled(wanted: np.ndarray, at: np.ndarray, known: np.ndarray, fill: str) -> np.ndarray:
    """Values at the positions `wanted`, from those known at `at`; before the first known one, that one."""
    if fill == "zero":
        return np.zeros(len(wanted))
    if fill == "linear":
        return np.asarray(np.interp(wanted, at, known))
    return np.asarray(known[np.maximum(np.searchsorted(at, wanted + ON_GRID, side="right") - 1, 0)])


def told(stamp: Any) -> str:
    """A stamp as a person writes it."""
    return str(stamp).replace("T", " ").removesuffix(" 00:00:00")


def _series(id: str) -> str:
    return f"series {id}: " if id else ""


def _together(notes: list[str]) -> list[str]:
    """Notes; one that many series share is said once, with the first series' own numbers."""
    kept: dict[str, list[str]] = {}
    for note in notes:
        words = note.partition(": ")[2] if note.startswith("series ") else note
        key = "".join(each for each in words if not each.isdigit())
        kept.setdefault(key, []).append(note)
    return [each[0] if len(each) == 1 else f"{each[0]} (and {len(each) - 1} notes like it)" for each in kept.values()]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
