"""Rolling-origin evaluation: how a forecaster would have done on a table's last windows, beside three yardsticks.

    result = backtest("run", read_series("sales.csv"), horizon=24, windows=8)
    result.rows[0].mse, result.best("mse").name

The last `windows` horizons of each series, one after another; before each, everything up to it is known. Nothing is trained
again. MSE and MAE are in standard deviations of what the model learned from (as in papers), each value weighing alike.
MASE is the mean absolute error over that of repeating the last season (of the last value, where no season is known), in
sample on the rows before the first window (Hyndman & Koehler 2006), the mean over columns and series. Coverage is the share
of the values within split-conformal intervals, calibrated for each forecaster by itself on the windows before the first one
that nothing was learned from. Ridge learns from the rows that the model learned from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.data.series_memory import Memory, ScaledTable, scaled
from tersor.data.tables import SeriesTable
from tersor.errors import TersorError
from tersor.evaluate.conformal import LEVELS, check_levels, coverage
from tersor.evaluate.yardsticks import fit_ridge
from tersor.tasks.forecast_table import yardstick_of
from tersor.tasks.forecaster import Forecaster, yardsticks
from tersor.tasks.origins import calibrated, check_rows, errors_at, span

MEASURES = ("mse", "mae", "mase")


@dataclass(frozen=True)
class Row:
    """One forecaster's line."""

    name: str
    yardstick: bool
    mse: float
    mae: float
    mase: float  # NaN where every column is constant
    coverage: dict[str, float]  # by level; empty where too few windows were there to calibrate on


@dataclass(frozen=True)
class Backtest:
    rows: tuple[Row, ...]
    horizon: int
    windows: int  # of each series
    season: int  # rows; 1: unknown
    first: str  # the times of the first series' windows
    notes: tuple[str, ...]

    def best(self, measure: str) -> Row:
        """The row with the least value of a measure; the first row where all are NaN."""
        return min(self.rows, key=lambda row: (math.isnan(getattr(row, measure)), getattr(row, measure)))

    def as_dict(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            measures = {name: getattr(row, name) for name in MEASURES}
            known = {name: value if math.isfinite(value) else None for name, value in measures.items()}
            rows.append({"name": row.name, "yardstick": row.yardstick, **known, "coverage": row.coverage})
        found = {"horizon": self.horizon, "windows": self.windows, "season": self.season, "rows": rows}
        return found | {"best": {name: self.best(name).name for name in MEASURES}, "notes": list(self.notes)}


def backtest(
    model: Forecaster | str,
    table: SeriesTable,
    *,
    horizon: int,
    windows: int,
    interval: Sequence[float] = LEVELS,
    season: int = 0,
) -> Backtest:
    """Raises TersorError where the table is too short for a look-back and the windows."""
    if horizon < 1 or windows < 1:
        raise TersorError(f"a backtest needs a horizon and windows of 1 or more, not {horizon} and {windows}")
    levels = check_levels(interval)
    prepared = scaled(table, Memory() if isinstance(model, str) else model.memory)
    notes = [*table.notes, *([] if isinstance(model, str) else prepared.notes)]
    starts = [len(values) - horizon * windows for values in prepared.values]
    if min(starts) < 1:
        raise TersorError(
            f"the shortest series has {prepared.table.rows} rows, {windows} windows of {horizon} need more than "
            f"{windows * horizon}"
        )
    learned = tuple(min(rows, start) for rows, start in zip(prepared.learned, starts, strict=True))
    if isinstance(model, str):
        prepared = _learned_to(prepared, learned)
        model = yardstick_of(model, prepared, horizon, season)
    season = season or prepared.table.step.season()
    ridge_back = model.look_back if not model.yardstick else max(1, min(max(2 * horizon, 2 * season), min(starts) // 3))
    everyone = [model] + [
        each for each in _yardsticks(prepared, learned, horizon, season, ridge_back, notes) if each.name != model.name
    ]
    look_back = max(each.look_back for each in everyone)
    check_rows(
        prepared, look_back + horizon * windows, f"a look-back of {look_back} and {windows} windows of {horizon}"
    )
    if not model.yardstick:
        _tell_leaks(prepared, starts, horizon, windows, notes)
    if model.rolls(horizon):
        notes.append(
            f"the horizon {horizon} is beyond the trained {model.trained}: the forecast is fed back in (rolled)"
        )
    if season == 1:
        notes.append("no season is known: --season ROWS says it; until then MASE is in steps of the last value")
    origins = [(n, start + k * horizon) for n, start in enumerate(starts) for k in range(windows)]
    naive = _naive_errors(prepared, starts, season)
    if bool((naive == 0).any()):
        notes.append("columns that repeat themselves exactly before the windows are left out of MASE")
    rows = []
    for each in everyone:
        shares: dict[str, float] = {}
        error = errors_at(each, prepared, origins, horizon)
        if levels:
            try:
                known = calibrated(each, prepared, horizon, levels, look_back=look_back, end=starts, measure=False)
                shares = {
                    f"{level:g}": share for level, share in zip(levels, coverage(error.abs(), known.radii), strict=True)
                }
            except TersorError as told:
                notes.append(f"no coverage: {told}")
        rows.append(_row(each, error, naive, shares))
    return Backtest(
        rows=tuple(rows),
        horizon=horizon,
        windows=windows,
        season=season,
        first=span(prepared, 0, starts[0], len(prepared.values[0]) - 1),
        notes=tuple(dict.fromkeys(notes)),
    )


def _yardsticks(
    prepared: ScaledTable, learned: Sequence[int], horizon: int, season: int, look_back: int, notes: list[str]
) -> list[Forecaster]:
    weights = None
    try:
        series = [values[:rows] for values, rows in zip(prepared.values, learned, strict=True)]
        weights = fit_ridge(series, look_back=look_back, horizon=horizon)
    except TersorError as told:
        notes.append(f"no ridge: {told}")
    return yardsticks(season, look_back, weights)


def _learned_to(prepared: ScaledTable, rows: Sequence[int]) -> ScaledTable:
    return ScaledTable(prepared.table, prepared.values, prepared.scales, tuple(rows), prepared.notes)


def _tell_leaks(prepared: ScaledTable, starts: Sequence[int], horizon: int, windows: int, notes: list[str]) -> None:
    """A note where windows hold rows that the model was trained on."""
    seen = sum(
        sum(start + k * horizon < learned for k in range(windows))
        for start, learned in zip(starts, prepared.learned, strict=True)
    )
    if seen:
        notes.append(
            f"{seen} of {windows * len(starts)} windows hold rows that the model was trained on, so its errors are too small: "
            "take fewer windows, or a model trained on earlier rows"
        )


def _naive_errors(prepared: ScaledTable, starts: Sequence[int], season: int) -> Tensor:
    """(S, N): the mean absolute error of the last season's value, on the rows before the windows; 0 where there is none."""
    found = []
    for values, start in zip(prepared.values, starts, strict=True):
        lag = season if start > season else 1
        change = (values[lag:start] - values[: start - lag]).abs().double()
        found.append(change.mean(0) if len(change) else torch.zeros(values.shape[1], dtype=torch.float64))
    return torch.stack(found)


def _row(forecaster: Forecaster, error: Tensor, naive: Tensor, shares: dict[str, float]) -> Row:
    """error (S * windows, H, N), naive (S, N)."""
    absolute = error.abs().double()
    by_column = absolute.reshape(len(naive), -1, absolute.shape[2]).mean(1)  # (S, N)
    moved = naive > 0
    return Row(
        forecaster.name,
        forecaster.yardstick,
        float(error.double().square().mean()),
        float(absolute.mean()),
        float((by_column[moved] / naive[moved]).mean()),
        shares,
    )
