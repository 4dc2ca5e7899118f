"""The plots of a report as plotly figures: plain values, drawn in the page by plotly.js.

Colours are names of the page's style (`--series-1`, ...), which the page's script replaces by those of the present theme.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor, log10
from typing import Any

from tersor.report.data import Layer, Report, Result, shortened

Figure = dict[str, Any]
SERIES = [f"--series-{n}" for n in range(1, 9)]
MEGABYTE = 1e6


def _figure(data: list[Any], height: int, **layout: Any) -> Figure:
    return {"data": data, "layout": {"height": height, "margin": {"l": 60, "r": 15, "t": 15, "b": 45}, **layout}}


def size_figure(report: Report, results: Sequence[Result]) -> Figure:
    """One bar a model: what its tensors take, by role."""
    kinds = list(dict.fromkeys(part.kind for each in results for part in each.sizes.everything))
    names = [report.label(each) for each in results]
    data = []
    for n, kind in enumerate(kinds):
        sizes = [sum(p.bytes for p in each.sizes.everything if p.kind == kind) / MEGABYTE for each in results]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": kind,
                "y": names,
                "x": sizes,
                "marker": {"color": SERIES[n % len(SERIES)]},
                "hovertemplate": "%{y}<br>" + kind + ": %{x:.2f} MB<extra></extra>",
            }
        )
    return _figure(
        data,
        140 + 44 * len(names),
        barmode="stack",
        xaxis={"ticksuffix": " MB", "nticks": 6},
        yaxis={"automargin": True, "autorange": "reversed"},
        legend=_legend_below(),
        margin={"l": 60, "r": 15, "t": 10, "b": 40},
    )


def packed_figure(result: Result) -> Figure | None:
    """What a packed weight's bits go to."""
    sizes = result.sizes
    if not sizes.packed_weights:
        return None
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part.kind,
            "y": ["a weight"],
            "x": [8 * part.bytes / sizes.packed_weights],
            "marker": {"color": SERIES[n % len(SERIES)]},
            "hovertemplate": part.kind + ": %{x:.3f} bits<extra></extra>",
        }
        for n, part in enumerate(sizes.packed)
    ]
    return _figure(
        data,
        190,
        barmode="stack",
        xaxis={"nticks": 8},
        yaxis={"showticklabels": False},
        legend=_legend_below(),
        margin={"l": 15, "r": 15, "t": 10, "b": 40},
    )


def confidence_figure(result: Result) -> Figure | None:
    """KL divergence by the original's confidence, with the mean's interval and the noise floor."""
    if not result.compared:
        return None
    data: list[Any] = []
    shapes: list[Any] = []
    notes: list[Any] = []
    names = shortened([each.text for each in result.compared])
    logarithmic = all(
        v > 0 for each in result.compared for v in (each.found.kl.mean, *(b.kl for b in each.found.buckets))
    )
    for n, each in enumerate(result.compared):
        found = each.found
        x = [*(f"{b.low:.2f}<br>to {b.high:.2f}" for b in found.buckets), "all"]
        half = found.kl.half_width
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": names[each.text],
                "x": x,
                "y": [*(b.kl for b in found.buckets), found.kl.mean],
                "error_y": {"type": "data", "array": [*(0 for _ in found.buckets), half or 0], "thickness": 2},
                "marker": {"color": SERIES[n % len(SERIES)], "size": 11},
                "hovertemplate": "%{x}: %{y:.4g} nats<extra>" + names[each.text] + "</extra>",
            }
        )
        noise = found.noise_floor
        if noise is not None and (noise > 0 or not logarithmic):
            line = {"color": "--warn", "dash": "dash", "width": 2}
            shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": noise, "y1": noise, "line": line})
            height = log10(noise) if logarithmic else noise
            said = {"text": "noise floor", "showarrow": False, "yanchor": "bottom", "xanchor": "left"}
            notes.append({**said, "xref": "paper", "x": 0.01, "y": height, "font": {"color": "--warn"}})
    axis: dict[str, Any] = {"type": "log", "dtick": 1} if logarithmic else {"rangemode": "tozero"}
    floors = [each.found.noise_floor for each in result.compared if each.found.noise_floor]
    if logarithmic and floors:
        highest = max(v for each in result.compared for v in (each.found.kl.mean, *(b.kl for b in each.found.buckets)))
        axis["range"] = [log10(min(floors)) - 0.3, log10(2 * highest)]
    return _figure(
        data,
        280,
        xaxis={"type": "category", "tickangle": 0},
        yaxis={"title": {"text": "KL, nats"}, **axis},
        shapes=shapes,
        annotations=notes,
        showlegend=len(data) > 1,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 70, "r": 15, "t": 25, "b": 50},
    )


Measure = Callable[[Layer], float | None]
MEASURES: dict[
    str, tuple[str, Measure, str]
] = {  # key: what a cell says, its value, and how values of a cell are put together
    "cost": ("what it costs", lambda each: _cost(each), "sum"),
    "error": ("error that the method reports", lambda each: each.error, "sum"),
    "relative_error": ("‖W - Q‖ / ‖W‖", lambda each: each.relative_error, "mean"),
    "bits": ("bits a weight on disk", lambda each: each.bits, "mean"),
    "condition": ("condition of the Hessian, at least", lambda each: each.condition, "max"),
    "damp": ("damping", lambda each: each.damp, "max"),
    "tokens": ("calibration tokens", lambda each: None if each.tokens is None else float(each.tokens), "min"),
    "seconds": ("seconds to solve", lambda each: each.seconds, "sum"),
}
LOGARITHMIC = ("error", "condition")


def _cost(layer: Layer) -> float | None:
    if layer.kl is None:
        return None
    return layer.kl if layer.restored is None else (layer.kl + layer.restored) / 2


def measures_of(layers: Sequence[Layer]) -> list[str]:
    """The measures that are known of at least one layer."""
    return [key for key, (_, value, _) in MEASURES.items() if any(value(each) is not None for each in layers)]


def value_of(layer: Layer, key: str) -> float | None:
    return MEASURES[key][1](layer)


def label_of(result: Result, key: str) -> str:
    """The name of a value; a cost is named after what the attribution measured."""
    measure = (result.attributed or {}).get("measure") or "KL"
    return f"{measure} that it costs{', nats' if measure == 'KL' else ''}" if key == "cost" else MEASURES[key][0]


def heat_map(layers: Sequence[Layer], key: str, what: str) -> Figure:
    """Depth from left to right, projections from top to bottom. Experts of one block share a cell. what: the value in words."""
    _, value, together = MEASURES[key]
    kinds = list(dict.fromkeys(each.kind for each in layers if value(each) is not None))
    depths = sorted({each.depth for each in layers})
    cells: dict[tuple[str, int], list[float]] = {}
    for each in layers:
        found = value(each)
        if found is not None:
            cells.setdefault((each.kind, each.depth), []).append(found)

    def of_cell(kind: str, depth: int) -> float | None:
        values = cells.get((kind, depth))
        if not values:
            return None
        return {"sum": sum(values), "mean": sum(values) / len(values), "max": max(values), "min": min(values)}[together]

    z = [[of_cell(kind, depth) for depth in depths] for kind in kinds]
    logarithmic = key in LOGARITHMIC and all(v is None or v > 0 for row in z for v in row)
    shown = [[None if v is None else log10(v) for v in row] for row in z] if logarithmic else z
    flat = [v for row in shown for v in row if v is not None]
    bar: dict[str, Any] = {"thickness": 12, "outlinewidth": 0}
    if logarithmic and flat:
        bar |= _log_ticks(min(flat), max(flat))
    trace = {
        "type": "heatmap",
        "x": depths,
        "y": kinds,
        "z": shown,
        "customdata": z,
        "colorscale": "Viridis",
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
        "colorbar": bar,
        "hovertemplate": "block %{x}, %{y}<br>" + what + ": %{customdata:.4g}<extra></extra>",
    }
    return _figure(
        [trace],
        110 + 24 * len(kinds),
        xaxis={"title": {"text": "block"}, "dtick": max(1, len(depths) // 12), "showgrid": False},
        yaxis={"automargin": True, "autorange": "reversed", "showgrid": False, "type": "category"},
        margin={"l": 60, "r": 10, "t": 10, "b": 45},
    )


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten where there are few powers between, at the powers elsewhere."""
    steps = (1, 2, 5) if high - low < 3 else (1,)
    values = [step * 10**power for power in range(floor(low), ceil(high) + 1) for step in steps]
    inside = [each for each in values if low <= log10(each) <= high] or [10**low, 10**high]
    return {"tickvals": [log10(each) for each in inside], "ticktext": [f"{each:,g}" for each in inside]}


def experts_figure(layers: Sequence[Layer]) -> Figure | None:
    """How many calibration tokens reached each expert, block by block: the least over its maps."""
    tokens: dict[tuple[int, str], int] = {}
    for each in layers:
        if "*" in each.kind and each.tokens is not None:
            place = each.depth, _expert_number(each.name)
            tokens[place] = min(each.tokens, tokens.get(place, each.tokens))
    if not tokens:
        return None
    depths = sorted({depth for depth, _ in tokens})
    experts = sorted({number for _, number in tokens}, key=int)
    trace = {
        "type": "heatmap",
        "x": [int(each) for each in experts],
        "y": depths,
        "z": [[tokens.get((depth, number)) for number in experts] for depth in depths],
        "colorscale": "Viridis",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"thickness": 12, "outlinewidth": 0},
        "hovertemplate": "block %{y}, expert %{x}: %{z} tokens<extra></extra>",
    }
    return _figure(
        [trace],
        min(420, 110 + 22 * len(depths)),
        xaxis={"title": {"text": "expert"}, "showgrid": False},
        yaxis={
            "title": {"text": "block"},
            "autorange": "reversed",
            "showgrid": False,
            "dtick": max(1, len(depths) // 12),
        },
    )


def _expert_number(name: str) -> str:
    """The number behind `experts` in a layer's name."""
    parts = name.split(".")
    at = next(n for n, part in enumerate(parts) if part in ("expert", "experts"))
    return next(part for part in parts[at:] if part.isdecimal())


def timeline_figure(result: Result) -> Figure | None:
    """Memory at the end of each block over the time since the job began its first."""
    blocks = [each for each in result.run.get("blocks") or () if isinstance(each, dict)]
    if not blocks:
        return None
    ends: list[float] = []
    for each in blocks:
        ends.append((ends[-1] if ends else 0.0) + float(each.get("seconds") or 0))
    names = [each.get("name") or "first run" for each in blocks]
    memory = [None if each.get("memory") is None else each["memory"] / 1e9 for each in blocks]
    return _figure(
        [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": ends,
                "y": memory,
                "text": names,
                "line": {"color": SERIES[0]},
                "fill": "tozeroy",
                "fillcolor": "--fill-1",
                "hovertemplate": "%{text} finished at %{x:.1f} s<br>%{y:.3f} GB<extra></extra>",
            }
        ],
        250,
        xaxis={"title": {"text": "seconds"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "GB held"}, "rangemode": "tozero"},
    )


def frontier_figure(report: Report, anchors: Sequence[str]) -> Figure | None:
    """Size and loss of each result; the larger the point, the faster. anchors: where in the page each is."""
    points = [(each, loss_of(each)) for each in report.results]
    known = [(each, loss) for each, loss in points if loss is not None]
    if len(known) < 2:
        return None
    best = frontier([(each.sizes.files, loss) for each, loss in known])
    speeds = [each.speed.decode[0] if each.speed else None for each, _ in known]
    fastest = max((speed for speed in speeds if speed is not None), default=None)
    line = sorted((known[n][0].sizes.files / MEGABYTE, known[n][1]) for n in best)
    links = {each.name: anchor for each, anchor in zip(report.results, anchors, strict=True)}
    told = ["" if speed is None else f"<br>{speed:.1f} tokens a second" for speed in speeds]
    return _figure(
        [
            {
                "type": "scatter",
                "mode": "lines",
                "x": [x for x, _ in line],
                "y": [y for _, y in line],
                "line": {"color": "--muted", "dash": "dot", "shape": "hv"},
                "hoverinfo": "skip",
                "showlegend": False,
            },
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [each.sizes.files / MEGABYTE for each, _ in known],
                "y": [loss for _, loss in known],
                "text": [report.label(each) for each, _ in known],
                "textposition": "top center",
                "cliponaxis": False,
                "customdata": [[links[each.name], told[n]] for n, (each, _) in enumerate(known)],
                "marker": {
                    "color": SERIES[0],
                    "size": [12 if not (s and fastest) else 8 + 14 * s / fastest for s in speeds],
                },
                "hovertemplate": "%{text}<br>%{x:.2f} MB, %{y:.4g}%{customdata[1]}<extra></extra>",
                "showlegend": False,
            },
        ],
        340,
        xaxis={"title": {"text": "MB on disk"}, "rangemode": "tozero"},
        yaxis={"title": {"text": loss_name(report)}, "rangemode": "tozero"},
        margin={"l": 60, "r": 30, "t": 30, "b": 45},
    )


def loss_of(result: Result) -> float | None:
    """KL from the original: as measured for this report, else as the job found it on its sample."""
    if result.compared:
        return result.compared[0].found.kl.mean
    kept = result.run.get("divergence")
    return float(kept) if isinstance(kept, int | float) else None


def loss_name(report: Report) -> str:
    return "KL from the original, nats" if report.results[0].compared else "KL on the job's sample, nats"


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other point beats: better in one way and no worse in the other."""
    return [
        n for n, (x, y) in enumerate(points) if not any((a <= x and b <= y) and (a < x or b < y) for a, b in points)
    ]


def _legend_below() -> dict[str, Any]:
    return {"orientation": "h", "y": -0.25, "yanchor": "top", "x": 0, "traceorder": "normal"}
