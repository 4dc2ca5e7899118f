"""`tersor backtest`: how a forecaster would have done, beside three yardsticks."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from tersor.cli.forecast import Data, Fill, Id, Season, Target, Time, Weights, levels_of
from tersor.cli.notes import show_notes
from tersor.cli.options import AsJson, Device, print_json
from tersor.cli.table import table
from tersor.data.tables import TableConfig, read_series
from tersor.errors import TersorError
from tersor.tasks.backtest import MEASURES, Backtest
from tersor.tasks.backtest import backtest as run_backtest
from tersor.tasks.forecast_table import as_trained, open_model


def backtest(
    model: Annotated[
        str,
        typer.Argument(
            help="The directory of a trained forecaster, with --checkpoint an architecture of `tersor models forecast`, or "
            "repeat-last, seasonal-naive or ridge."
        ),
    ],
    data: Data,
    horizon: Annotated[int, typer.Option("--horizon", min=1, help="Rows of each window.")],
    windows: Annotated[int, typer.Option("--windows", min=1, help="How many windows, at the end of each series.")] = 8,
    time: Time = "",
    target: Target = "",
    id: Id = "",
    fill: Fill = "",
    interval: Annotated[str, typer.Option(help="Levels of the intervals in percent; `none` for none.")] = "80,95",
    season: Season = 0,
    checkpoint: Weights = None,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Evaluate a forecaster on the last windows of a table. Beside it stand repeat-last, seasonal-naive and ridge.

    Rolling origin: before each window, all earlier rows are known; nothing is trained again. The best of each column is
    marked with a star, also where it is a yardstick.

    Example: `tersor backtest my-run --data sales.csv --horizon 24 --windows 8`.
    """
    levels = levels_of(interval)
    opened = open_model(model, checkpoint=checkpoint, device=device)
    series = read_series(data, as_trained(opened, TableConfig(time=time, target=target, id=id, fill=fill)))
    try:
        found = run_backtest(opened, series, horizon=horizon, windows=windows, interval=levels, season=season)
    except TersorError as error:
        raise TersorError(f"{data}: {error}") from None
    if as_json:
        print_json(found.as_dict())
        return
    show_notes(found.notes)
    typer.echo(f"{found.windows} windows of {found.horizon} rows, {found.first}")
    for line in _lines(found):
        typer.echo(line)
    typer.echo(_verdict(found))


def _lines(found: Backtest) -> list[str]:
    levels = list(dict.fromkeys(level for row in found.rows for level in row.coverage))
    head = ["", *(name.upper() for name in MEASURES), *(f"in {level} %" for level in levels)]
    rows = []
    for row in found.rows:
        name = f"{row.name} (yardstick)" if row.yardstick else row.name
        cells = [_cell(getattr(row, each), best=found.best(each) is row) for each in MEASURES]
        rows.append([name, *cells, *(_share(row.coverage.get(level)) for level in levels)])
    return table(head, rows)


def _cell(value: float, *, best: bool) -> str:
    return f"{'-' if math.isnan(value) else f'{value:.4f}'}{'*' if best else ' '}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _verdict(found: Backtest) -> str:
    """One line on the least MSE, by how much, and against what."""
    best = found.best("mse")
    rest = [row for row in found.rows if row is not best]
    if not rest:
        return f"* {best.name}"
    second = min(rest, key=lambda row: row.mse)
    lead = 1 - best.mse / second.mse if second.mse > 0 else 0.0
    kind = ", a yardstick," if best.yardstick else ""
    return f"* least MSE: {best.name}{kind} {100 * lead:.1f} % below {second.name}"
