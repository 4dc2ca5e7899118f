"""What was lost where, as a picture: a heat map by depth and kind of layer, the most costly layers, and the cumulative curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.evaluate.attribution import Attribution, Row, cumulative

SHOWN = 12  # bars
ALONE, RESTORED = "#1f6fb4", "#d08a2e"


def plot_attribution(found: Attribution, path: Path, kind: str) -> None:
    """Write a picture (kind "png", "svg", "pdf")."""
    import matplotlib
    from matplotlib.figure import Figure

    inside = [row for row in found.rows if row.depth is not None]
    kinds = kinds_of(inside)
    height = 2.4 + 0.28 * max(len(kinds), 1) + 0.3 * min(SHOWN, len(found.rows))
    figure = Figure(figsize=(10, max(5.0, height)), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(0.6 + 0.28 * max(len(kinds), 1), 1 + 0.3 * SHOWN / 2))
    if inside:
        _heat_map(figure, figure.add_subplot(grid[0, :]), inside, kinds, found.measure)
    _bars(figure.add_subplot(grid[1, 0]), found)
    _curve(figure.add_subplot(grid[1, 1]), found)
    left = f"; {len(found.left)} not measured" if found.left else ""
    figure.suptitle(
        f"{found.model} against {found.base}: {found.measure} {found.total_kl:.4g} on {found.text}{left}",
        fontsize="medium",
    )
    metadata = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "tersor", "svg.fonttype": "none"}):  # equal results, equal files
        figure.savefig(path, format=kind, metadata=metadata, dpi=120)


def kinds_of(rows: Sequence[Row]) -> list[str]:
    """Kinds of layers: those of the first blocks come first, by their cost there."""
    ordered = sorted(rows, key=lambda row: row.depth or 0)
    return list(dict.fromkeys(row.kind for row in ordered))


def heat_of(rows: Sequence[Row], kinds: Sequence[str]) -> np.ndarray:
    """Costs [kinds, depths]; NaN where there is no such layer, or it was not measured."""
    depths = max(row.depth for row in rows if row.depth is not None) + 1
    heat = np.full((len(kinds), depths), np.nan)
    for row in rows:
        heat[kinds.index(row.kind), row.depth] = row.cost
    return heat


def _heat_map(figure: Any, axis: Any, rows: Sequence[Row], kinds: Sequence[str], measure: str) -> None:
    heat = heat_of(rows, kinds)
    drawn = axis.imshow(heat, aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set_yticks(range(len(kinds)), [name[:40] for name in kinds], fontsize="small")
    axis.set_xlabel("block", fontsize="small")
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(drawn, ax=axis, label=f"{measure}, mean of both directions")


def _bars(axis: Any, found: Attribution) -> None:
    rows = found.rows[:SHOWN]
    places = np.arange(len(rows))[::-1]
    for offset, color, label, name, half in (
        (0.2, ALONE, "alone in the original", "kl", "half_width"),
        (-0.2, RESTORED, "restored in the compressed", "restored", "restored_half_width"),
    ):
        values = [getattr(row, name) for row in rows]
        errors = [getattr(row, half) or 0.0 for row in rows]
        axis.barh(
            places + offset, values, height=0.38, xerr=errors, color=color, label=label, error_kw={"linewidth": 0.8}
        )
    axis.set_yticks(places, [_short(row) for row in rows], fontsize="small")
    axis.set_xlabel(found.measure, fontsize="small")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize="small", frameon=False)


def _short(row: Row) -> str:
    return row.name[:40] if row.depth is None else f"{row.depth}: {row.kind[:36]}"


def _curve(axis: Any, found: Attribution) -> None:
    shares = cumulative(found.rows)
    axis.plot(range(len(shares) + 1), [0.0, *(100 * share for share in shares)], color=ALONE)
    axis.set_xlabel("most costly layers" if found.by == "layer" else "most costly blocks", fontsize="small")
    axis.set_ylabel("share of all costs, %", fontsize="small")
    axis.set_ylim(0, 105)
    axis.grid(alpha=0.3)
