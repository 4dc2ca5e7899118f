"""What a job gives back: the compressed model, how to save it, and what was measured on the way."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.load import load
from tersor.compress.samples import compared_on
from tersor.compress.settings import Job, Settings
from tersor.compress.walk import Prepared
from tersor.formats.packed_weight import PackedWeight
from tersor.layers.linear_map import LinearMap, matrix_shape
from tersor.methods.block import LayerReport
from tersor.methods.method import Report


@dataclass(frozen=True)
class Summary:
    """What a job did. Sizes in bytes, times in seconds.

    quantization: what the checkpoint says of itself, as in its config.json.
    divergence: mean KL divergence of the compressed model's predictions from the original's on what they were compared on, in
    nats, and that of each window of it; agreement: how often both predict the same. None where the model's output is no
    prediction over classes.
    """

    model: str
    method: dict[str, Any]
    format: str | None
    layers: Sequence[Report]
    left: list[str]
    seconds: float
    seconds_per_block: dict[str, float]
    peak_memory: int
    bits_per_weight: float
    quantization: dict[str, Any]
    size_before: int | None = None
    size_after: int | None = None
    divergence: float | None = None
    agreement: float | None = None
    divergences: Sequence[float] = ()
    compared_on: str | None = None
    resumed_blocks: int = 0
    parameters_before: int | None = None
    parameters_after: int | None = None
    sparsity: float | None = None  # share of zeros in the layers that were made sparse
    steps: Sequence[dict[str, Any]] = ()  # of a recipe of several: the methods, in order
    memory_per_block: dict[str, int] = field(default_factory=dict)  # bytes held when each block was finished

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "layers": [layer.row() for layer in self.layers]}


@dataclass
class Compressed:
    """The result: `summary`, `model` (read from `directory` on demand where the job streamed), `save(directory)`."""

    summary: Summary
    directory: Path | None = None
    before: Tensor | None = None  # what the original computes of the probe, and the result
    after: Tensor | None = None
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
        from tersor.compress.run_record import write_run
        from tersor.compress.save import copy_directory, save_module

        target = Path(directory).expanduser()
        if self.directory is not None:
            return copy_directory(self.directory, target, overwrite=overwrite)
        save_module(self.model, self.summary, target, overwrite=overwrite)
        write_run(target, self.run or {})
        return target


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
        """The seconds since the last lap are those of `name`, and so is the memory that is held now."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
        self.memory[name] = memory_now(self.device)

    def add(self, tensors: Mapping[str, Tensor], weight: PackedWeight) -> None:
        self.weights += weight.in_features * weight.out_features
        self.bits += 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def result(self, job: Job, first: Prepared, **facts: Any) -> Compressed:
        """What a walk gives; facts: what else a summary says."""
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


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the GPU's allocator held, or the most that this process had resident. On Linux that is VmHWM: a
    spawned process inherits its parent's `ru_maxrss`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        pass
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def memory_now(device: torch.device) -> int:
    """Bytes: what the GPU's allocator holds, or what this process has resident; its peak where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return peak_memory(device)


def loss_of(job: Settings, before: Tensor | None, after: Tensor | None) -> dict[str, Any]:
    """Divergence and agreement of two outputs [..., classes]; empty where there is nothing to compare."""
    if before is None or after is None or before.shape != after.shape or before.dim() < 2:
        return {}
    windows = [_divergence(p, q.to(p.device)) for p, q in zip(before, after, strict=True)]
    agreement = (before.argmax(-1) == after.to(before.device).argmax(-1)).double().mean()
    return {
        "divergence": sum(windows) / len(windows),
        "agreement": float(agreement),
        "divergences": windows if len(windows) > 1 else [],
        "compared_on": compared_on(job, before),
    }


def _divergence(before: Tensor, after: Tensor) -> float:
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
