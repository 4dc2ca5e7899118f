"""`tersor attribute`: which layers of a compressed model cost what."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated

import typer

from tersor.checkpoint.disk import disk_errors
from tersor.checkpoint.room import read_object
from tersor.cli.options import AsJson, Device, finite, print_json, refuse, refuse_without_folder
from tersor.cli.progress import progress_bar
from tersor.cli.table import table
from tersor.errors import TersorError
from tersor.evaluate.attribute import BY, state_file
from tersor.evaluate.attribution import Attribution, Row, Suggestion, cumulative
from tersor.files import replacing
from tersor.report.attribution_plot import plot_attribution
from tersor.report.forecast_plot import check_plot
from tersor.tasks.attribution import attribution
from tersor.tasks.compared import Inputs

SHOWN = 20  # rows; --json and --out hold all
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def attribute(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The compressed model: a directory or hub name.")],
    against: Annotated[str, typer.Option(help="The original.")],
    text: Annotated[list[str] | None, typer.Option(help="A text file, or several. [default: builtin]")] = None,
    images: Annotated[
        Path | None, typer.Option(help="For classifiers: a folder with one subfolder a class, or a packed .npz.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="For forecasters: a table.")] = None,
    by: Annotated[str, typer.Option(help="layer, or block (in a fraction of the time).")] = "layer",
    time_limit: Annotated[str, typer.Option(help="How long layers are exchanged: 90s, 10m, 1h.")] = "10m",
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 256,
    max_eval_samples: Annotated[
        int | None,
        typer.Option(help="Windows of the text (8), images (all), or windows of the table (64) at most."),
    ] = None,
    num_layers: Annotated[int, typer.Option(min=1, help="How many layers are given more bits.")] = 10,
    bits: Annotated[int, typer.Option(help="Bits that they are given.")] = 8,
    suggestion: Annotated[
        bool,
        typer.Option("--suggest/--no-suggest", help="Quantize again with more bits for these layers, and measure."),
    ] = True,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Hold a block of each language model in memory, not both models. [default: where both do not fit]",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write all of it as JSON, and the recipe beside it. A call that was stopped goes on."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it into a .png, .svg or .pdf file.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the layers of a compressed model that cost most. It also tells what more bits for them would bring.

    Each compressed layer is put into the original (alone), and each original layer into the compressed model (restored); the
    change of the divergence is shown with half of its 95 % interval. Blocks come first, then the layers of the costly ones.
    Then the job is done again with more bits for the most costly layers; that takes as long as the job did.

    Example: `tersor attribute demo-3bit --against demo --out lost.json --plot lost.png`.
    """
    if not suggestion:
        refuse(context, "--no-suggest", ("num_layers", "bits"))
    for name, value in (("--images", images), ("--data", data)):
        if value is not None:
            refuse(context, name, ("seq_len",))
    seconds = seconds_of(time_limit)
    if by not in BY:
        raise TersorError(f"--by {by} is not one of {', '.join(BY)}")
    _check_paths(out, plot)
    inputs = Inputs(tuple(map(_text, text or ["builtin"])), images, data, seq_len, max_eval_samples)
    try:
        with progress_bar(quiet=as_json) as progress:
            found = attribution(
                model,
                against,
                inputs,
                by=by,
                seconds=seconds,
                state=None if out is None else state_file(out),
                layers=num_layers,
                bits=bits if suggestion else None,
                stream=stream,
                dtype=dtype,
                device=device,
                progress=progress,
            )
    except KeyboardInterrupt:
        if out is None:
            raise TersorError(
                "interrupted, and nothing is kept: with --out FILE the same command would go on"
            ) from None
        raise
    recipe = _write(found, out)
    if plot is not None:
        with disk_errors(plot), replacing(plot) as partial:
            plot_attribution(found, partial, plot.suffix.lower()[1:])
    if as_json:
        print_json(found.to_json())
        return
    for line in lines_of(found):
        typer.echo(line)
    for path in filter(None, (out, recipe, plot)):
        typer.echo(f"written: {path}")


def seconds_of(text: str) -> float:
    """90s, 10m, 1h or plain seconds. Raises TersorError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(found[1]) * UNITS[found[2] or "s"] if found else 0.0
    if not 0 < seconds < math.inf:
        raise TersorError(f"--time-limit {text}: a time such as 90s, 10m or 1h is expected")
    return seconds


def _text(given: str) -> str | Path:
    return given if given == "builtin" else Path(given)


def _check_paths(out: Path | None, plot: Path | None) -> None:
    """Raise TersorError where nothing can be written, before anything is computed."""
    if plot is not None:
        check_plot(plot)
    for option, path in (("--out", out), ("--plot", plot)):
        if path is not None:
            refuse_without_folder(option, path)
    if out is None:
        return
    if out.suffix.lower() != ".json":
        raise TersorError(f"--out {out}: the result is written as .json")
    if out.exists() and (read_object(out) or {}).get("kind") != "attribution":
        raise TersorError(f"{out} exists and is no attribution; give another --out")
    recipe = out.with_suffix(".yaml")
    if recipe.exists() and not recipe.read_text(encoding="utf-8", errors="replace").startswith("# tersor quantize "):
        raise TersorError(f"{recipe} exists and is no recipe of this command; give another --out")


def _write(found: Attribution, out: Path | None) -> Path | None:
    """The recipe's path, where there is one."""
    if out is None:
        return None
    recipe = out.with_suffix(".yaml") if found.suggestion is not None else None
    with disk_errors(out):
        with replacing(out) as partial:
            partial.write_text(json.dumps(finite(found.to_json()), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if recipe is not None and found.suggestion is not None:
            with replacing(recipe) as partial:
                partial.write_text(found.suggestion.recipe.replace("THIS-FILE", recipe.name, 1), encoding="utf-8")
        if not found.left:
            state_file(out).unlink(missing_ok=True)
    return recipe


def lines_of(found: Attribution) -> list[str]:
    """The result as a table for a terminal."""
    unit = "nats" if found.measure == "KL" else "scaled units"
    total = _value(found.total_kl, found.total_half_width)
    lines = [
        f"{found.measure} of {found.model} from {found.base}: {total} {unit}",
        f"on {found.text}; ± is half of a 95 % interval",
    ]
    if found.total_kl == 0 and all(row.cost == 0 for row in found.rows):
        return [*lines, "nothing was lost: both predict the same"]
    rows = found.rows[:SHOWN]
    cells = [_cells(row, share) for row, share in zip(rows, cumulative(found.rows), strict=False)]
    lines += ["", *table((found.by, "bits", "alone", "restored", "share"), cells)]
    if len(found.rows) > SHOWN:
        lines.append(f"... {len(found.rows) - SHOWN} more cost less; --json and --out hold all")
    if found.left:
        which = ", of groups that cost less" if any(row.cost for row in found.rows) else ""
        lines.append(
            f"{len(found.left)} {found.by}s were not measured in the time given{which}; give more --time-limit"
        )
    lines += [f"note: {note}" for note in found.notes]
    if found.suggestion is not None:
        lines += ["", *told(found.suggestion, found.measure)]
    return lines


def _cells(row: Row, share: float) -> tuple[str, ...]:
    bits = "" if row.bits is None else f"{row.bits:g}"
    alone, restored = _value(row.kl, row.half_width), _value(row.restored, row.restored_half_width)
    return row.name, bits, alone, restored, f"{100 * share:.0f} %"


def _value(mean: float, half: float | None) -> str:
    return f"{mean:.4g}" + ("" if half is None else f" ± {half:.2g}")


def told(made: Suggestion, measure: str) -> list[str]:
    """What was tried and what it brought."""
    size = 100 * (made.size_after / made.size_before - 1)
    loss = 100 * (made.kl_after / made.kl_before - 1)
    count = f"{len(made.layers)} layers" if len(made.layers) > 1 else "this layer"
    return [
        f"Give {count} {made.bits} bits: {size:+.1f} % size, {loss:+.0f} % {measure} (measured: {made.kl_before:.4g} -> "
        f"{made.kl_after:.4g}, change {_value(made.change, made.change_half_width)})",
        *(f"  {name}" for name in made.layers),
    ]
