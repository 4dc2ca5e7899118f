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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.files import replacing
from tersor.models import config_of
from tersor.train.log import LOG_FILE
from tersor.untrusted import first_words, regular_file

RUN_NUMBERS = {  # what a run says of itself, and of which kinds
    "step": (int,),
    "best": (int, float),
    "best_step": (int,),
    "since_best": (int,),
    "validation": (dict,),
}
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
    """Load the state of `parts`, and return what save_run was given as `run`; {} where no run is in the folder, or one that did
    not come to the end of its first step: that may be given anything else."""
    if not (folder / RUN_FILE).exists():
        if (folder / MODEL_FILE).exists():
            raise TersorError(f"{folder} holds a model that no training left there; choose another folder")
        for name in ("config.json", "preprocessor_config.json", LOG_FILE):
            if (folder / name).exists():
                raise TersorError(f"{folder} holds {name}, which no training left there; choose another folder")
        return {}
    file = folder / RUN_FILE
    regular_file(file)
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # bytes that are no pickle raise errors of any kind
        raise TersorError(f"{file} is no run that can go on: {first_words(error)}; choose another folder") from error
    if _is_at_its_start(state):
        return {}
    _check_run(file, state, parts)
    for name, value in settings.items():
        before = state["settings"].get(name)
        if before != value:
            raise TersorError(f"{folder} holds a run with {name} {before}, now it is {value}; choose another folder")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except Exception as error:  # each part has its own ways not to fit
        raise TersorError(f"{file} does not fit this training: {first_words(error)}; choose another folder") from error
    run: dict[str, Any] = state["run"]
    return run


def _is_at_its_start(state: Any) -> bool:
    run = state.get("run") if isinstance(state, dict) else None
    return isinstance(run, dict) and run.keys() == RUN_NUMBERS.keys() and run["step"] == 0


def load_best(model: nn.Module, folder: Path, device: torch.device) -> None:
    """The weights that `save_model` kept."""
    try:
        model.load_state_dict(load_file(folder / MODEL_FILE, device=str(device)))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise TersorError(f"{folder / MODEL_FILE} does not hold the run's weights: {first_words(error)}") from error


def _check_run(file: Path, state: Any, parts: dict[str, Any]) -> None:
    """Raise TersorError where a file is no run of this trainer, or its weights are not those of this model."""
    wanted = {"settings", "run", *parts}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), dict) for name in wanted):
        raise TersorError(f"{file} was not left by a training with {', '.join(sorted(wanted))}; choose another folder")
    if state["run"].keys() != RUN_NUMBERS.keys():
        raise TersorError(f"{file} does not say how far its run is; choose another folder")
    for name, kinds in RUN_NUMBERS.items():
        value = state["run"][name]
        if isinstance(value, bool) or not isinstance(value, kinds) or (isinstance(value, int) and value < 0):
            raise TersorError(f"{file} says {name} is {value!r}; choose another folder")
    if not all(isinstance(value, int | float) for value in state["run"]["validation"].values()):
        raise TersorError(f"{file} holds validation scores that are no numbers; choose another folder")
    for part in ("model", "averaged"):
        for name, tensor in state.get(part, {}).items():
            broken = (
                isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
            )
            if broken and part in parts:
                raise TersorError(f"{file}: {part} {name} is not finite (NaN or Inf); choose another folder")


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    with replacing(path) as partial:
        write(partial)
