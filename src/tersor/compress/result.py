"""What a job gives back: the compressed model, how to save it, and what was measured on the way."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.load import load
from tersor.compress.run_record import write_run
from tersor.compress.save import copy_directory, save_module
from tersor.compress.settings import Job
from tersor.compress.summary import Summary, loss_of
from tersor.compress.walk import Prepared
from tersor.devices import memory_now, peak_memory
from tersor.formats.packed_weight import PackedWeight
from tersor.layers.linear_map import LinearMap, matrix_shape
from tersor.methods.block import LayerReport


@dataclass
class Compressed:
    """The result of a job: `summary`, `model` (read from `directory` when it is first asked for), `save(directory)`."""

    summary: Summary
    directory: Path | None = None
    before: Tensor | None = None  # the original's output of the probe
    after: Tensor | None = None  # the result's
    _module: nn.Module | None = None
    run: Mapping[str, Any] | None = None  # what `run_record.py` keeps beside the checkpoint
    _folder: Any = None  # a temporary directory that lives as long as the result

    @property
    def model(self) -> nn.Module:
        if self._module is None:
            assert self.directory is not None
            self._module = load(self.directory)
        return self._module

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write the checkpoint. Raises TersorError where the directory is taken."""
        target = Path(directory).expanduser()
        if self.directory is not None:
            return copy_directory(self.directory, target, overwrite=overwrite)
        save_module(self.model, self.summary, target, overwrite=overwrite)
        write_run(target, self.run or {})
        return target


def directory_for(out: Path | None) -> tuple[Path, Any]:
    """Where a result goes. Where the user names no directory, a temporary one, which is returned too."""
    if out is not None:
        return out, None
    folder = tempfile.TemporaryDirectory(prefix="tersor-")
    return Path(folder.name) / "model", folder


class Tally:
    """What a walk adds up: reports of layers, seconds and bytes of memory by block, and the bits of what is packed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reports: list[LayerReport] = []
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.resumed = 0  # blocks of an earlier run
        self.bits, self.weights = 0, 0
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Count the seconds since the last lap, and the memory that is held now, for `name`."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
        self.memory[name] = memory_now(self.device)

    def add(self, tensors: Mapping[str, Tensor], weight: PackedWeight) -> None:
        self.weights += weight.in_features * weight.out_features
        self.bits += 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def result(self, job: Job, first: Prepared, **facts: Any) -> Compressed:
        """The result of a walk. facts: what else the summary says."""
        before, after = (None, None) if first.probe is None else (first.probe.before, first.probe.after)
        summary = Summary(
            method=job.recipe.method.options(),
            format=None if job.layout is None else job.layout.name,
            layers=self.reports,
            left=first.plan.left,
            seconds=time.perf_counter() - job.started,
            seconds_per_block=self.seconds,
            memory_per_block=self.memory,
            peak_memory=peak_memory(self.device),
            bits_per_weight=self.bits / max(self.weights, 1),
            sparsity=sparsity_of(self.reports, first.plan.all_linears()),
            resumed_blocks=self.resumed,
            **facts,
            **loss_of(job, before, after),
        )
        return Compressed(summary, None, before, after)


def sparsity_of(reports: Sequence[LayerReport], maps: Mapping[str, LinearMap]) -> float | None:
    """The share of zeros in the layers that a method made sparse; None where none did."""
    shares = {each.name: each.sparsity for each in reports if each.sparsity is not None}
    sizes = {name: rows * columns for name in shares for rows, columns in [matrix_shape(maps[name])]}
    return sum(shares[name] * sizes[name] for name in sizes) / sum(sizes.values()) if sizes else None
