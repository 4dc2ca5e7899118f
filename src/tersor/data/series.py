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
(day of year - 1) / 365, minus 0.5 each; marks="minutes" puts minute / 59 in front, time_grid has further kinds. The papers'
runs use the four hourly ones even for the 15-minute ETTm.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tersor.data.columns import first_stamp, is_text, numbers, read_columns, stamps
from tersor.data.time_grid import MARK_KINDS, time_marks
from tersor.errors import TersorError

ETT_COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
ETT_MONTHS = (12, 4, 4)
TRAIN_FRACTION, TEST_FRACTION = 0.7, 0.2


@dataclass(frozen=True, kw_only=True)
class SeriesConfig:
    seq_len: int = 96  # look-back
    pred_len: int = 96  # horizon
    label_len: int = 0  # rows of the look-back that a decoder is given again; 0: no decoder
    split: str = "auto"  # "ett", "fractions"; "auto": by the names of the columns
    marks: str = (
        "hours"  # one of time_grid.MARK_KINDS, or "none"; a file without dates has none, unless `start` is given
    )
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
        if self.marks not in (*MARK_KINDS, "none"):
            raise TersorError(f"marks are one of {', '.join(MARK_KINDS)}, or none; not {self.marks!r}")


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
        times = first_stamp(config.start) + steps.astype("timedelta64[s]")
    train_rows, validation_end, test_end = _ends(table.names, times, len(table.values), config)
    _check_lengths(train_rows, validation_end - train_rows, test_end - validation_end, config)
    train = table.values[:train_rows]
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
        marks = torch.from_numpy(time_marks(times, config.marks))

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


def _check_lengths(train: int, validation: int, test: int, config: SeriesConfig) -> None:
    """Raise TersorError where a part holds no window; the later ones may look back into the part before."""
    total = train + validation + test
    parts = (("training", train, config.seq_len + config.pred_len), ("validation", validation, config.pred_len))
    for name, rows, needed in (*parts, ("test", test, config.pred_len)):
        if rows < needed:
            raise TersorError(
                f"a series of {total} rows has a {name} part of {rows}, too few for look-back {config.seq_len} and horizon "
                f"{config.pred_len}, which need {needed}; a shorter look-back (model.seq_len) or horizon needs fewer"
            )


def read_table(path: str | Path) -> Table:
    """A comma-separated file as it is: with a header or not, dates in the first column or not, numbers elsewhere.

    The gaps and steps of the dates are not checked; `tersor.data.tables` does that.
    """
    columns = read_columns(path)
    names = list(columns.cells)
    try:
        dated = is_text(columns, names[0])
        times = stamps(columns, names[0]) if dated else None
        if len(names) == dated:
            raise TersorError("there is no column beside the dates")
        parsed = [numbers(columns, name, text_is_missing=False)[0] for name in names[dated:]]
    except TersorError as error:
        raise TersorError(f"{path}: {error}") from None
    values = np.stack(parsed, 1)
    if bool(np.isnan(values).any()):
        row, column = (int(n) for n in np.argwhere(np.isnan(values))[0])
        raise TersorError(f"{path}, row {row + columns.first_row}: {names[column + dated]} is empty, not a number")
    return Table(tuple(names[dated:]), values, times)


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
