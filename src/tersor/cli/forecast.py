"""`tersor forecast`: what comes after the user's own table."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.notes import show_notes
from tersor.cli.options import AsJson, Device, print_json, refuse_to_replace, refuse_without_folder, spare
from tersor.data.tables import TableConfig, read_series, told
from tersor.errors import TersorError
from tersor.files import replacing
from tersor.report.forecast_plot import check_plot, plot_forecast
from tersor.tasks.forecast_table import Forecast, as_trained, forecast_series, open_model

MOST_PRINTED = 40  # rows on a terminal

Data = Annotated[Path, typer.Option("--data", help="CSV (.gz too) or Parquet file, wide or long (unique_id, ds, y).")]
Time = Annotated[str, typer.Option("--time", help="Column of the time stamps; else found by name or content.")]
Target = Annotated[
    str, typer.Option("--target", help="Columns to forecast, separated by commas; else all that are left.")
]
Id = Annotated[
    str, typer.Option("--id", help="Column that says which series a row is of; else unique_id, if there is one.")
]
Fill = Annotated[
    str, typer.Option("--fill", help="How to fill gaps, text and irregular stamps: previous, linear or zero.")
]
Season = Annotated[
    int,
    typer.Option("--season", min=0, help="Rows of a season, for the seasonal yardstick; 0: by the step of the table."),
]
Weights = Annotated[
    Path | None, typer.Option(help="The official weights of the architecture: .pth, .pt, .bin or .safetensors.")
]


def forecast(
    model: Annotated[
        str,
        typer.Argument(
            help="The directory of a trained forecaster, with --checkpoint an architecture of `tersor models forecast`, or "
            "repeat-last, seasonal-naive or ridge."
        ),
    ],
    data: Data,
    horizon: Annotated[int, typer.Option("--horizon", min=1, help="How many rows to forecast.")],
    time: Time = "",
    target: Target = "",
    id: Id = "",
    fill: Fill = "",
    interval: Annotated[
        str | None, typer.Option(help="Levels of the intervals in percent; `none` for none. [default: 80,95]")
    ] = None,
    season: Season = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the forecast into a .png, .svg or .pdf file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the forecast as a CSV or Parquet file.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of --out and --plot where they exist.")
    ] = False,
    checkpoint: Weights = None,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Forecast a table of your own, with intervals and a picture.

    How often the intervals held, on windows that the model has not learned from, is measured and printed. A horizon
    beyond the trained one is rolled, and a note says so.

    Examples: `tersor forecast my-run --data sales.csv --horizon 24 --plot sales.png`,
    `tersor forecast seasonal-naive --data sales.csv --horizon 24 --out next.csv`.
    """
    if plot is not None:
        check_plot(plot)
    if out is not None and out.suffix.lower() not in (".csv", ".parquet"):
        raise TersorError(f"--out {out}: a forecast is written as .csv or .parquet")
    if overwrite and out is None and plot is None:
        raise TersorError("--overwrite is for the files of --out and --plot: give one of them")
    for option, written in (("--out", out), ("--plot", plot)):
        if written is not None:
            refuse_without_folder(option, written)
        spare(data, option, written)
        refuse_to_replace(option, written, overwrite=overwrite)
    levels = None if interval is None else levels_of(interval)
    opened = open_model(model, checkpoint=checkpoint, device=device)
    config = TableConfig(time=time, target=target, id=id, fill=fill)
    table = read_series(data, as_trained(opened, config))
    try:
        made = forecast_series(opened, table, horizon=horizon, interval=levels, season=season)
    except TersorError as error:
        raise TersorError(f"{data}: {error}") from None
    if out is not None:
        _write(made, out)
    if plot is not None:
        with replacing(plot) as partial:
            plot_forecast(made, partial, plot.suffix.lower()[1:])
    if as_json:
        print_json(made.as_dict())
        return
    show_notes(made.notes)
    _print(made, out=out, plot=plot)


def levels_of(text: str) -> tuple[float, ...]:
    if text.strip().lower() == "none":
        return ()
    try:
        return tuple(float(each) for each in text.split(",") if each.strip())
    except ValueError:
        raise TersorError(f"--interval {text}: levels such as 80,95 are expected, or none") from None


def _print(made: Forecast, *, out: Path | None, plot: Path | None) -> None:
    found = made.intervals
    if found is not None and found.coverage:
        shares = ", ".join(
            f"{level:g} % held {100 * share:.1f} %" for level, share in zip(found.levels, found.coverage, strict=True)
        )
        beside = out is None  # the table alone goes to standard output
        typer.echo(f"intervals: {shares} of the values", err=beside)
        typer.echo(f"(calibrated on {found.windows} windows, tried on {found.held_out} later ones)", err=beside)
    if out is not None:
        typer.echo(f"{out}: {sum(len(times) for times in made.times)} rows")
    else:
        _table(made)
    if plot is not None:
        typer.echo(f"{plot}: the picture", err=out is None)


def _table(made: Forecast) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    rows = list(_rows(made))
    shown = rows[: MOST_PRINTED + 1] if sys.stdout.isatty() else rows  # whole in a file or a pipe
    writer.writerows(shown)
    if len(shown) < len(rows):
        typer.echo(f"... {len(rows) - len(shown)} more rows; --out FILE.csv writes all", err=True)


def _rows(made: Forecast, *, exact: bool = False) -> Iterable[list[str]]:
    columns = made.columns()
    yield list(columns)
    kinds = [column.dtype.kind for column in columns.values()]
    for row in zip(*columns.values(), strict=True):
        yield [
            told(cell) if kind == "M" else (repr(float(cell)) if exact else f"{cell:.7g}") if kind == "f" else str(cell)
            for kind, cell in zip(kinds, row, strict=True)
        ]


def _write(made: Forecast, out: Path) -> None:
    with replacing(out) as partial:
        if out.suffix.lower() == ".csv":
            with partial.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(_rows(made, exact=True))
            return
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise TersorError("Parquet files need pyarrow: pip install 'tersor[tables]', or --out FILE.csv") from None
        pyarrow.parquet.write_table(pyarrow.table(dict(made.columns())), partial)
