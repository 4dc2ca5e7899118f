"""How long a job will take, and how much memory and disk: said before it starts, from shapes and one timed product."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import Batch
from tersor.calibrate.statistics import is_expert
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.source import torch_dtype
from tersor.checkpoint.writer import SINGLE_FILE_LIMIT
from tersor.compress.plan import Plan
from tersor.devices import peak_memory
from tersor.layers.linear_map import matrix_shape
from tersor.methods.block import STATISTICS_MEMORY

PASSES = 3.5  # runs of a block: its call order, its statistics (true-sequential ones stop early), its outputs
HESSIAN_BYTES = 12  # for each number of a Hessian: its sum in float64, and the mean in float32
COMPARED = 2  # where the original model runs too, passes and waiting samples are twice as many
WORTH_SAYING = 30  # seconds that a job still takes
SOLVER_COPIES = 6  # of a Hessian and of a weight, held while a layer is solved


@dataclass(frozen=True)
class Forecast:
    """What a job will take."""

    seconds: float
    memory: int  # bytes, with what the process holds already
    disk: int  # bytes at most: the result, and the blocks that it is put together from

    def text(self) -> str:
        memory, disk = f"{self.memory / 1e9:.1f} GB of memory", f"{self.disk / 1e9:.2f} GB of disk"
        return f"forecast: {_duration(self.seconds)}, {memory}, {disk}"


def by_first_block(seconds: float, left: int) -> str | None:
    """What a job says of the time that it still takes, once it solved its first block in so many seconds; None where that is too
    short to be said. left: blocks that are not done yet."""
    return f"by the first block: {_duration(seconds * left)} to go" if seconds * left > WORTH_SAYING else None


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{max(seconds, 1):.0f} s"


def forecast(lazy: LazyModel, plan: Plan, batches: Sequence[Batch], device: torch.device, activations: str) -> Forecast:
    """An estimate within a factor of about two. It assumes that every token passes through every layer, and that the largest
    part of the model has been in memory once."""
    tokens = sum(_tokens(batch) for batch in batches)
    streams = COMPARED if any(method.compares for method in plan.methods.values()) else 1
    work, solving, replaced, packed = 0.0, 0, 0, 0
    original = torch_dtype(lazy.checkpoint.config).itemsize
    widths: Counter[int] = Counter()
    for linears in plan.linears.values():
        experts = 0
        for name, found in linears.items():
            rows, width = matrix_shape(found)
            grids = plan.methods[name].quantization()
            bits, group = (grids.bits, grids.group_size) if grids else (8 * original, -1)
            squares = 0 if isinstance(found, nn.Embedding) else width**2  # an embedding has no Hessian
            work += (
                streams * (PASSES * tokens * rows * width if squares else 0)
                + (streams * tokens + rows + width) * squares
            )
            solving = max(solving, SOLVER_COPIES * 4 * (squares + rows * width))
            experts += HESSIAN_BYTES * width**2 if is_expert(name) else 0
            replaced += original * rows * width
            packed += rows * (width * bits + (16 + bits) * (1 if group == -1 else width // group)) // 8
            widths[width] += 1
        solving = max(solving, min(experts, STATISTICS_MEMORY))
    hidden = widths.most_common(1)[0][0]
    waiting = (
        2 * streams * tokens * hidden * lazy.dtype.itemsize
        if activations == "device" or device.type == activations
        else 0
    )
    result = lazy.checkpoint.size() - replaced + packed
    return Forecast(
        seconds=work / products_per_second(device, lazy.dtype),
        memory=peak_memory(device) + solving + waiting,
        disk=2 * result if result <= SINGLE_FILE_LIMIT else result,
    )


def _tokens(batch: Batch) -> int:
    """Positions of a sample: tokens of text; for other inputs the rows of the first tensor's last two axes."""
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor):
        return ids.numel()
    first = next((value for value in batch.values() if isinstance(value, Tensor)), None)
    return 1 if first is None else max(1, first.numel() // first.shape[-1])


def products_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds per second, measured on a matmul large enough to keep the device busy."""
    size = 512 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device).to(dtype)
    float(torch.mm(a, a)[0, 0])  # waits for a GPU, here as below
    started, runs = time.perf_counter(), 4
    for _ in range(runs):
        product = torch.mm(a, a)
    float(product[0, 0])
    return runs * size**3 / max(time.perf_counter() - started, 1e-6)
