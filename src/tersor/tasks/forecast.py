"""Forecasting of series: mean squared error over windows of a table, scaled by its training part."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset

from tersor.data.series import Parts, SeriesConfig, Table, split_table
from tersor.data.series_memory import remember, with_start
from tersor.data.tables import SeriesTable, TableConfig, read_series
from tersor.data.time_grid import Step
from tersor.errors import TersorError
from tersor.models.config import checked_config
from tersor.tasks.forecaster import marks_for
from tersor.tasks.task import Sets, Task
from tersor.train.objectives import forecasting

PATIENCE = 3  # validations without a new best, where the user does not say
OF_TABLE = ("time", "target", "id", "fill")
OPTION = re.compile(rf"--({'|'.join(OF_TABLE)})\b(?: (\w+(?:\|\w+)+))?")  # "--id", or "--fill previous|linear|zero"


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    if validation is not None:
        raise TersorError("a series has a validation part of its own; leave --validation out")
    config = _config(model, {name: value for name, value in table.items() if name not in OF_TABLE})
    columns = {name: value for name, value in table.items() if name in OF_TABLE}
    try:
        series = read_series(data, checked_config(TableConfig, columns, "data"))
    except TersorError as error:  # which names options of `tersor forecast`: here they are entries of the table `data`
        raise TersorError(OPTION.sub(lambda found: f"--set data.{found[1]}={found[2] or '...'}", str(error))) from None
    if config.start and not series.step.dated:
        series = with_start(series, config.start, Step(max(1, round(config.step_hours * 3600)), "s"))
    variates = getattr(model.config, "enc_in", len(series.names))
    if variates != len(series.names):
        found = len(series.names)
        raise TersorError(
            f"{data} holds {found} variates, the model takes {variates}; --set model.enc_in={found}, or --set data.target=..."
        )
    try:
        parts = _parts(series, config)
    except TersorError as error:
        raise TersorError(f"{data}: {error}") from None
    used = [each for each in parts if each is not None]
    learned = [0 if each is None else len(each.train.values) for each in parts]
    marks = config.marks if series.step.dated else "none"
    memory = remember(series, learned, marks, config.start)
    told = memory.as_dict() | {"seq_len": config.seq_len, "pred_len": config.pred_len}
    return Sets(
        ConcatDataset([each.train for each in used]),
        ConcatDataset([each.validation for each in used]),
        ConcatDataset([each.test for each in used]),
        preprocessing=told,
        notes=series.notes,
    )


def _config(model: Any, said: Mapping[str, Any]) -> SeriesConfig:
    """seq_len, pred_len, label_len and marks are the model's, unless the user says otherwise."""
    shared = [each.name for each in dataclasses.fields(SeriesConfig) if hasattr(model.config, each.name)]
    lengths = {name: getattr(model.config, name) for name in shared}
    for name in ("seq_len", "pred_len"):
        if (
            name in said
            and said[name] != lengths.get(name, said[name])
            and not getattr(model, "takes_any_length", False)
        ):
            raise TersorError(
                f"data.{name} is {said[name]}, and the model is built for {lengths[name]}; "
                f"--set model.{name}={said[name]} sets both"
            )
    return checked_config(SeriesConfig, {**lengths, "marks": marks_for(model.config), **said}, "data")


def _parts(series: SeriesTable, config: SeriesConfig) -> list[Parts | None]:
    """The parts of each series; None for one too short for three, as long as there are others."""
    found: list[Parts | None] = []
    first: TersorError | None = None
    for values, times in zip(series.values, series.times, strict=True):
        table = Table(series.names, values, times if series.step.dated else None)
        try:
            found.append(split_table(table, config))
        except TersorError as error:
            first = first or error
            found.append(None)
    if first is not None and not any(found):
        raise first
    return found


TASK = Task(forecasting, load_data, defaults={"patience": PATIENCE}, evaluated_on="data")
