"""How the weights of a compressed model are distributed, layer by layer, and how far they are from the original's.

One block of each model is in memory at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tersor.calibrate.blocks import find_blocks
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.source import open_checkpoint
from tersor.errors import TersorError
from tersor.layers.linear_map import linear_maps, weight_matrix
from tersor.progress import Progress, silent

BINS = 61  # odd, so that one bin has 0 in its middle
MOST = 200  # layers whose histograms are kept


@dataclass(frozen=True)
class Histogram:
    """Counts in BINS equal bins from -limit to limit."""

    limit: float
    counts: list[int]


@dataclass(frozen=True)
class LayerView:
    """One linear map. relative_error: ‖W - Q‖ / ‖W‖ (Frobenius); None, as are original and error, without an original.
    weights: None where more than MOST layers are farther from the original."""

    name: str
    shape: tuple[int, int]
    weights: Histogram | None
    original: Histogram | None = None
    error: Histogram | None = None
    relative_error: float | None = None


def place_of(name: str) -> tuple[tuple[int, ...], str]:
    """Where a layer is: the numbers in its name but for an expert's, and the name within its block, without numbers.

    "model.layers.3.mlp.experts.7.up_proj" -> ((3,), "mlp.experts.*.up_proj")
    """
    numbers: list[int] = []
    kind: list[str] = []
    parts = name.split(".")
    for n, part in enumerate(parts):
        if not part.isdecimal():
            kind.append(part)
        elif re.fullmatch(r"experts?", parts[n - 1] if n else "") or re.search(r"\.experts?\.", f".{'.'.join(kind)}."):
            kind.append("*")
        else:
            numbers.append(int(part))
            kind = []
    return tuple(numbers), ".".join(kind) or name


@torch.no_grad()
def layer_views(
    model: str | Path,
    against: str | Path | None = None,
    *,
    progress: Progress = silent,
) -> list[LayerView]:
    """Of every linear map in the blocks, in their order. Raises TersorError where the original is another architecture."""
    ours = LazyModel(open_checkpoint(model), dtype=torch.float32)
    base = None if against is None else LazyModel(open_checkpoint(against), dtype=torch.float32)
    views: list[LayerView] = []
    blocks = find_blocks(ours.module)
    for n, unit in enumerate(blocks):
        progress("reading weights", n, len(blocks))
        ours.load(unit.module)
        originals: dict[str, Tensor] = {}
        if base is not None:
            try:
                part = base.module.get_submodule(unit.name)
            except AttributeError:
                raise TersorError(
                    f"{against} has no {unit.name}, which {model} has; --against is the model that was compressed"
                ) from None
            base.load(part)
            originals = {name: weight_matrix(each) for name, each in linear_maps(part).items()}
        for name, each in linear_maps(unit.module).items():
            views.append(_view(".".join(filter(None, (unit.name, name))), weight_matrix(each), originals.get(name)))
        ours.release(unit.module)
        if base is not None:
            base.release(part)
    progress("reading weights", len(blocks), len(blocks))
    return _with_fewer_histograms(views)


def _view(name: str, weight: Tensor, original: Tensor | None) -> LayerView:
    """original: left out where its shape is another, as after a factorization or pruning."""
    shape = (weight.shape[0], weight.shape[1])
    if original is None or original.shape != weight.shape:
        return LayerView(name, shape, histogram(weight, float(weight.abs().max())))
    error = weight - original
    limit = float(max(weight.abs().max(), original.abs().max()))
    return LayerView(
        name,
        shape,
        histogram(weight, limit),
        histogram(original, limit),
        histogram(error, float(error.abs().max())),
        float(error.norm() / original.norm().clamp_min(torch.finfo(torch.float32).tiny)),
    )


def histogram(values: Tensor, limit: float) -> Histogram:
    limit = limit or 1.0  # of a layer of zeros
    return Histogram(limit, torch.histc(values.float().flatten(), BINS, -limit, limit).long().tolist())


def _with_fewer_histograms(views: list[LayerView]) -> list[LayerView]:
    if len(views) <= MOST:
        return views
    kept = {each.name for each in sorted(views, key=lambda each: -(each.relative_error or 0))[:MOST]}
    return [
        each if each.name in kept else LayerView(each.name, each.shape, None, relative_error=each.relative_error)
        for each in views
    ]
