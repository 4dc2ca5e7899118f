"""A table as named columns: read from a CSV or Parquet file, or taken from a pandas or polars frame.

    read_columns("sales.csv").cells        # {"ds": array of text, "y": array of text}

CSV: comma, semicolon or tab, a header or none, .gz too; with semicolons, a comma inside a number is its decimal point.
Parquet needs the extra `tables`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tersor.errors import TersorError
from tersor.untrusted import first_words, read_bytes, readable

MISSING = ("", "na", "n/a", "nan", "null", "none", "-", "<na>", "nat")
DATE_FORMATS = ("%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d", "%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y")
SECONDS = "datetime64[s]"
MOST_SHOWN = 40  # characters of a cell in a message


@dataclass(frozen=True)
class Columns:
    """A table before anything is known of its columns."""

    cells: dict[str, np.ndarray]  # name -> (rows,) of text, numbers, datetime64 or objects
    first_row: int = 1  # what the first row is called in messages: a file's line, where it has lines
    header: bool = True
    decimal_comma: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.cells.values()))) if self.cells else 0


def read_columns(path: str | Path) -> Columns:
    """A .parquet file, or else CSV. Raises TersorError where it is neither."""
    path = Path(path).expanduser()
    with readable(path):
        if not path.is_file():
            raise TersorError(f"{path} is a folder, not a table" if path.is_dir() else f"no series file at {path}")
    if path.suffix in (".parquet", ".pq"):
        return _parquet(path)
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
        delimiter = _delimiter(text.partition("\n")[0])
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise TersorError(f"{path} cannot be read as comma-separated text: {error}") from None
    header = rows.pop(0) if rows and _is_header(rows[0]) else None
    if len(rows) < 2:
        raise TersorError(f"{path} holds {len(rows)} rows of numbers, too few for a series")
    width, first = len(rows[0]), 1 if header is None else 2
    if header is not None and len(header) != width:
        raise TersorError(f"{path}: the header names {len(header)} columns, the first row has {width}")
    for n, row in enumerate(rows):
        if len(row) != width:
            raise TersorError(f"{path}, row {n + first}: {len(row)} columns, {width} in the first row")
    names = [name.strip() for name in header] if header else _numbered(rows[0])
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise TersorError(f"{path}: two columns are named {twice!r}")
    cells = {name: np.array(column, dtype=object) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return Columns(cells, first, header is not None, decimal_comma=delimiter == ";")


def frame_columns(frame: Any) -> Columns:
    """A pandas or polars DataFrame. The index of a pandas frame is a column, where it holds dates or has names."""
    kind = type(frame).__module__.partition(".")[0]
    if kind == "polars":
        return Columns({name: _plain(frame[name].to_numpy()) for name in frame.columns}, first_row=0)
    if kind != "pandas" or not hasattr(frame, "columns"):
        raise TersorError(f"a pandas or polars DataFrame is expected, not {type(frame).__name__}")
    if type(frame.index).__name__ == "DatetimeIndex" and frame.index.name is None:
        frame = frame.rename_axis("ds")
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    return Columns({str(name): _plain(_pandas(frame[name])) for name in frame.columns}, first_row=0)


def frame_like(frame: Any, columns: Mapping[str, np.ndarray]) -> Any:
    """A frame of the library that `frame` is of."""
    if type(frame).__module__.partition(".")[0] == "polars":
        import polars

        known = {
            name: each.astype("datetime64[ms]") if each.dtype.kind == "M" else each for name, each in columns.items()
        }
        return polars.DataFrame({name: list(each) if each.dtype.kind == "O" else each for name, each in known.items()})
    import pandas

    return pandas.DataFrame(dict(columns))


def numbers(columns: Columns, name: str, *, text_is_missing: bool) -> tuple[np.ndarray, int]:
    """(rows,) float64, NaN where nothing is known, and how many texts counted as missing."""
    cells = columns.cells[name]
    if cells.dtype.kind in "iufb":
        values = cells.astype(np.float64)
        texts = int(np.isinf(values).sum())
        if texts and not text_is_missing:
            _refuse(columns, name, int(np.isinf(values).argmax()))
        return np.where(np.isinf(values), np.nan, values), texts
    try:
        values = cells.astype(np.float64)
        if bool(np.isfinite(values).all()):
            return values, 0
    except (ValueError, TypeError, OverflowError):
        pass  # cell by cell
    values, texts = np.full(len(cells), np.nan), 0
    for n, cell in enumerate(cells):
        number = _number(cell, decimal_comma=columns.decimal_comma)
        if number is not None:
            values[n] = number
        elif not _is_missing(cell):
            texts += 1
            if not text_is_missing:
                _refuse(columns, name, n)
    return values, texts


def stamps(columns: Columns, name: str) -> np.ndarray:
    """(rows,) datetime64[s], or int64 where all are whole numbers."""
    cells = columns.cells[name]
    if cells.dtype.kind == "M":
        if bool(np.isnat(cells).any()):
            raise TersorError(f"row {int(np.isnat(cells).argmax()) + columns.first_row}: {name} is empty, not a date")
        return cells.astype(SECONDS)
    found = [_number(cell) for cell in cells]
    if all(number is not None and number == int(number) and abs(number) < 2**53 for number in found):
        return np.array([int(number) for number in found if number is not None], np.int64)
    try:
        return np.array([_stamp(str(cell)) for cell in cells], SECONDS)
    except TersorError:
        wrong = next(n for n, cell in enumerate(cells) if not is_date(str(cell)))
        told = _shown(cells[wrong])
        raise TersorError(
            f"row {wrong + columns.first_row}: {name} is {told}; {told} is not a date such as 2016-07-01 00:00:00"
        ) from None


def first_stamp(text: str) -> Any:
    """A date that a person wrote, as a datetime64[s]."""
    return np.datetime64(_stamp(text), "s")


def is_text(columns: Columns, name: str) -> bool:
    """Whether a column has texts and no cell that is a number."""
    cells = columns.cells[name]
    if cells.dtype.kind in "iufb":
        return False
    found = [cell for cell in cells if not _is_missing(cell)]
    return bool(found) and all(_number(cell, decimal_comma=columns.decimal_comma) is None for cell in found)


def is_date(text: str) -> bool:
    try:
        _stamp(text)
    except TersorError:
        return False
    return True


def _stamp(text: str) -> datetime:
    """A time without a zone; one with a zone is converted to UTC."""
    text = text.strip()
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        for form in DATE_FORMATS:
            try:
                return datetime.strptime(text, form)
            except ValueError:
                continue
        raise TersorError(f"{_shown(text)} is not a date such as 2016-07-01 00:00:00") from None
    try:
        return found if found.tzinfo is None else found.astimezone(UTC).replace(tzinfo=None)
    except OverflowError:  # the first and the last day that there is
        return found.replace(tzinfo=None)


def _number(cell: Any, *, decimal_comma: bool = False) -> float | None:
    text = cell.replace(",", ".", 1) if decimal_comma and isinstance(cell, str) else cell
    try:
        number = float(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return number if np.isfinite(number) else None


def _is_missing(cell: Any) -> bool:
    return cell is None or str(cell).strip().lower() in MISSING


def _refuse(columns: Columns, name: str, row: int) -> None:
    raise TersorError(
        f"row {row + columns.first_row}: {name} is {_shown(columns.cells[name][row])}, not a number; "
        "--fill takes such cells for missing ones"
    )


def _shown(cell: Any) -> str:
    text = str(cell)
    return repr(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}...")


def _delimiter(line: str) -> str:
    return max(",;\t", key=line.count) if any(each in line for each in ",;\t") else ","


def _is_header(row: list[str]) -> bool:
    """Whether a row holds names: no dates, and not only numbers."""
    words = [cell for cell in row if _number(cell) is None and not _is_missing(cell)]
    return bool(words) and not any(is_date(word) for word in words)


def _numbered(row: list[str]) -> list[str]:
    """Names for columns that have none: "date" for a first column of dates, else 0, 1, 2, ..."""
    dated = _number(row[0]) is None and is_date(row[0])
    return (["date"] if dated else []) + [str(n) for n in range(len(row) - dated)]


def _parquet(path: Path) -> Columns:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TersorError("Parquet files need pyarrow: pip install 'tersor[tables]', or give a CSV file") from None
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(read_bytes(path)))
        cells = {str(name): _arrow(table.column(n), pyarrow) for n, name in enumerate(table.column_names)}
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        raise TersorError(f"{path} cannot be read as Parquet: {first_words(error)}") from None
    if len(cells) < table.num_columns or not cells:
        raise TersorError(f"{path} holds {table.num_columns} columns under {len(cells)} names")
    if table.num_rows < 2:
        raise TersorError(f"{path} holds {table.num_rows} rows of numbers, too few for a series")
    return Columns(cells)


def _arrow(column: Any, pyarrow: Any) -> np.ndarray:
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    if pyarrow.types.is_timestamp(kind) or pyarrow.types.is_date(kind):
        column = column.cast(pyarrow.timestamp("s"), safe=False) if kind != pyarrow.timestamp("s") else column
    return _plain(column.to_numpy(zero_copy_only=False) if hasattr(column, "combine_chunks") else column.to_numpy())


def _pandas(series: Any) -> Any:
    if getattr(series.dtype, "tz", None) is not None:
        series = series.dt.tz_convert("UTC").dt.tz_localize(None)
    return series.to_numpy()


def _plain(cells: Any) -> np.ndarray:
    """One dimension, of numbers, dates or objects."""
    found = np.asarray(cells)
    return found if found.dtype.kind in "iufbM" else found.astype(object)
