"""The files of a training run, each replaced at once or not at all: a kill leaves the old one or the new one.

model.safetensors, config.json   weights for tersor.models.load, and the config of a registered model
preprocessor_config.json         how inputs are prepared, where the trainer was told
last.pt                          {"settings", "run", "model", "optimizer", "scaler", "averaged"?}: all to go on with
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tersor.checkpoint.room import replacing
from tersor.errors import TersorError
from tersor.models import config_of
from tersor.train.log import LOG_FILE

RUN_FILE, MODEL_FILE = "last.pt", "model.safetensors"


def save_model(model: nn.Module, folder: Path, preprocessing: Mapping[str, Any], labels: Sequence[str]) -> None:
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}  # tied ones twice
    _replace(folder / MODEL_FILE, lambda path: save_file(tensors, path, {"format": "pt"}))
    if preprocessing:
        _write_json(folder / "preprocessor_config.json", preprocessing)
    if hasattr(type(model), "system"):
        named = {"id2label": {str(number): name for number, name in enumerate(labels)}} if labels else {}
        _write_json(folder / "config.json", config_of(model) | named)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    _replace(path, lambda new: new.write_text(text, encoding="utf-8"))


def save_run(folder: Path, run: dict[str, Any], parts: dict[str, Any], settings: dict[str, Any]) -> None:
    """parts: what has a state_dict. settings: what must be the same for the run to go on."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"settings": settings, "run": run, **{name: part.state_dict() for name, part in parts.items()}}
    _replace(folder / RUN_FILE, lambda path: torch.save(state, path))


def load_run(folder: Path, parts: dict[str, Any], settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Load the state of `parts`, and return what save_run was given as `run`; {} where no run is in the folder."""
    if not (folder / RUN_FILE).exists():
        if (folder / MODEL_FILE).exists():
            raise TersorError(f"{folder} holds a model that no training left there; choose another folder")
        for name in ("config.json", "preprocessor_config.json", LOG_FILE):
            if (folder / name).exists():
                raise TersorError(f"{folder} holds {name}, which no training left there; choose another folder")
        return {}
    state = torch.load(folder / RUN_FILE, map_location=device, weights_only=True)
    for name, value in settings.items():
        before = state["settings"].get(name)
        if before != value:
            raise TersorError(f"{folder} holds a run with {name} {before}, now it is {value}; choose another folder")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    run: dict[str, Any] = state["run"]
    return run


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    with replacing(path) as partial:
        write(partial)
