"""`tersor advise`: which recipe for a model, on this machine, within a budget."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from tersor.advise import advise as find_advice
from tersor.advise.advisor import Advice
from tersor.advise.budget import (
    Budget,
    parse_bytes,
    parse_seconds,
    parse_share,
    parse_speed,
    parse_training,
    shown,
)
from tersor.advise.evidence import DEFAULT
from tersor.advise.plans import Figure, Plan, command, reason, recipe_command, recipe_content
from tersor.cli.options import AsJson, Device, Overwrite, print_json, refuse_to_replace
from tersor.cli.progress import progress_bar
from tersor.cli.table import print_table, wrapped
from tersor.errors import TersorError
from tersor.files import replacing

NO_PLAN = 1  # exit status
UNIT = {"text": "token", "image": "picture", "series": "window"}


def advise(
    model: Annotated[str, typer.Argument(help="A directory, a hub name such as org/name, `demo` or `demo-vit`.")],
    memory: Annotated[str | None, typer.Option(help="Most memory of the process that runs it, such as 6GB.")] = None,
    disk: Annotated[str | None, typer.Option(help="Most bytes on disk, such as 4GB.")] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(
            help="Most that perplexity or forecasting error may rise, or the share of pictures lost, such as 1%."
        ),
    ] = None,
    min_speed: Annotated[str | None, typer.Option(help="Least new tokens a second, such as 20tok/s.")] = None,
    max_latency: Annotated[str | None, typer.Option(help="Most time a token, picture or window: 50ms.")] = None,
    device: Device = "auto",
    time_limit: Annotated[
        str, typer.Option(help="How long it may take; the same command then measures what is left.")
    ] = "10m",
    training: Annotated[
        str,
        typer.Option(
            help="What a method may do: none, calibration, or train for a time such as 5m, within --time-limit."
        ),
    ] = "calibration",
    text: Annotated[
        list[Path] | None, typer.Option(help="Text to evaluate on; may be given several times. [default: built in]")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Labelled pictures: a folder with one subfolder a class, or an .npz.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A table to forecast: CSV or Parquet.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text or pictures for the methods. [default: built-in text; --images]")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a calibration sample.")] = 512,
    max_eval_samples: Annotated[
        int | None, typer.Option(min=2, help="At most so many windows or pictures to evaluate on. [default: 24 or 200]")
    ] = None,
    max_recipes: Annotated[int, typer.Option(min=0, help="Recipes to measure at most.")] = 6,
    evidence: Annotated[Path, typer.Option(help="What was measured before, and where it is kept.")] = DEFAULT,
    out: Annotated[Path | None, typer.Option(help="Write the first recipe here, for `tersor compress recipe`.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Choose how to compress a model, by measuring. It measures on this machine and your data, within your budget.

    Recipes that cannot fit the budget by their formulae are dropped. The original and a few recipes are measured; the others
    are predicted, with an interval. Measurements are kept and used again. Exit status 1: no recipe keeps the budget.

    With --max-loss (1% where no limit is given at all), the first plan has the least size times latency; otherwise it has
    the least loss.

    Example: `tersor advise demo --disk 12MB --max-loss 5% --out recipe.yaml`.
    """
    if min_speed is not None and max_latency is not None:
        raise TersorError("--min-speed and --max-latency are the same limit: give one of them")
    latency = None if max_latency is None else parse_seconds(max_latency, "--max-latency")
    if min_speed is not None:
        latency = parse_speed(min_speed, "--min-speed")
    budget = Budget(
        memory=None if memory is None else parse_bytes(memory, "--memory"),
        disk=None if disk is None else parse_bytes(disk, "--disk"),
        loss=None if max_loss is None else parse_share(max_loss, "--max-loss"),
        latency=latency,
    )
    if not budget.limits():
        budget = Budget(loss=0.01)
    given = {"text": text or [], "image": [images] if images else [], "series": [data] if data else []}
    kinds = [kind for kind, files in given.items() if files]
    if len(kinds) > 1:
        raise TersorError("--text, --images and --data are for models of different kinds: give one of them")
    kind = kinds[0] if kinds else None
    if min_speed is not None and kind not in (None, "text"):
        raise TersorError("--min-speed is for language models; use --max-latency")
    may_calibrate, may_train = parse_training(training)
    _check_out(out, overwrite)
    with progress_bar(quiet=as_json) as progress:
        found = find_advice(
            model,
            budget,
            files=given[kind] if kind else (),
            kind=kind,
            calibration=may_calibrate,
            training=may_train,
            calibrate_on=calibration,
            samples=samples,
            seq_len=seq_len,
            max_eval_samples=max_eval_samples,
            most=max_recipes,
            seconds=parse_seconds(time_limit, "--time-limit"),
            device=device,
            evidence=evidence,
            progress=progress,
        )
    chosen = found.chosen
    written = out is not None and chosen is not None and bool(chosen.recipe)
    if written:
        assert out is not None
        assert chosen is not None
        with replacing(out) as partial:
            partial.write_text(yaml.safe_dump(recipe_content(chosen.recipe), sort_keys=False), encoding="utf-8")
    if as_json:
        print_json(_plain(found, out))
    else:
        _print(found, out)
    if chosen is None:
        typer.echo(f"tersor: no plan keeps the budget: {found.binding}", err=True)
        raise typer.Exit(NO_PLAN)
    if not as_json and out is not None:
        told = (
            f"{out}: {recipe_command(chosen.recipe, model, found.settings, recipe_file=str(out), out='DIR')}"
            if written
            else "the original is the choice: no recipe"
        )
        typer.echo(told)


def _check_out(out: Path | None, overwrite: bool) -> None:
    """Raise TersorError, before the work, where the recipe could not be written in the end."""
    if out is None:
        if overwrite:
            raise TersorError("--overwrite is for the file of --out: give --out")
    elif out.is_dir():
        raise TersorError(f"--out {out} is a folder; give a file such as recipe.yaml")
    elif not out.parent.is_dir():
        raise TersorError(f"--out {out}: there is no folder {out.parent}; make it, or give another name")
    else:
        refuse_to_replace("--out", out, overwrite=overwrite)


def _print(found: Advice, out: Path | None) -> None:
    limits = ", ".join(f"{name} {shown(name, value)}" for name, value in found.budget.limits().items())
    typer.echo(f"{found.model} on {found.machine}; at most: {limits}\n")
    rows = []
    for plan in found.plans:
        cells = [_figure(name, plan.figure(name)) for name in ("disk", "memory", "latency", "loss")]
        rows.append((f"{plan.name} *" if plan.name in found.front else plan.name, *cells))
    if found.plans:
        print_table(("recipe", "disk", "memory", f"a {UNIT[found.kind]}", "loss"), rows)
        typer.echo("\n*: on the frontier, no other plan is as good in everything")
        if not all(plan.measured for plan in found.plans):
            typer.echo("~: predicted; its interval is a rule of thumb with widths set by hand")
    for plan in found.plans:
        _say("", f"{plan.name}: {reason(plan, found.plans, bounded_loss=found.budget.loss is not None)}")
        if source := _source(plan):
            _say(f"  {source}")
        if plan.recipe:
            typer.echo(f"  {_command(found, plan, out)}")  # whole, so that it can be copied
    for name, why in found.left.items():
        _say("", f"left out: {name}: {why}")
    for note in found.notes:
        _say("", note)


def _say(*lines: str) -> None:
    for line in wrapped(lines):
        typer.echo(line)


def _command(found: Advice, plan: Plan, out: Path | None) -> str:
    mine = str(out) if out is not None and plan is found.chosen else None  # the file holds the first plan's recipe
    return command(plan, found.model, found.settings, recipe_file=mine, out="DIR")


def _source(plan: Plan) -> str:
    parts = []
    for name in ("latency", "loss"):
        figure = plan.figure(name)
        if figure is not None and not figure.measured:
            parts.append(
                f"{name} predicted {figure.source}" + (f" (evidence {figure.evidence})" if figure.evidence else "")
            )
    if plan.agreement is not None and plan.recipe:
        parts.append(f"agrees with the original on {100 * plan.agreement:.1f} % of the pictures")
    return "; ".join([*parts, *plan.notes])


def _figure(name: str, figure: Figure | None) -> str:
    if figure is None:
        return "?"
    value = shown(name, figure.value)
    if figure.low == figure.high:
        return value if figure.measured else f"~{value}"
    if name == "loss" and figure.measured:
        return f"{value} ± {100 * (figure.high - figure.value):.2f}"
    return f"{'' if figure.measured else '~'}{value} ({_bare(name, figure.low)} - {_bare(name, figure.high)})"


def _bare(name: str, value: float) -> str:
    return shown(name, value).rpartition(" ")[0]


def _plain(found: Advice, out: Path | None) -> dict[str, Any]:
    def plan(each: Plan) -> dict[str, Any]:
        return {
            **asdict(each),
            "measured": each.measured,
            "frontier": each.name in found.front,
            "reason": reason(each, found.plans, bounded_loss=found.budget.loss is not None),
            "command": _command(found, each, out),
        }

    return {
        "model": found.model,
        "kind": found.kind,
        "machine": found.machine,
        "budget": found.budget.limits(),
        "original": asdict(found.original),
        "plans": [plan(each) for each in found.plans],
        "left": found.left,
        "notes": list(found.notes),
        "binding": found.binding,
    }
