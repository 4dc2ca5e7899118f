"""Where the samples' activations wait between blocks: on the device, in the host's memory, or on disk.

A tensor that waits elsewhere keeps its identity, because the model's suspended code holds on to it: only its storage goes away
and comes back.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PLACES = ("device", "cpu", "disk")
SMALLEST = 4096  # elements; smaller tensors stay where they are


class Activations:
    """`put` sends the large floating tensors of a nested structure away, `get` brings them back."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._away: dict[int, tuple[torch.device, Any]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="tersor-activations-") if place == "disk" else None

    def put(self, values: Any) -> None:
        for tensor in self._movable(values):
            if id(tensor) in self._away:
                continue
            device = tensor.device
            if self._folder is not None:
                kept: Any = Path(self._folder.name) / f"{id(tensor)}.pt"
                torch.save(tensor.data, kept)
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=device)
            else:
                kept = None
                tensor.data = tensor.data.cpu()
            self._away[id(tensor)] = (device, kept)

    def get(self, values: Any) -> None:
        if self.place == "device":
            return
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and id(tensor) in self._away:
                device, kept = self._away.pop(id(tensor))
                if kept is None:
                    tensor.data = tensor.data.to(device)
                else:
                    tensor.data = torch.load(kept, map_location=device, weights_only=True)
                    kept.unlink()

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
