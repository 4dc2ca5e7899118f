"""What a forecaster remembers of the table it learned from: all that it needs to be used on another one.

Written beside the weights as preprocessor_config.json: columns, marks, the step from row to row, and of each series mean,
standard deviation (ddof 0) and the last time that was learned from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.data.columns import first_stamp
from tersor.data.series import TRAIN_FRACTION
from tersor.data.tables import SeriesTable, told
from tersor.data.time_grid import MARK_KINDS, Step
from tersor.errors import TersorError

LARGEST_STEP = 10**10  # of a step's units


@dataclass(frozen=True)
class Scale:
    """Of one series."""

    mean: np.ndarray  # (N,)
    std: np.ndarray  # (N,), 1 where a column never changes
    until: str = ""  # the last time that was learned from; empty: nobody knows

    @classmethod
    def of(cls, values: np.ndarray, until: str = "") -> Scale:
        """Of the rows (rows, N) that are learned from."""
        with np.errstate(over="ignore", invalid="ignore"):
            mean, std = values.mean(0), values.std(0)
        return cls(mean, np.where(std == 0, 1.0, std), until)


@dataclass(frozen=True)
class Memory:
    columns: tuple[str, ...] = ()  # empty: nothing is remembered
    scales: dict[str, Scale] = field(default_factory=dict)  # by the series' id; "" where the table had none
    marks: str = "none"  # a kind of time_grid, or "none"
    step: Step | None = None  # None: of a table without dates, or not remembered
    time: str = ""  # names of the columns
    id: str = ""
    start: str = ""  # time of the first row of a table without dates, as the user said it

    def as_dict(self) -> dict[str, Any]:
        """JSON. One series without id stands at the top, as `mean`, `std` and `until`."""
        told: dict[str, Any] = {"columns": list(self.columns), "marks": self.marks, "time": self.time, "id": self.id}
        told |= {"start": self.start, "step": None if self.step is None else dataclasses.asdict(self.step)}
        scales = {
            id: {"mean": scale.mean.tolist(), "std": scale.std.tolist(), "until": scale.until}
            for id, scale in self.scales.items()
        }
        return told | scales.get("", {"series": scales})

    @classmethod
    def from_dict(cls, said: Mapping[str, Any], *, of: str) -> Memory:
        """Raises TersorError, naming the file `of`, where it does not say what `as_dict` says."""
        try:
            columns = tuple(str(name) for name in said["columns"])
            marks = str(said.get("marks", "none"))
            if marks not in (*MARK_KINDS, "none"):
                raise ValueError(f"marks {marks!r}")
            found = said.get("series", {"": said})
            scales = {str(id): _scale(each, len(columns)) for id, each in found.items()}
            names = {name: str(said.get(name, "")) for name in ("time", "id", "start")}
            return cls(columns, scales, marks, _step(said.get("step")), **names)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise TersorError(f"{of} does not say how the model's series are scaled: {error!r}") from None


@dataclass(frozen=True)
class ScaledTable:
    """A table as a model sees it."""

    table: SeriesTable
    values: tuple[Tensor, ...]  # of each series (rows, N) float32, (value - mean) / std
    scales: tuple[Scale, ...]
    learned: tuple[int, ...]  # of each series, the number of its first rows that the model or its scale learned from
    notes: tuple[str, ...] = ()


def scaled(table: SeriesTable, memory: Memory) -> ScaledTable:
    """The table in the model's own columns and units. Raises TersorError where it is of another kind.

    A series that the model has not seen is scaled by its own first 70 %, all series are where nothing is remembered.
    """
    notes: list[str] = []
    if memory.columns:
        table = _same_columns(table, memory, notes)
    if memory.start and not table.step.dated and memory.step is not None:
        table = with_start(table, memory.start, memory.step)
    if memory.step is not None and table.step != memory.step:
        raise TersorError(f"the model learned from rows {memory.step} apart, the table's are {table.step} apart")
    if memory.columns and memory.marks != "none" and not table.step.dated:
        raise TersorError(
            "the model was trained with dates, the table has none; --time names the column that holds them"
        )
    scales, learned, unseen = [], [], []
    for id, values, times in zip(table.ids, table.values, table.times, strict=True):
        scale = memory.scales.get(id)
        first = int(TRAIN_FRACTION * len(values))
        if scale is None:
            unseen.append(id)
            scale = Scale.of(values[: max(first, 1)])
        elif scale.until:
            first = _rows_until(times, scale.until)
        scales.append(scale)
        learned.append(first)
    if memory.scales and unseen:
        some = ", ".join(each or "the table's" for each in unseen[:3]) + (", ..." if len(unseen) > 3 else "")
        notes.append(f"{len(unseen)} series were not trained on and are scaled by their own first 70 % ({some})")
    if not memory.scales:
        notes.append("the model remembers no scale: each series is scaled by its own first 70 %")
    seen = [_scaled(each, scale, table.names) for each, scale in zip(table.values, scales, strict=True)]
    return ScaledTable(table, tuple(seen), tuple(scales), tuple(learned), tuple(notes))


def remember(table: SeriesTable, learned: Sequence[int], marks: str, start: str = "") -> Memory:
    """What a model remembers that learned from this many first rows of each series."""
    scales = {
        id: Scale.of(values[:rows], told(times[rows - 1]) if rows else "")
        for id, values, times, rows in zip(table.ids, table.values, table.times, learned, strict=True)
        if rows
    }
    step = table.step if table.step.dated else None
    return Memory(table.names, scales, marks, step, table.time_name, table.id_name, start)


def with_start(table: SeriesTable, start: str, step: Step) -> SeriesTable:
    """A table without dates, given the time of each series' first row."""
    first = np.array([first_stamp(start)])
    times = tuple(step.after(first, np.arange(len(values)))[0] for values in table.values)
    return dataclasses.replace(table, times=times, step=step)


def _same_columns(table: SeriesTable, memory: Memory, notes: list[str]) -> SeriesTable:
    missing = [name for name in memory.columns if name not in table.names]
    if missing:
        raise TersorError(
            f"the model was trained on the columns {', '.join(memory.columns)}; the table has no {missing[0]!r}, only "
            f"{', '.join(table.names)}"
        )
    extra = [name for name in table.names if name not in memory.columns]
    if extra:
        notes.append(f"the model was not trained on {', '.join(extra)}: left out")
    order = [table.names.index(name) for name in memory.columns]
    return dataclasses.replace(table, names=memory.columns, values=tuple(each[:, order] for each in table.values))


def _scaled(values: np.ndarray, scale: Scale, names: Sequence[str]) -> Tensor:
    with np.errstate(over="ignore", invalid="ignore"):
        found = torch.from_numpy(((values - scale.mean) / scale.std).astype(np.float32))
    if not bool(torch.isfinite(found).all()):
        row, column = (int(n) for n in (~torch.isfinite(found)).nonzero()[0])
        raise TersorError(f"row {row + 1}: {names[column]} is {values[row, column]:g}, too large to be scaled")
    return found


def _rows_until(times: np.ndarray, until: str) -> int:
    """How many rows are not later than `until`."""
    if times.dtype.kind == "M":
        return int((times <= first_stamp(until)).sum())
    try:
        return int((times <= int(until)).sum())
    except ValueError:
        raise TersorError(
            f"the model learned from dates until {until}, the table has none; --time names the column that holds them"
        ) from None


def _scale(said: Mapping[str, Any], columns: int) -> Scale:
    mean, std = (np.array(said[name], np.float64) for name in ("mean", "std"))
    if mean.shape != (columns,) or std.shape != (columns,) or not columns:
        raise ValueError(f"{mean.shape} means of {columns} columns")
    if not bool(np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ValueError("a mean or std that is no number")
    return Scale(mean, std, str(said.get("until", "")))


def _step(said: Mapping[str, Any] | None) -> Step | None:
    if said is None:
        return None
    count, unit = said["count"], said["unit"]
    if not isinstance(count, int) or not 1 <= count <= LARGEST_STEP or unit not in ("s", "M"):
        raise ValueError(f"a step of {count!r} {unit!r}")
    return Step(count, unit, bool(said["month_end"]))
