"""`tersor.forecast`: what comes after a table, with intervals, as a table of the same kind.

    later = tersor.forecast("run", frame, horizon=24)      # pandas or polars in and out: ds, y, y-lo-80, y-hi-80, ...

Intervals are split conformal (evaluate.conformal). Half of the windows that the model has not learned from say how far off it
is; the other half, later in time, measures how often the intervals hold. Columns and series are scaled as in training. A
series that the model does not know is scaled by its own first 70 %, which then counts as learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tersor.data.columns import frame_columns, frame_like
from tersor.data.series_memory import Memory, ScaledTable, scaled
from tersor.data.tables import SeriesTable, TableConfig, series_of, told
from tersor.errors import TersorError
from tersor.evaluate.conformal import LEVELS, check_levels
from tersor.evaluate.yardstick_names import RIDGE, SEASONAL_NAIVE, YARDSTICKS, check_spelling
from tersor.evaluate.yardsticks import fit_ridge
from tersor.tasks.forecaster import Forecaster, model_forecaster, open_forecaster, yardsticks
from tersor.tasks.origins import Intervals, calibrated, check_rows, windows_at

MOST_HORIZON = 1 << 20
ROW = "row"  # what the time is called where the table has none


@dataclass(frozen=True)
class Forecast:
    """The rows after a table's last ones, in its own units."""

    table: SeriesTable  # what it goes on from, as the model saw it
    model: str
    times: tuple[np.ndarray, ...]  # of each series (H,)
    values: tuple[np.ndarray, ...]  # of each series (H, N)
    radii: tuple[np.ndarray, ...]  # of each series (levels, H, N): the interval is value - radius to value + radius
    intervals: Intervals | None
    trained: int | None  # the model's own horizon; None: any
    notes: tuple[str, ...]

    @property
    def levels(self) -> tuple[float, ...]:
        return self.intervals.levels if self.intervals else ()

    def columns(self) -> dict[str, np.ndarray]:
        """As a table: id and time, then for each column its forecast and the ends of its intervals."""
        table, sizes = self.table, [len(times) for times in self.times]
        made: dict[str, np.ndarray] = {}
        if table.id_name:
            made[table.id_name] = np.repeat(np.array(table.ids, dtype=object), sizes)
        made[table.time_name or (ROW if ROW not in table.names else f"{ROW} number")] = np.concatenate(self.times)
        values, radii = np.concatenate(self.values), np.concatenate(self.radii, 1) if self.levels else None
        for n, name in enumerate(table.names):
            made[name] = values[:, n]
            if radii is not None:
                for level, radius in zip(self.levels, radii[..., n], strict=True):
                    made[f"{name}-lo-{level:g}"] = values[:, n] - radius
                    made[f"{name}-hi-{level:g}"] = values[:, n] + radius
        return made

    def coverage(self) -> dict[str, float]:
        """The measured share by level, such as {"80": 0.81}."""
        if self.intervals is None:
            return {}
        return {f"{level:g}": share for level, share in zip(self.levels, self.intervals.coverage, strict=False)}

    def as_dict(self) -> dict[str, Any]:
        columns = {
            name: [told(each) for each in column] if column.dtype.kind == "M" else column.tolist()
            for name, column in self.columns().items()
        }
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        found = {"model": self.model, "horizon": len(self.times[0]), "trained_horizon": self.trained}
        return found | {"coverage": self.coverage(), "notes": list(self.notes), "forecast": rows}


def forecast(
    model: str | Path | nn.Module | Forecaster,
    frame: Any,
    *,
    horizon: int,
    interval: Sequence[float] | None = None,
    time: str = "",
    target: str | Sequence[str] = "",
    id: str = "",
    fill: str = "",
    season: int = 0,
    device: str = "auto",
) -> Any:
    """The `horizon` rows after a pandas or polars frame, as a frame of the same library.

    model: the directory of a trained forecaster, a forecaster of tersor.models, or "repeat-last", "seasonal-naive", "ridge".
    frame: wide, or long with unique_id, ds and y; `time`, `target`, `id` and `fill` as in tersor.data.tables. interval:
    levels in percent; 80 and 95 where the table is long enough, () for none. season: rows, for the seasonal yardstick.
    A pandas frame says in `attrs` the measured coverage and the notes. Raises TersorError where table and model do not go
    together.
    """
    opened = open_model(model, device=device)
    columns = frame_columns(frame)
    config = TableConfig(
        time=time, columns=(target,) if isinstance(target, str) and target else tuple(target), id=id, fill=fill
    )
    table = series_of(columns, as_trained(opened, config))
    made = forecast_series(opened, table, horizon=horizon, interval=interval, season=season)
    found = frame_like(frame, made.columns())
    if hasattr(found, "attrs"):
        found.attrs.update(coverage=made.coverage(), notes=list(made.notes))
    return found


def open_model(
    model: str | Path | nn.Module | Forecaster, *, checkpoint: Path | None = None, device: str = "auto"
) -> Forecaster | str:
    """A forecaster, or the name of a yardstick, which is made of the table."""
    if isinstance(model, Forecaster):
        return model
    if isinstance(model, nn.Module):
        return model_forecaster(model)
    if str(model) in YARDSTICKS and checkpoint is None:
        return str(model)
    check_spelling(str(model))
    return open_forecaster(model, checkpoint=checkpoint, device=device)


def as_trained(forecaster: Forecaster | str, config: TableConfig) -> TableConfig:
    """The config, with the columns as in training where the user does not name any."""
    if isinstance(forecaster, str) or not forecaster.memory.columns:
        return config
    memory = forecaster.memory
    said = bool(config.target or config.columns)
    return replace(
        config,
        time=config.time or memory.time,
        columns=config.columns if said else memory.columns,
        id=config.id or memory.id,
    )


def forecast_series(
    model: Forecaster | str,
    table: SeriesTable,
    *,
    horizon: int,
    interval: Sequence[float] | None = None,
    season: int = 0,
) -> Forecast:
    """interval: levels in percent, which must be reached; None: 80 and 95 where the table is long enough."""
    if not 1 <= horizon <= MOST_HORIZON:
        raise TersorError(f"a horizon is 1 to {MOST_HORIZON} rows, not {horizon}")
    if season and model not in (SEASONAL_NAIVE, RIDGE):
        raise TersorError(f"--season {season} is for {SEASONAL_NAIVE} and {RIDGE}; the model has no such setting")
    levels = check_levels(LEVELS if interval is None else interval)
    prepared = scaled(table, Memory() if isinstance(model, str) else model.memory)
    forecaster = yardstick_of(model, prepared, horizon, season) if isinstance(model, str) else model
    check_rows(prepared, forecaster.look_back, f"the look-back of {forecaster.name}")
    notes = [*table.notes, *([] if isinstance(model, str) else prepared.notes)]
    if forecaster.rolls(horizon):
        notes.append(
            f"the horizon {horizon} is beyond the trained {forecaster.trained}: the forecast is fed back in (rolled), and its "
            "errors grow"
        )
    intervals = None
    if levels:
        try:
            intervals = calibrated(forecaster, prepared, horizon, levels, look_back=forecaster.look_back)
        except TersorError as error:
            if interval is not None:
                raise
            notes.append(f"no intervals: {error}")
    if intervals is not None and not intervals.held_out:
        notes.append("the intervals' coverage is not measured: no window is left for it")
    ends = [(n, len(values)) for n, values in enumerate(prepared.values)]
    x, last = windows_at(prepared, ends, forecaster.look_back)
    made = forecaster(x, last, prepared.table.step, horizon).double().numpy()
    after = prepared.table.step.after(last, np.arange(1, horizon + 1))
    with np.errstate(over="ignore"):
        values = tuple(each * scale.std + scale.mean for each, scale in zip(made, prepared.scales, strict=True))
    if not all(bool(np.isfinite(each).all()) for each in values):
        raise TersorError(
            f"{forecaster.name} forecasts values beyond the largest number of 64 bits; divide the table by some"
        )
    radii = [
        intervals.radii.double().numpy() * scale.std if intervals else np.empty((0, horizon, made.shape[2]))
        for scale in prepared.scales
    ]
    return Forecast(
        table=prepared.table,
        model=forecaster.name,
        times=tuple(after),
        values=values,
        radii=tuple(radii),
        intervals=intervals,
        trained=forecaster.trained,
        notes=tuple(notes),
    )


def yardstick_of(name: str, prepared: ScaledTable, horizon: int, season: int) -> Forecaster:
    """A yardstick by its name; ridge looks back over two seasons and twice the horizon, a quarter of the rows at most."""
    season = season or prepared.table.step.season()
    look_back = max(1, min(max(2 * horizon, 2 * season), prepared.table.rows // 4))
    weights = None
    if name == RIDGE:
        learned = [values[:rows] for values, rows in zip(prepared.values, prepared.learned, strict=True)]
        weights = fit_ridge(learned, look_back=look_back, horizon=horizon)
    found = {each.name: each for each in yardsticks(season, look_back, weights)}
    if name not in found:
        raise TersorError(
            f"{name} needs a season, which a step of {prepared.table.step} does not say; --season ROWS says it"
        )
    return found[name]
