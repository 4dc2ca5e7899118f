"""`tersor train`: any registered architecture on series, images or text. Its options are those of TrainConfig."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

import tersor.models
from tersor.cli.progress import progress_bar
from tersor.errors import TersorError
from tersor.models.config import checked_config
from tersor.tasks import task_named
from tersor.train.config import TrainConfig
from tersor.train.trainer import train as run_training
from tersor.train.trainer import validate
from tersor.untrusted import read_json, read_toml, readable

SECTIONS = ("model", "data", "train")


def _train(
    model: Annotated[str, typer.Argument(help="An architecture: `tersor models` lists them.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data", help="CSV file (series, events), folder (or .npz) of images, text file, or graph; .gz too."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; one that was interrupted goes on.")],
    validation: Annotated[
        Path | None, typer.Option(help="Validation data of the same form; series have their own part.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to start from.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML or JSON with the tables model, data and train.")
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="One entry of these tables: `model.pred_len=192`, `data.size=32`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    **options: Any,
) -> None:
    """Train a model by its task: to classify, enlarge or segment images, forecast series, predict graphs, or model text.

    On several devices: `torchrun --nproc-per-node 4 -m tersor train MODEL ...`. An option given here wins over `--set`,
    and that over `--config`.
    """
    tables = _tables(config, set or [])
    tables["train"] |= {name: value for name, value in options.items() if value is not None}
    settings = checked_config(TrainConfig, tables["train"], "train")
    task = task_named(tersor.models.find(model).task)
    torch.manual_seed(settings.seed)
    net = _build(model, checkpoint, tables["model"])
    sets = task.load_data(net, data, validation, tables["data"])
    with progress_bar(quiet=as_json) as progress:
        result = run_training(
            net,
            sets.train,
            objective=task.objective,
            out=out,
            config=settings,
            validation=sets.validation,
            preprocessing=sets.preprocessing,
            labels=sets.labels,
            progress=progress,
        )
    told: dict[str, Any] = {"out": str(out), "steps": result.steps, "best_step": result.best_step}
    told["validation"] = result.validation
    if sets.test is not None:
        told["test"] = validate(net, sets.test, task.objective, batch_size=settings.batch_size)
    rank = 0
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        torch.distributed.destroy_process_group()
    if rank == 0:
        _print(told, as_json=as_json)


def _print(told: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(told))
        return
    console = Console()
    console.print(f"{told['out']}: {told['steps']} steps, the weights of step {told['best_step']} kept")
    for part in ("validation", "test"):
        if told.get(part):
            console.print(f"{part}: " + ", ".join(f"{name} {value:.4f}" for name, value in told[part].items()))


def _build(name: str, checkpoint: Path | None, overrides: dict[str, Any]) -> nn.Module:
    try:
        if checkpoint is not None:
            return tersor.models.load(name, checkpoint, **overrides)
        return tersor.models.create(name, **overrides)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        ArithmeticError,
        LookupError,
        AttributeError,
    ) as error:  # a config that no __post_init__ caught
        raise TersorError(f"{name} cannot be built with {overrides}: {error}") from None


def _tables(path: Path | None, entries: list[str]) -> dict[str, dict[str, Any]]:
    """The config file's three tables, and what --set changes in them."""
    tables: dict[str, Any] = {}
    if path is not None:
        with readable(path):
            if not path.exists():
                raise TersorError(f"no config file at {path}")
        tables = read_toml(path) if path.suffix == ".toml" else read_json(path)
    if not isinstance(tables, dict) or any(not isinstance(table, dict) for table in tables.values()):
        raise TersorError(f"{path}: a config has the tables {', '.join(SECTIONS)}, and its entries in them")
    for entry in entries:
        name, equals, text = entry.partition("=")
        section, dot, option = name.partition(".")
        if not equals or not dot:
            raise TersorError(f"--set {entry}: SECTION.NAME=VALUE is expected, such as model.pred_len=192")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text  # a string without quotes
        tables.setdefault(section, {})[option] = value
    if unknown := tables.keys() - SECTIONS:
        raise TersorError(f"a config has no table {sorted(unknown)[0]!r}, only {', '.join(SECTIONS)}")
    return {section: dict(tables.get(section, {})) for section in SECTIONS}


def train(**arguments: Any) -> None:
    _train(**arguments)


def _declare() -> None:
    """One option for each field of TrainConfig; what is not given keeps its default."""
    fixed = inspect.signature(_train, eval_str=True).parameters.values()
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in fixed if p.kind is not p.VAR_KEYWORD]
    for each in dataclasses.fields(TrainConfig):
        help = f"{each.metadata['help']} [default: {each.default}]"
        option = typer.Option(None, help=help, rich_help_panel="Training")
        annotation = type(each.default) | None
        parameters.append(
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)
        )
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}
    train.__doc__ = _train.__doc__


_declare()
