"""A forecast as a picture: the last rows, what comes after them, and the intervals; one panel a column or series."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tersor.errors import TersorError

if TYPE_CHECKING:
    from tersor.tasks.forecast_table import Forecast

SUFFIXES = (".png", ".svg", ".pdf")
MOST_PANELS = 6
SHOWN = 3  # horizons of the past, and no fewer rows than MIN_ROWS
MIN_ROWS = 48
PAST, AHEAD = "#3b3b3b", "#1f6fb4"


def check_plot(path: Path) -> None:
    """Raise TersorError where no picture can be written: before anything is computed."""
    if path.suffix.lower() not in SUFFIXES:
        raise TersorError(f"--plot {path}: pictures end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise TersorError("--plot needs matplotlib: pip install 'tersor[plots]'") from None


def plot_forecast(forecast: Forecast, path: Path, kind: str) -> None:
    """Write a picture (kind "png", "svg", "pdf") of at most MOST_PANELS panels; its title says how many are left out."""
    import matplotlib
    from matplotlib.figure import Figure

    table = forecast.table
    panels = [(series, column) for series in range(len(table.ids)) for column in range(len(table.names))]
    shown = panels[:MOST_PANELS]
    figure = Figure(figsize=(9, 1.2 + 2.1 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axis, (series, column) in zip(axes, shown, strict=True):
        _panel(axis, forecast, series, column)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize="small", frameon=False)
    left = f" ({len(panels) - len(shown)} more are not shown)" if len(panels) > len(shown) else ""
    figure.suptitle(f"{forecast.model}: the next {len(forecast.times[0])} rows{left}", fontsize="medium")
    metadata = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "tersor", "svg.fonttype": "none"}):  # equal forecasts, equal files
        figure.savefig(path, format=kind, metadata=metadata, dpi=120)


def _panel(axis: Any, forecast: Forecast, series: int, column: int) -> None:
    table = forecast.table
    ahead, made = forecast.times[series], forecast.values[series][:, column]
    rows = max(SHOWN * len(ahead), MIN_ROWS)
    times, known = table.times[series][-rows:], table.values[series][-rows:, column]
    axis.plot(times, known, color=PAST, linewidth=1.0, label="known")
    axis.plot(np.append(times[-1:], ahead), np.append(known[-1:], made), color=AHEAD, linewidth=1.4, label="forecast")
    for level, radius in reversed(list(zip(forecast.levels, forecast.radii[series][..., column], strict=True))):
        alpha = 0.12 + 0.14 * (level < max(forecast.levels))
        share = forecast.coverage().get(f"{level:g}")
        label = f"{level:g} %" + ("" if share is None else f" (held {100 * share:.0f} % when tried)")
        axis.fill_between(ahead, made - radius, made + radius, color=AHEAD, alpha=alpha, linewidth=0, label=label)
    axis.set_ylabel(" ".join(filter(None, (table.ids[series], table.names[column])))[:24])
    axis.margins(x=0.01)
    axis.tick_params(labelsize="small")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
