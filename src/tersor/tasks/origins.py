"""Windows of a scaled table at chosen origins, for calibration, backtests and the forecast itself.

An origin is (series, row): `row` is the first row of the horizon; the look-back ends before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tersor.data.series_memory import ScaledTable
from tersor.data.tables import told
from tersor.errors import TersorError
from tersor.evaluate.conformal import coverage, interval_radii, windows_needed
from tersor.tasks.forecaster import Forecaster

MOST_WINDOWS = 256  # to calibrate on, and as many to measure on
Origin = tuple[int, int]


@dataclass(frozen=True)
class Intervals:
    """How wide intervals are, and how often they held on later windows."""

    levels: tuple[float, ...]  # in percent
    radii: Tensor  # (levels, H, N), in the scaled units
    windows: int  # that they were calibrated on
    coverage: tuple[float, ...]  # measured, as shares; empty where no window was left to measure on
    held_out: int  # windows that it was measured on


def windows_at(scaled: ScaledTable, origins: Sequence[Origin], look_back: int) -> tuple[Tensor, np.ndarray]:
    """x (B, look_back, N) and the stamps (B,) of its last rows. Every origin has look_back rows before it."""
    x = torch.stack([scaled.values[series][row - look_back : row] for series, row in origins])
    return x, np.array([scaled.table.times[series][row - 1] for series, row in origins])


def errors_at(forecaster: Forecaster, scaled: ScaledTable, origins: Sequence[Origin], horizon: int) -> Tensor:
    """forecast - y, scaled: (B, horizon, N). Batches keep to bounded memory."""
    made = []
    for n in range(0, len(origins), MOST_WINDOWS):
        some = origins[n : n + MOST_WINDOWS]
        x, last = windows_at(scaled, some, forecaster.look_back)
        y = torch.stack([scaled.values[series][row : row + horizon] for series, row in some])
        made.append(forecaster(x, last, scaled.table.step, horizon) - y)
    return torch.cat(made)


def calibrated(
    forecaster: Forecaster,
    scaled: ScaledTable,
    horizon: int,
    levels: Sequence[float],
    *,
    look_back: int,
    end: Sequence[int] | None = None,
    measure: bool = True,
) -> Intervals:
    """Intervals from windows after what was learned from and before the rows `end` of each series.

    measure: the later half of the windows, whose horizons begin after those of the earlier half, is left for coverage. Raises
    TersorError where the windows are too few.
    """
    ends = [len(values) for values in scaled.values] if end is None else end
    first, second = held_out_origins(scaled, horizon, look_back, ends, measure=measure)
    needed = max(windows_needed(level) for level in levels)
    if len(first) < needed:
        spare = max(0, needed - len(first))
        raise TersorError(
            f"an interval of {max(levels):g} % needs {needed} windows that the model has not learned from, there are "
            f"{len(first)}"
            + (" beside those that its coverage is measured on" if measure and second else "")
            + f"; {spare} more rows, a shorter horizon or a lower level"
        )
    radii = interval_radii(errors_at(forecaster, scaled, first, horizon).abs(), levels)
    if not second:
        return Intervals(tuple(levels), radii, len(first), (), 0)
    shares = coverage(errors_at(forecaster, scaled, second, horizon).abs(), radii)
    return Intervals(tuple(levels), radii, len(first), tuple(shares), len(second))


def held_out_origins(
    scaled: ScaledTable, horizon: int, look_back: int, ends: Sequence[int], *, measure: bool
) -> tuple[list[Origin], list[Origin]]:
    """Origins of windows that nothing was learned from: those to calibrate on, and those to measure on.

    They are the two halves of each series' time, without common rows. Where series are too short for that, every second series is
    used to measure.
    """
    rows = [
        (series, max(scaled.learned[series], look_back), ends[series] - horizon) for series in range(len(scaled.values))
    ]
    rows = [(series, first, last) for series, first, last in rows if first <= last]
    if not measure:
        return _spread([(s, row) for s, first, last in rows for row in range(first, last + 1)]), []
    by_time = [(s, first, (first + last - horizon) // 2, last) for s, first, last in rows if last - first >= horizon]
    if by_time:
        earlier = [(s, row) for s, first, middle, _ in by_time for row in range(first, middle + 1)]
        later = [(s, row) for s, _, middle, last in by_time for row in range(middle + horizon, last + 1)]
    else:
        groups = [[(s, row) for s, first, last in rows[n::2] for row in range(first, last + 1)] for n in (0, 1)]
        earlier, later = groups
    return _spread(earlier), _spread(later)


def _spread(origins: list[Origin]) -> list[Origin]:
    """At most MOST_WINDOWS of them, evenly spaced."""
    if len(origins) <= MOST_WINDOWS:
        return origins
    return [origins[int(n)] for n in np.linspace(0, len(origins) - 1, MOST_WINDOWS)]


def check_rows(scaled: ScaledTable, needed: int, why: str) -> None:
    """Raise TersorError where a series is too short."""
    for id, values in zip(scaled.table.ids, scaled.values, strict=True):
        if len(values) < needed:
            who, way = (f"series {id}", "; leave it out") if id else ("the table", "")
            raise TersorError(f"{who} has {len(values)} rows, {why} needs {needed}{way}")


def span(scaled: ScaledTable, series: int, first: int, last: int) -> str:
    times = scaled.table.times[series]
    return f"{told(times[first])} to {told(times[last])}"
