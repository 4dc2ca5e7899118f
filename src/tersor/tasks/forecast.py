"""Forecasting of series: mean squared error over windows of a table, scaled by its training part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tersor.data.series import SeriesConfig, load_series
from tersor.errors import TersorError
from tersor.models.config import checked_config
from tersor.tasks.task import Sets, Task
from tersor.train.objectives import forecasting


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    if validation is not None:
        raise TersorError("a series has a validation part of its own; leave --validation out")
    shared = [
        each.name for each in dataclasses.fields(SeriesConfig) if hasattr(model.config, each.name)
    ]  # seq_len, ...
    lengths = {name: getattr(model.config, name) for name in shared}
    config = checked_config(SeriesConfig, {**lengths, **table}, "data")
    parts = load_series(data, config)
    variates = getattr(model.config, "enc_in", len(parts.names))
    if variates != len(parts.names):
        found = len(parts.names)
        raise TersorError(f"{data} holds {found} variates, the model takes {variates}; --set model.enc_in={found}")
    preprocessing = {
        "columns": list(parts.names),
        "mean": parts.mean.tolist(),
        "std": parts.std.tolist(),
        "seq_len": config.seq_len,
        "pred_len": config.pred_len,
        "marks": config.marks,
    }
    return Sets(parts.train, parts.validation, parts.test, preprocessing=preprocessing)


TASK = Task(forecasting, load_data)
