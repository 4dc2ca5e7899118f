"""Which files of a model directory hold its weights.

The published names come first, in the order in which transformers looks for them: `model.safetensors`, its index of shards,
`pytorch_model.bin`, its index. A directory with none of these comes from another library: its tensor files are the weights,
except those that training and adapters leave beside a model. Files that are not found here are never read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tersor.errors import TersorError

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SAFE_ENDINGS, PICKLE_ENDINGS = (".safetensors",), (".bin", ".pt", ".pth")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
# Words in the names of files that are no weights of the model: a Trainer's state, or an adapter of another model.
_BESIDE = {"optimizer", "optimizers", "optim", "scheduler", "scaler", "rng", "random", "training", "trainer", "adapter"}


@dataclass(frozen=True)
class WeightFiles:
    """The files of a checkpoint's tensors."""

    files: tuple[Path, ...] = ()  # in reading order; empty where `index` names them
    index: Path | None = None

    @property
    def is_pickled(self) -> bool:
        first = self.index if self.index is not None else self.files[0]
        return any(ending in first.name for ending in PICKLE_ENDINGS)


def weight_files(directory: Path, *, explicit: str | None = None) -> WeightFiles | None:
    """The files that hold the weights, or None where there are none. explicit: the name that a config.json gives.

    Raises TersorError where shards are missing.
    """
    for name in (explicit,) if explicit is not None else (*SAFETENSORS, *PICKLED):
        path = directory / name
        if path.is_file():
            return WeightFiles(index=path) if name.endswith(".index.json") else WeightFiles((path,))
    if explicit is not None:
        raise TersorError(f"{directory} lacks {explicit}, which its config.json names as the weights")
    for endings in (SAFE_ENDINGS, PICKLE_ENDINGS):
        if found := _of_other_libraries(directory, endings):
            return WeightFiles(found)
    return None


def _of_other_libraries(directory: Path, endings: Sequence[str]) -> tuple[Path, ...]:
    sets: dict[str, list[Path]] = defaultdict(list)  # the shards of each set
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.suffix in endings and not path.name.startswith(".") and not _is_beside(path):
            shard = _SHARD.fullmatch(path.stem)
            sets[f"{shard[1]} in {int(shard[3])}" if shard else path.name].append(path)
    for name, paths in sets.items():
        shard = _SHARD.fullmatch(paths[0].stem)
        there = {int(found[2]) for path in paths if (found := _SHARD.fullmatch(path.stem))}
        if shard and (lost := sorted(set(range(1, int(shard[3]) + 1)) - there)):
            raise TersorError(f"{directory} lacks the shard {lost[0]} of {name.replace(' in ', ', which are ')}")
    shards = [paths for name, paths in sets.items() if name.startswith(("model in ", "pytorch_model in "))]
    return tuple(shards[0] if len(shards) == 1 else (path for paths in sets.values() for path in paths))


def _is_beside(path: Path) -> bool:
    return not _BESIDE.isdisjoint(re.split(r"[^a-z]+", path.stem.lower()))
