"""Official checkpoints of our own architectures, in the key layout in which they were published.

Such a file is converted once, as a whole, into a temporary directory that lives as long as the process. All its weights are in
memory meanwhile; these models are small beside those that are read block by block.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor import models
from tersor.checkpoint.disk import disk_errors
from tersor.errors import TersorError
from tersor.formats.weight_files import weight_files
from tersor.layers.exchange import EXCHANGED
from tersor.models.loading import load_state, read_state
from tersor.untrusted import readable

ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pdparams")
OURS, TIMMS = "tersor_model", "architecture"  # keys of a config.json that name an architecture of the registry


def checkpoint_as(path: str | Path, variant: str) -> Path:
    """A directory in our own layout, with the weights of an official file or folder. variant: which model it is. Raises
    TersorError where the variant is unknown or the weights do not fit it."""
    models.find(variant)
    with readable(path):
        given = Path(path).expanduser()
        if not given.exists():
            raise TersorError(f"there is no file {path}")
        if given.is_file() and given.suffix not in ENDINGS:
            raise TersorError(f"{given.name}: published weights end in {', '.join(ENDINGS)}")
    return _converted(given.resolve(), variant, "{}", _stamp(given))


def named_by(config: Mapping[str, Any]) -> str | None:
    """The architecture of ours that a config.json names: `tersor_model`, or timm's `architecture` where we have it."""
    found = config.get(OURS, config.get(TIMMS))
    if not isinstance(found, str) or "quantization_config" in config or config.get(EXCHANGED):
        return None
    try:
        models.find(found)
    except TersorError:
        return None  # the model is another library's
    return found


def converted(
    directory: Path, config: Mapping[str, Any], shapes: Callable[[], Mapping[str, tuple[int, ...]]] | None
) -> Path | None:
    """The directory to read instead of one in a published layout; None where it is in our own layout.

    shapes: of the tensors in its files; None where these are pickled and may hold more than tensors.
    """
    name = named_by(config)
    if name is None:
        return None
    options = (
        dict(config) if OURS in config else models.options_of(name, {k: v for k, v in config.items() if k != TIMMS})
    )
    options = {key: value for key, value in options.items() if key not in (OURS, "id2label", "dtype", "tersor_steps")}
    said = json.dumps(options, sort_keys=True)
    try:
        wanted = _wanted(name, said)
    except Exception:
        return None  # the error comes when the model is built
    found = {} if shapes is None else shapes()
    if all(found.get(key) == shape for key, shape in wanted.items()):
        return None
    return _converted(directory.resolve(), name, said, _stamp(directory), dict(config))


@functools.cache
def _wanted(name: str, options: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's own tensors. Cached, because a job opens its model several times."""
    with torch.device("meta"):
        own = _own_tensors(models.create(name, **json.loads(options)))
    return {key: tuple(tensor.shape) for key, tensor in own.items()}


def weight_bytes(directory: Path) -> int:
    chosen = weight_files(directory)
    return 0 if chosen is None else sum(each.stat().st_size for each in chosen.files)


def is_pickled(directory: Path) -> bool:
    chosen = weight_files(directory)
    return chosen is not None and chosen.is_pickled


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes when the files do."""
    found = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
    return tuple(value for each in found for value in (each.stat().st_mtime_ns, each.stat().st_size))


_made: dict[tuple[Any, ...], Path] = {}


def _converted(
    path: Path, name: str, options: str, stamp: tuple[int, ...], config: Mapping[str, Any] | None = None
) -> Path:
    key = (path, name, options, stamp)
    if key not in _made:
        model = models.create(name, **json.loads(options))
        state = read_state(path)
        load_state(model, state, what=f"{path.name} does not fit {name}")
        floating = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
        folder = Path(tempfile.mkdtemp(prefix=f"{path.stem}-", dir=_folder()))
        widest = functools.reduce(torch.promote_types, floating, floating[0]) if floating else torch.float32
        with disk_errors(folder):
            _write(model.to(widest), folder, config or {})
            for other in path.iterdir() if path.is_dir() else ():
                if _is_beside(other):
                    shutil.copyfile(other, folder / other.name)
        _made[key] = folder
    return _made[key]


def _write(model: nn.Module, folder: Path, config: Mapping[str, Any]) -> None:
    tensors = {key: tensor.detach().contiguous() for key, tensor in _own_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    facts = config or models.config_of(model)
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")


def _is_beside(path: Path) -> bool:
    """Whether a file of a published folder is copied: tokenizer, preprocessor, licence; not weights, their index or config."""
    weights = path.suffix in ENDINGS or path.name.endswith(".index.json")
    return path.is_file() and not weights and path.name != "config.json" and not path.name.startswith(".")


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor once, under the first name of tied ones."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for key, tensor in state.items():
        first.setdefault(id(tensor), key)
    return {key: state[key] for key in first.values()}


@functools.cache
def _folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="tersor-published-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
