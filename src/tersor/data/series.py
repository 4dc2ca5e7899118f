"""Series for forecasting: a table of numbers over time into scaled windows, in the protocol of the forecasting papers.

    parts = load_series("ETTh1.csv", SeriesConfig(seq_len=96, pred_len=96))
    parts.train[0]      # {"x_enc": (96, 7), "x_mark_enc": (96, 4), "target": (96, 7)}

Rows are cut into training, validation and test part in this order. Each variate is z-scored with mean and standard
deviation (ddof 0) of the training part; errors are told in that scale. A window is seq_len rows of look-back and the
pred_len rows after it, at every row (stride 1). Validation and test part begin seq_len rows early, so that their first
window looks back into the part before.

    "ett"        12, 4 and 4 months of 30 days; later rows are unused       for the four ETT files
    "fractions"  70 %, 10 % and 20 % of the rows, int() of the first and last  for everything else

Models with a decoder (`label_len` above 0) are also given x_dec, the last label_len rows of the look-back and zeros for the
horizon, and x_mark_dec, the marks of these label_len + pred_len rows, known in advance. `SingleVariates` makes a sample of
each variate of each window, for models of one series; of several sets, torch's ConcatDataset makes a mixture.

Marks tell the model the time of a row, each in [-0.5, 0.5]: hour / 23, weekday / 6 (Monday is 0), (day - 1) / 30 and
(day of year - 1) / 365, minus 0.5 each; marks="minutes" puts minute / 59 in front. The papers' runs use the four hourly
ones even for the 15-minute ETTm.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tersor.errors import TersorError
from tersor.untrusted import read_bytes, readable

ETT_COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
ETT_MONTHS = (12, 4, 4)
TRAIN_FRACTION, TEST_FRACTION = 0.7, 0.2
DATE_FORMATS = ("%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d", "%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M")


@dataclass(frozen=True, kw_only=True)
class SeriesConfig:
    seq_len: int = 96  # look-back
    pred_len: int = 96  # horizon
    label_len: int = 0  # rows of the look-back that a decoder is given again; 0: no decoder
    split: str = "auto"  # "ett", "fractions"; "auto": by the names of the columns
    marks: str = "hours"  # "minutes", "none"; a file without dates has none, unless `start` is given
    start: str = ""  # time of the first row, such as 1990-01-01, where the file has no dates
    step_hours: float = 1.0  # from row to row, where the file has no dates

    def __post_init__(self) -> None:
        for name in ("seq_len", "pred_len", "step_hours"):
            if getattr(self, name) <= 0:
                raise TersorError(f"{name} of a series is {getattr(self, name)}, it must be positive")
        if not self.step_hours < 1e6:
            raise TersorError(f"step_hours of a series is {self.step_hours}, more than a century")
        if not 0 <= self.label_len <= self.seq_len:
            raise TersorError(f"label_len of a series is {self.label_len}, it must be from 0 to seq_len {self.seq_len}")
        if self.split not in ("auto", "ett", "fractions"):
            raise TersorError(f"split is 'auto', 'ett' or 'fractions', not {self.split!r}")
        if self.marks not in ("hours", "minutes", "none"):
            raise TersorError(f"marks are 'hours', 'minutes' or 'none', not {self.marks!r}")


@dataclass(frozen=True)
class Table:
    """A series as the file holds it."""

    names: tuple[str, ...]  # of the N variates
    values: np.ndarray  # (rows, N) float64
    times: np.ndarray | None  # (rows,) datetime64[s]


class Windows(Dataset[dict[str, Tensor]]):
    """Every seq_len + pred_len rows in a row of one part: x_enc and x_mark_enc, and as target the rows after them.

    With a label_len also x_dec and x_mark_dec.
    """

    def __init__(
        self, values: Tensor, marks: Tensor | None, *, seq_len: int, pred_len: int, label_len: int = 0
    ) -> None:
        self.values, self.marks, self.seq_len, self.pred_len, self.label_len = (
            values,
            marks,
            seq_len,
            pred_len,
            label_len,
        )
        if len(self) < 1:
            raise TersorError(
                f"a part of the series has {len(values)} rows, too few for look-back {seq_len} and horizon {pred_len}"
            )

    def __len__(self) -> int:
        return max(0, len(self.values) - self.seq_len - self.pred_len + 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        now = index + self.seq_len
        window = {"x_enc": self.values[index:now], "target": self.values[now : now + self.pred_len]}
        if self.marks is not None:
            window["x_mark_enc"] = self.marks[index:now]
        if self.label_len:
            known = self.values[now - self.label_len : now]
            window["x_dec"] = torch.cat((known, known.new_zeros(self.pred_len, known.shape[1])))
            if self.marks is not None:
                window["x_mark_dec"] = self.marks[now - self.label_len : now + self.pred_len]
        return window


class SingleVariates(Dataset[dict[str, Tensor]]):
    """Windows of N variates as N times as many of one variate; sample i is variate i mod N of window i // N."""

    def __init__(self, windows: Windows) -> None:
        self.windows, self.variates = windows, windows.values.shape[1]

    def __len__(self) -> int:
        return len(self.windows) * self.variates

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, variate = divmod(index, self.variates)
        window = self.windows[start]
        return {name: value if "mark" in name else value[:, variate : variate + 1] for name, value in window.items()}


@dataclass(frozen=True)
class Parts:
    """The three parts of a series, scaled; x * std + mean gives back the file's units."""

    train: Windows
    validation: Windows
    test: Windows
    names: tuple[str, ...]
    mean: Tensor  # (N,)
    std: Tensor  # (N,)


def load_series(path: str | Path, config: SeriesConfig | None = None) -> Parts:
    """Read a CSV file (.gz too) and split, scale and window it. Raises TersorError where the file does not fit."""
    config = config or SeriesConfig()
    table = read_table(path)
    try:
        return split_table(table, config)
    except TersorError as error:
        raise TersorError(f"{path}: {error}") from None


def split_table(table: Table, config: SeriesConfig) -> Parts:
    times = table.times
    if times is None and config.start:
        steps = np.arange(len(table.values)) * round(config.step_hours * 3600)
        times = np.datetime64(_time(config.start), "s") + steps.astype("timedelta64[s]")
    train_rows, validation_end, test_end = _ends(table.names, times, len(table.values), config)
    train = table.values[:train_rows]
    if not len(train):
        raise TersorError(f"a series of {len(table.values)} rows has no training part")
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = train.mean(0), train.std(0)
    std = np.where(std == 0, 1.0, std)  # a variate that never moves stays 0
    with np.errstate(over="ignore", invalid="ignore"):
        values = torch.from_numpy(((table.values - mean) / std).astype(np.float32))
    if not bool(torch.isfinite(values).all()):
        row, column = (int(n) for n in (~torch.isfinite(values)).nonzero()[0])
        raise TersorError(f"row {row + 1}: {table.names[column]} is too large to be scaled")
    marks = None
    if times is not None and config.marks != "none":
        marks = torch.from_numpy(time_marks(times, minutes=config.marks == "minutes"))

    def part(begin: int, end: int) -> Windows:
        rows = slice(max(begin, 0), end)
        return Windows(
            values[rows],
            None if marks is None else marks[rows],
            seq_len=config.seq_len,
            pred_len=config.pred_len,
            label_len=config.label_len,
        )

    return Parts(
        train=part(0, train_rows),
        validation=part(train_rows - config.seq_len, validation_end),
        test=part(validation_end - config.seq_len, test_end),
        names=table.names,
        mean=torch.from_numpy(mean),
        std=torch.from_numpy(std),
    )


def time_marks(times: np.ndarray, *, minutes: bool = False) -> np.ndarray:
    """datetime64 (rows,) -> float32 (rows, 4), or (rows, 5) with the minute of the hour in front."""
    days = times.astype("datetime64[D]")
    seconds = (times - days).astype("timedelta64[s]").astype(np.int64)
    weekday = (days.astype(np.int64) + 3) % 7  # 1 January 1970 was a Thursday
    day_of_month = (days - times.astype("datetime64[M]")).astype(np.int64)
    day_of_year = (days - times.astype("datetime64[Y]")).astype(np.int64)
    columns = [seconds // 3600 / 23, weekday / 6, day_of_month / 30, day_of_year / 365]
    if minutes:
        columns.insert(0, seconds // 60 % 60 / 59)
    return (np.stack(columns, 1) - 0.5).astype(np.float32)


def read_table(path: str | Path) -> Table:
    """A comma-separated file: a header or none, dates in the first column or none, numbers elsewhere."""
    path = Path(path).expanduser()
    with readable(path):
        if not path.is_file():
            raise TersorError(f"no series file at {path}")
    data = read_bytes(path)
    try:
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"))) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise TersorError(f"{path} cannot be read as comma-separated text: {error}") from None
    header = rows.pop(0) if rows and not _is_number(rows[0][-1]) else None
    if len(rows) < 2:
        raise TersorError(f"{path} holds {len(rows)} rows of numbers, too few for a series")
    dated = not _is_number(rows[0][0])
    width, first_line = len(rows[0]), 1 if header is None else 2
    names = tuple(header[dated:] if header else map(str, range(width - dated)))
    if len(names) != width - dated or not names:
        raise TersorError(f"{path}: the header names {len(header or ())} columns, the first row has {width}")
    values = np.empty((len(rows), len(names)))
    for n, row in enumerate(rows):
        if len(row) != width:
            raise TersorError(f"{path}, row {n + first_line}: {len(row)} columns, {width} in the first row")
        for column, cell in enumerate(row[dated:]):
            if not _is_number(cell):
                raise TersorError(f"{path}, row {n + first_line}: {names[column]} is {cell!r}, not a number")
            values[n, column] = float(cell)
    if not dated:
        return Table(names, values, None)
    try:
        return Table(names, values, np.array([_time(row[0]) for row in rows], "datetime64[s]"))
    except TersorError as error:
        raise TersorError(f"{path}: {error}") from None


def _ends(names: tuple[str, ...], times: np.ndarray | None, rows: int, config: SeriesConfig) -> tuple[int, int, int]:
    """The rows at which training, validation and test part end."""
    if config.split == "ett" or (config.split == "auto" and names == ETT_COLUMNS):
        if times is None:
            raise TersorError("the ETT split counts months, but the file has no dates")
        step = times[1] - times[0]
        if step <= np.timedelta64(0, "s"):
            raise TersorError(f"the ETT split counts months, but the second row, {times[1]}, is not after the first")
        month = int(np.timedelta64(30, "D") / step)
        train, validation, test = (sum(ETT_MONTHS[: n + 1]) * month for n in range(3))
        if test > rows:
            raise TersorError(f"the ETT split needs {test} rows (20 months), the file has {rows}")
        return train, validation, test
    return int(TRAIN_FRACTION * rows), rows - int(TEST_FRACTION * rows), rows


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:
        pass
    for form in DATE_FORMATS:
        try:
            return datetime.strptime(text.strip(), form)
        except ValueError:
            continue
    raise TersorError(f"{text!r} is not a date such as 2016-07-01 00:00:00")
