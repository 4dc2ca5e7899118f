"""A table of how long a transformer block takes, by its five widths; and its measurement."""

from __future__ import annotations

import itertools
import json
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.errors import TersorError
from tersor.progress import Progress
from tersor.untrusted import read_json

AXES = ("emb", "heads", "qk", "v", "mlp")
FULL_BLOCK = 0.0808  # seconds of a full block in the published table; `latency_weight` depends on this scale


@dataclass(frozen=True)
class LatencyTable:
    """grid: the points of each axis, rising, in the order of AXES. seconds: of one block, with an axis for each."""

    grid: tuple[tuple[int, ...], ...]
    seconds: torch.Tensor

    def __post_init__(self) -> None:
        shape = tuple(len(points) for points in self.grid)
        if len(self.grid) != len(AXES) or self.seconds.shape != shape:
            raise TersorError(f"a latency table of {list(self.seconds.shape)} does not go with grids of {list(shape)}")
        for name, points in zip(AXES, self.grid, strict=True):
            if not points or list(points) != sorted(set(points)):
                raise TersorError(f"the latency table's {name} must be rising numbers, not {list(points)}")

    def at(self, widths: Sequence[int]) -> float:
        """Seconds: multilinear between the points; outside them those of the nearest. widths: emb, heads, qk, v, mlp."""
        values = self.seconds
        for points, width in zip(self.grid, widths, strict=True):
            right = min(max(bisect_right(points, width), 1), len(points) - 1)
            if len(points) == 1:
                values = values[0]
                continue
            left, step = points[right - 1], points[right] - points[right - 1]
            share = min(max((width - left) / step, 0.0), 1.0)
            values = values[right - 1] * (1 - share) + values[right] * share
        return float(values)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"axes": AXES, "grid": self.grid, "seconds": self.seconds.tolist()}) + "\n")


def read_table(path: str | Path) -> LatencyTable:
    """A table as `save` writes it: JSON with `grid` (five lists) and `seconds` (nested lists)."""
    try:
        found = read_json(Path(path).expanduser())
        grid = tuple(tuple(int(each) for each in points) for points in found["grid"])
        return LatencyTable(grid, torch.tensor(found["seconds"], dtype=torch.float64))
    except (TersorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise TersorError(f"{path} is no latency table (JSON with grid and seconds): {error}") from None


class _AttentionHalf(nn.Module):
    def __init__(self, emb: int, heads: int, qk: int, v: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(emb)
        self.Q, self.K, self.V = nn.Linear(emb, heads * qk), nn.Linear(emb, heads * qk), nn.Linear(emb, heads * v)
        self.proj = nn.Linear(heads * v, emb)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.Q, self.K, self.V))
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        out: torch.Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return x + out


class _MlpHalf(nn.Module):
    def __init__(self, emb: int, mlp: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(emb), nn.Linear(emb, mlp), nn.GELU(), nn.Linear(mlp, emb))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return x + out


def grid_of(full: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Points to measure at, for a block of these full widths: quarters of the embedding and of the MLP, halves of the rest."""
    emb, heads, qk, v, mlp = full

    def parts(width: int, count: int, least: int) -> tuple[int, ...]:
        return tuple(sorted({max(least, round(width * n / count)) for n in range(1, count + 1)} | {least}))

    return parts(emb, 4, max(1, emb // 4)), parts(heads, 2, 1), parts(qk, 2, 1), parts(v, 2, 1), parts(mlp, 4, 1)


@torch.no_grad()
def measure_table(
    full: Sequence[int], tokens: int, device: torch.device, progress: Progress, *, batch: int = 8, turns: int = 5
) -> LatencyTable:
    """Time blocks of many widths on this device. The two halves of a block are timed separately and added.

    For each half the fastest of `turns` runs counts, so that other processes disturb little. The times are scaled so that the
    block of full widths takes FULL_BLOCK seconds.
    """
    grid = grid_of(full)
    emb, heads, qk, v, mlp = grid
    attention = list(itertools.product(emb, heads, qk, v))
    perceptron = list(itertools.product(emb, mlp))
    total = len(attention) + len(perceptron)
    took: list[float] = []
    for widths in (*attention, *perceptron):
        half = _AttentionHalf(*widths) if len(widths) == 4 else _MlpHalf(*widths)
        took.append(_fastest(half.to(device), torch.randn(batch, tokens, widths[0], device=device), turns))
        progress("measuring latency", len(took), total)
    first = torch.tensor(took[: len(attention)], dtype=torch.float64).view(len(emb), len(heads), len(qk), len(v), 1)
    second = torch.tensor(took[len(attention) :], dtype=torch.float64).view(len(emb), 1, 1, 1, len(mlp))
    seconds = first + second
    return LatencyTable(grid, seconds * (FULL_BLOCK / float(seconds[-1, -1, -1, -1, -1])))


def _fastest(module: nn.Module, x: torch.Tensor, turns: int) -> float:
    times: list[float] = []
    for _ in range(turns + 1):
        _wait(x.device)
        started = time.perf_counter()
        module(x)
        _wait(x.device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _wait(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
