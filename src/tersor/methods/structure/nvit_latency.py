"""A table of how long a transformer block takes, by its five widths; and its measurement."""

from __future__ import annotations

import itertools
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.errors import TersorError
from tersor.models.vision.nvit import NViT, NViTAttention, NViTConfig, PrunedLayerNorm
from tersor.models.vision.vit import Mlp
from tersor.progress import Progress
from tersor.untrusted import read_json

AXES = ("emb", "heads", "qk", "v", "mlp")
FULL_BLOCK = 0.0808  # seconds of a full block in the published table; `latency_weight` depends on this scale


@dataclass(frozen=True)
class LatencyTable:
    """Seconds by widths."""

    grid: tuple[tuple[int, ...], ...]  # the points of each axis, rising, in the order of AXES
    seconds: torch.Tensor  # of one block, with an axis for each
    # Of what lies outside the blocks, by the first axis; None: not counted, as in the published table.
    outside: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(len(points) for points in self.grid)
        if len(self.grid) != len(AXES) or self.seconds.shape != shape:
            raise TersorError(f"a latency table of {list(self.seconds.shape)} does not go with grids of {list(shape)}")
        if self.outside is not None and self.outside.shape != shape[:1]:
            raise TersorError(f"a latency table has {len(self.outside)} times outside the blocks for {shape[0]} widths")
        for name, points in zip(AXES, self.grid, strict=True):
            if not points or list(points) != sorted(set(points)):
                raise TersorError(f"the latency table's {name} must be rising numbers, not {list(points)}")

    def at(self, widths: Sequence[int]) -> float:
        """Seconds: multilinear between the points; outside them those of the nearest. widths: emb, heads, qk, v, mlp."""
        return _between(self.seconds, self.grid, widths)

    def beside_blocks(self, emb: int) -> float:
        """Seconds of the embedding, the last norm and the head; 0 where the table does not say."""
        return 0.0 if self.outside is None else _between(self.outside, self.grid[:1], [emb])

    def save(self, path: Path) -> None:
        outside = {} if self.outside is None else {"outside": self.outside.tolist()}
        said = {"axes": AXES, "grid": self.grid, "seconds": self.seconds.tolist(), **outside}
        path.write_text(json.dumps(said) + "\n")


def _between(values: torch.Tensor, grid: Sequence[Sequence[int]], widths: Sequence[int]) -> float:
    for points, width in zip(grid, widths, strict=True):
        right = min(max(bisect_right(points, width), 1), len(points) - 1)
        if len(points) == 1:
            values = values[0]
            continue
        left, step = points[right - 1], points[right] - points[right - 1]
        share = min(max((width - left) / step, 0.0), 1.0)
        values = values[right - 1] * (1 - share) + values[right] * share
    return float(values)


def read_table(path: str | Path) -> LatencyTable:
    """A table as `save` writes it: JSON with `grid` (five lists), `seconds` (nested lists) and, maybe, `outside` (a list)."""
    try:
        found = read_json(Path(path).expanduser())
        grid = tuple(tuple(int(each) for each in points) for points in found["grid"])
        outside = torch.tensor(found["outside"], dtype=torch.float64) if "outside" in found else None
        return LatencyTable(grid, torch.tensor(found["seconds"], dtype=torch.float64), outside)
    except (TersorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise TersorError(f"{path} is no latency table (JSON with grid and seconds): {error}") from None


class _AttentionHalf(nn.Module):
    def __init__(self, config: NViTConfig) -> None:
        super().__init__()
        self.norm, self.attention = PrunedLayerNorm(config), NViTAttention(config, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.attention(self.norm(x))
        return out


class _MlpHalf(nn.Module):
    def __init__(self, config: NViTConfig) -> None:
        super().__init__()
        self.norm, self.mlp = PrunedLayerNorm(config), Mlp(config.embed_dim, config.mlp[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.mlp(self.norm(x))
        return out


def grid_of(full: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Points to measure at, for a block of these full widths: quarters of the embedding and of the MLP, halves of the rest."""
    emb, heads, qk, v, mlp = full

    def parts(width: int, count: int, least: int) -> tuple[int, ...]:
        return tuple(sorted({max(least, round(width * n / count)) for n in range(1, count + 1)} | {least}))

    return parts(emb, 4, max(1, emb // 4)), parts(heads, 2, 1), parts(qk, 2, 1), parts(v, 2, 1), parts(mlp, 4, 1)


@torch.no_grad()
def measure_table(
    config: NViTConfig, device: torch.device, progress: Progress, *, batch: int = 8, turns: int = 5
) -> LatencyTable:
    """Time parts of a model of full widths on this device: the halves of blocks of many widths, which are added, and what lies
    outside the blocks.

    They are the modules of the pruned model, with its LayerNorms, and run one after the other in every turn. So each finds the
    caches filled by others, as in a model (one that runs alone finds its own weights there, and small ones look too fast), and
    its turns lie apart: of each the fastest counts, so that other processes disturb little. The times are scaled so that the
    block of full widths takes FULL_BLOCK seconds.
    """
    full = (config.embed_dim, config.heads[0], config.qk[0], config.v[0], config.mlp[0])
    emb, heads, qk, v, mlp = grid = grid_of(full)
    none: dict[str, Any] = {"heads": (), "qk": (), "v": (), "mlp": (), "norm_width": config.embed_dim}
    parts: list[Callable[[], nn.Module]] = []
    inputs: list[tuple[int, ...]] = []
    for D, *widths in itertools.product(emb, heads, qk, v):
        h, q, each_v = widths
        one = replace(config, **{**none, "embed_dim": D, "heads": (h,), "qk": (q,), "v": (each_v,), "mlp": (1,)})
        parts.append(partial(_AttentionHalf, one))
        inputs.append((batch, config.tokens, D))
    for D, width in itertools.product(emb, mlp):
        one = replace(config, **{**none, "embed_dim": D, "heads": (1,), "qk": (1,), "v": (1,), "mlp": (width,)})
        parts.append(partial(_MlpHalf, one))
        inputs.append((batch, config.tokens, D))
    for D in emb:
        parts.append(partial(NViT, replace(config, **{**none, "embed_dim": D})))
        inputs.append((batch, config.in_chans, config.img_size, config.img_size))
    modules = [make().to(device).eval() for make in parts]
    given = [torch.randn(shape, device=device) for shape in inputs]
    took = [float("inf")] * len(parts)
    for turn in range(turns + 1):
        for n, (module, x) in enumerate(zip(modules, given, strict=True)):
            seconds_now = _seconds(module, x)
            took[n] = min(took[n], seconds_now) if turn else took[n]  # the first turn warms up
        progress("measuring latency", turn + 1, turns + 1)
    found = torch.tensor(took, dtype=torch.float64)
    attention, perceptron = len(emb) * len(heads) * len(qk) * len(v), len(emb) * len(mlp)
    seconds = found[:attention].view(len(emb), len(heads), len(qk), len(v), 1)
    seconds = seconds + found[attention : attention + perceptron].view(len(emb), 1, 1, 1, len(mlp))
    scale = FULL_BLOCK / float(seconds[-1, -1, -1, -1, -1])
    return LatencyTable(grid, seconds * scale, found[attention + perceptron :] * scale)


def _seconds(module: nn.Module, x: torch.Tensor) -> float:
    """Of one run. Where one thread does all, its processor time: beside other processes, the clock runs on without it."""
    clock = time.thread_time if x.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _wait(x.device)
    started = clock()
    module(x)
    _wait(x.device)
    return clock() - started


def _wait(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
