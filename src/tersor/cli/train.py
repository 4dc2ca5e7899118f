"""`tersor train`: any registered architecture on series, images or text, and sequence models on the Long Range Arena.

Its options are those of TrainConfig.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from tersor import models
from tersor.checkpoint.load import load
from tersor.checkpoint.preprocessing import PREPROCESSOR, image_settings
from tersor.checkpoint.room import alone_in
from tersor.checkpoint.source import open_checkpoint
from tersor.cli.notes import show_notes
from tersor.cli.options import print_json
from tersor.cli.progress import progress_bar
from tersor.data.denoising import DenoisingConfig
from tersor.errors import TersorError
from tersor.layers.exchange import EXCHANGED
from tersor.models.config import checked_config
from tersor.processes import is_first
from tersor.progress import Progress
from tersor.tasks import Sets, Task, task_of
from tersor.tasks.long_range_arena import PREFIX, prepare
from tersor.tasks.sheet import write_sheet
from tersor.train.config import TrainConfig
from tersor.train.objectives import Objective, answering
from tersor.train.self_pretraining import self_pretrain
from tersor.train.trainer import train as run_training
from tersor.train.trainer import validate
from tersor.untrusted import read_json, read_json_object, read_toml, readable

SHEET = "samples.png"
SECTIONS = ("model", "data", "train", "pretrain")
Tables = dict[str, dict[str, Any]]


def _train(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An architecture (`tersor models` lists them), the folder of a saved model that is to be trained on "
            "(./NAME where an architecture has its name), or lra/TASK, of the Long Range Arena.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; one that was interrupted goes on.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="CSV or Parquet file (series, events), folder (or .npz) of images, folder of videos, point clouds or objects, "
            "graph, or text file; .gz too. Environment to act in: tmaze, or a name that gymnasium knows. "
            "lra/listops, lra/pathfinder and lra/pathx are drawn without.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With lra/TASK: the architecture that learns it.")] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Validation data of the same form; series have their own part.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to start from.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML or JSON with the tables model, data, train and pretrain.")
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="One entry of these tables: `model.pred_len=192`, `data.size=32`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    **options: Any,
) -> None:
    """Train a model on your own data, by the model's task. Tasks are to classify images, videos or point clouds, enlarge or
    segment images, find shapes, forecast series, predict graphs, model text, or act.

    `tersor train lra/TASK --model MODEL` trains a sequence model on listops, text, retrieval, image, pathfinder or pathx;
    `--set pretrain.epochs=N` first trains it to fill holes in the same sequences.

    On several devices: `torchrun --nproc-per-node 4 -m tersor train MODEL ...`. An option given here wins over `--set`,
    and that over `--config`.
    """
    with readable(out):
        if out.exists() and not out.is_dir():
            raise TersorError(f"--out {out} is a file; give a folder")
    tables = _tables(config, set or [])
    tables["train"] |= {name: value for name, value in options.items() if value is not None}
    saved = None if what.startswith(PREFIX) else _saved(what, checkpoint, tables["model"])
    task = None if what.startswith(PREFIX) else _task(what if saved is None else type(saved).system)  # type: ignore[attr-defined]
    defaults = {} if task is None else task.defaults
    settings = checked_config(TrainConfig, {**defaults, **tables["train"]}, "train")
    torch.manual_seed(settings.seed)
    first = os.environ.get("RANK", "0") == "0"  # of those that torchrun started
    with alone_in(out) if first else nullcontext(), progress_bar(quiet=as_json, as_lines=True) as progress:
        net, sets, objective = (
            _long_range(what, model, data, validation, checkpoint, out, settings, tables, progress)
            if task is None
            else _by_task(task, what, saved, model, data, validation, checkpoint, tables)
        )
        show_notes(sets.notes)
        result = run_training(
            net,
            sets.train,
            objective=objective,
            out=out,
            config=settings,
            validation=sets.validation,
            preprocessing=sets.preprocessing,
            labels=sets.labels,
            progress=progress,
        )
    told: dict[str, Any] = {"out": str(out), "steps": result.steps, "best_step": result.best_step}
    told |= {"loss": result.loss, "loss_steps": result.loss_steps, "validation": result.validation}
    if first and task is not None and task.panels is not None:
        told["samples"] = str(out / SHEET)
        write_sheet(net, sets.train if sets.validation is None else sets.validation, task.panels, sets, out / SHEET)
    if sets.test is not None:
        told["test"] = validate(net, sets.test, objective, batch_size=settings.batch_size)
    first = is_first()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if first:
        _print(told, as_json=as_json)


def _task(name: str) -> Task:
    info = models.find(name)
    return task_of(info.task, info.input)


def _by_task(
    task: Task,
    name: str,
    saved: nn.Module | None,
    other: str | None,
    data: Path | None,
    validation: Path | None,
    checkpoint: Path | None,
    tables: Tables,
) -> tuple[nn.Module, Sets, Objective]:
    if other is not None:
        raise TersorError(f"--model {other} goes with lra/TASK; here the model is {name}")
    if tables["pretrain"]:
        raise TersorError("the table pretrain goes with lra/TASK")
    if data is None:
        raise TersorError(f"{name} needs --data, what it is to be trained on")
    net = saved if saved is not None else _build(name, checkpoint, tables["model"])
    prepared = {} if saved is None else _as_it_was_trained(Path(name), task)
    return net, task.load_data(net, data, validation, prepared | tables["data"]), task.objective


def _long_range(
    what: str,
    name: str | None,
    data: Path | None,
    validation: Path | None,
    checkpoint: Path | None,
    out: Path,
    settings: TrainConfig,
    tables: Tables,
    progress: Progress,
) -> tuple[nn.Module, Sets, Objective]:
    """The model, pretrained first where the table `pretrain` says how long. Its entries are fields of TrainConfig (by default
    those of the training) and of DenoisingConfig."""
    if name is None:
        raise TersorError(f"{what} needs --model, the architecture that learns it")
    if validation is not None:
        raise TersorError(f"{what} has a validation part of its own; leave --validation out")
    table = tables["pretrain"]
    of_holes = {each.name for each in dataclasses.fields(DenoisingConfig)} - {"seed"}
    run = prepare(
        what.removeprefix(PREFIX),
        name,
        data,
        model=tables["model"],
        data=tables["data"],
        pretrain={key: value for key, value in table.items() if key in of_holes},
        build=lambda name, overrides: _build(name, checkpoint, overrides),
    )
    if table:
        of_training = {key: value for key, value in table.items() if key not in of_holes}
        if not of_training.get("epochs"):
            raise TersorError("the table pretrain needs `epochs`, the number of pretraining epochs")
        as_trained = dataclasses.asdict(settings) | {"max_steps": 0, "patience": 0}
        before = checked_config(TrainConfig, as_trained | of_training, "pretrain")
        self_pretrain(run.model, run.alone, out=out / "pretraining", config=before, task=run.holes, progress=progress)
    return run.model, run.sets, answering


def _print(told: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(told)
        return
    typer.echo(f"{told['out']}: {told['steps']} steps, the weights of step {told['best_step']} kept")
    if told["loss"] is not None:
        typer.echo(f"training loss: {told['loss']:.4f}, the mean of the last {told['loss_steps']} steps")
    if "samples" in told:
        typer.echo(f"samples with what is predicted: {told['samples']}")
    for part in ("validation", "test"):
        if told.get(part):
            typer.echo(f"{part}: " + ", ".join(f"{name} {value:.4f}" for name, value in told[part].items()))


def _saved(what: str, checkpoint: Path | None, overrides: dict[str, Any]) -> nn.Module | None:
    """The model that is saved in the folder `what`; None where that is no folder with a model.

    An architecture's name means the architecture, even where a folder has that name: `--out s4` makes one.
    """
    folder = Path(what)
    if models.known(what):
        return None
    with readable(folder):
        if not (folder / "config.json").is_file():
            return None
    if checkpoint is not None:
        raise TersorError(f"{what} has weights of its own; leave --checkpoint out, or name an architecture")
    if overrides:
        raise TersorError(
            f"{what} is built already: model.{next(iter(overrides))} goes with the name of an architecture"
        )
    config = read_json_object(folder / "config.json")
    if "quantization_config" in config:
        raise TersorError(f"{what} is quantized, and packed weights are not trained; train first, then quantize")
    if config.get(EXCHANGED):
        raise TersorError(f"{what} has layers that a method put in, which are not trained; train first, then compress")
    net = load(folder, device="cpu")
    if getattr(type(net), "system", None) is None:
        raise TersorError(f"{what} holds a {type(net).__name__}; tersor trains its own architectures (`tersor models`)")
    return net.requires_grad_()


def _as_it_was_trained(folder: Path, task: Task) -> dict[str, Any]:
    """What a saved model knows of its data: entries of the table `data`."""
    if not (folder / PREPROCESSOR).is_file():
        return {}
    said = read_json_object(folder / PREPROCESSOR)
    if task.kept:
        return {name: said[name] for name in task.kept if name in said}
    if "image_mean" not in said:  # of series, say, whose scaler comes from the new data
        return {}
    settings = image_settings(open_checkpoint(folder))
    return {name: settings[name] for name in ("size", "mean", "std") if name in settings}


def _build(name: str, checkpoint: Path | None, overrides: dict[str, Any]) -> nn.Module:
    try:
        if checkpoint is not None:
            return models.load(name, checkpoint, **overrides)
        return models.create(name, **overrides)
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
