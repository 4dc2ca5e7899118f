"""How long a job will take, and how much memory and disk: said before it starts, from shapes and one timed product."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.calibrate.batches import Batch
from tersor.checkpoint.lazy_model import LazyModel
from tersor.compress.plan import Plan
from tersor.layers.linear_map import matrix_shape

PASSES = 3.5  # runs of a block: its call order, its statistics (true-sequential ones stop early), its outputs


@dataclass(frozen=True)
class Forecast:
    """seconds, bytes of memory (the largest block, its statistics and the activations), bytes on disk."""

    seconds: float
    memory: int
    disk: int

    def text(self) -> str:
        minutes = f"{self.seconds / 60:.0f} min" if self.seconds > 90 else f"{self.seconds:.0f} s"
        return f"about {minutes}, {self.memory / 1e9:.1f} GB of memory and {self.disk / 1e9:.2f} GB of disk"


def forecast(lazy: LazyModel, plan: Plan, batches: Sequence[Batch], device: torch.device) -> Forecast:
    """An estimate within a factor of about two. It assumes that every token passes through every layer."""
    tokens = sum(_tokens(batch) for batch in batches)
    rate = _products_per_second(device, lazy.dtype)
    work, statistics, kept, packed = 0.0, 0, 0, 0
    for linears in plan.linears.values():
        columns = []
        for name, found in linears.items():
            rows, width = matrix_shape(found)
            bits = plan.methods[name].quantization().get("bits", 16)
            work += PASSES * tokens * rows * width + tokens * width**2 + rows * width**2 + width**3
            columns.append(width)
            kept += rows * width * 2
            packed += int(rows * width * (bits + 0.25) / 8)
        statistics = max([statistics, *(4 * width**2 for width in columns)])
    largest = max(lazy.bytes_of(unit.module) for unit in plan.blocks)
    hidden = max((matrix_shape(found)[1] for found in plan.all_linears().values()), default=0)
    activations = 2 * tokens * hidden * lazy.dtype.itemsize
    return Forecast(work / rate, 2 * largest + 4 * statistics + activations, lazy.checkpoint.size() - kept + packed)


def _tokens(batch: Batch) -> int:
    """Positions of a sample: tokens of text; for other inputs the rows of the first tensor's last two axes."""
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor):
        return ids.numel()
    first = next((value for value in batch.values() if isinstance(value, Tensor)), None)
    return 1 if first is None else max(1, first.numel() // first.shape[-1])


def _products_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds a second of one matmul of middling size."""
    a = torch.randn(512, 512, device=device).to(dtype)
    torch.mm(a, a)
    started, runs = time.perf_counter(), 4
    for _ in range(runs):
        product = torch.mm(a, a)
    float(product[0, 0])  # waits for a GPU
    return runs * 512**3 / max(time.perf_counter() - started, 1e-6)
