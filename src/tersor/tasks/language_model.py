"""Language modelling: the next token, from windows of a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tersor.data.text import TextConfig, TokenWindows, load_tokens
from tersor.errors import TersorError
from tersor.models.config import checked_config
from tersor.tasks.task import Sets, Task
from tersor.train.objectives import language_modelling


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    config = checked_config(TextConfig, table, "data")
    train = load_tokens(data, config)
    held_out = load_tokens(validation, config) if validation else None
    for each in filter(None, (train, held_out)):
        _check_vocabulary(model, each)
    return Sets(train, held_out, preprocessing={name: getattr(config, name) for name in KEPT})


KEPT = ("tokenizer", "seq_len")  # of the settings


def _check_vocabulary(model: Any, windows: TokenWindows) -> None:
    option = next((name for name in ("vocab_size", "num_tokens") if hasattr(model.config, name)), None)
    largest = int(windows.tokens.max())
    if option is not None and largest >= getattr(model.config, option):
        raise TersorError(
            f"the data have tokens up to {largest}, the model has {option} {getattr(model.config, option)}; "
            f"--set model.{option}={largest + 1}"
        )


TASK = Task(language_modelling, load_data, kept=KEPT, evaluated_on="text")
