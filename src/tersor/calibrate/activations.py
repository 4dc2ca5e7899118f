"""Where the samples' activations wait between blocks: on the device, in the host's memory, or on disk.

A tensor that waits elsewhere stays the same object, because the model's suspended code holds on to it. Only its storage goes away
and comes back.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PLACES = ("device", "cpu", "disk")
NAME = ".tmp-activations-"
SMALLEST = 4096  # elements; smaller tensors stay where they are


@dataclass(frozen=True)
class _Away:
    """Where a tensor is that was sent away."""

    alive: weakref.ref[Tensor]  # calls back when the tensor is freed
    device: torch.device  # where it came from
    kept: Path | None  # the file that holds it; None: it is in the host's memory


class Activations:
    """`put` sends the large floating tensors of a nested structure away, `get` brings them back."""

    def __init__(self, place: str, folder: Path | None = None) -> None:
        """folder: activations on disk get a folder of their own in it; None: in the system's folder for temporary files."""
        self.place = place
        self._away: dict[int, _Away] = {}
        self._numbers = itertools.count()
        self._folder = tempfile.TemporaryDirectory(prefix=NAME, dir=folder) if place == "disk" else None

    def put(self, values: Any) -> None:
        for tensor in self._movable(values):
            key = id(tensor)
            if key in self._away:
                continue
            device, kept = tensor.device, None
            if self._folder is not None:
                kept = Path(self._folder.name) / f"{next(self._numbers)}.pt"
                torch.save(tensor.data, kept)
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=device)
            else:
                tensor.data = tensor.data.cpu()
            # A tensor may be freed without being fetched, and another may then get its id.
            self._away[key] = _Away(weakref.ref(tensor, partial(self._forget, key)), device, kept)

    def get(self, values: Any) -> None:
        if self.place == "device":
            return
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and id(tensor) in self._away:
                away = self._away[id(tensor)]
                if away.kept is None:
                    tensor.data = tensor.data.to(away.device)
                else:
                    tensor.data = torch.load(away.kept, map_location=away.device, weights_only=True)
                self._forget(id(tensor))

    def _forget(self, key: int, _: object = None) -> None:
        away = self._away.pop(key, None)
        if away is not None and away.kept is not None:
            away.kept.unlink(missing_ok=True)

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def _movable(self, values: Any) -> list[Tensor]:
        if self.place == "device":
            return []
        return [
            each
            for each in tree_leaves(values)
            if isinstance(each, Tensor) and each.is_floating_point() and each.numel() >= SMALLEST
        ]
