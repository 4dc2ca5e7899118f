"""What is in a checkpoint: blocks, linear layers, formats, bits per weight. Reads headers only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from tersor.calibrate.blocks import find_units
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.source import open_checkpoint, torch_dtype
from tersor.evaluate.sizes import bits_of
from tersor.layers.linear_map import linear_maps, matrix_shape


@dataclass(frozen=True)
class BlockGroup:
    """Blocks that are alike: linears (names within a block), shapes [out, in] and bits a weight on disk, in one order."""

    first: str
    count: int
    linears: list[str]
    shapes: list[tuple[int, int]]
    bits: list[float]


@dataclass(frozen=True)
class Inspection:
    """parameters counts the dense model's; bytes and files are those on disk. outside: what lies outside the blocks, with the
    bits a weight of its linear maps and embeddings."""

    model: str
    architecture: str
    format: str
    parameters: int
    bytes: int
    files: int
    blocks: list[BlockGroup]
    outside: dict[str, float | None]
    unknown: list[str]


def inspect_checkpoint(model: str | Path) -> Inspection:
    """Look into a checkpoint. Raises TersorError where it is none."""
    checkpoint = open_checkpoint(model)
    lazy = LazyModel(checkpoint, dtype=torch_dtype(checkpoint.config))
    stored = checkpoint.bytes_of_tensors()
    units = find_units(lazy.module)
    groups: dict[tuple[str, tuple[tuple[str, tuple[int, int], float], ...]], list[str]] = {}
    for unit in units:
        if unit.is_block:
            rows = tuple(
                (name, matrix_shape(m), bits_of(lazy, f"{unit.name}.{name}", stored))
                for name, m in linear_maps(unit.module).items()
            )
            groups.setdefault((re.sub(r"\.\d+$", "", unit.name), rows), []).append(unit.name)
    blocks = [
        BlockGroup(names[0], len(names), [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
        for (_, rows), names in groups.items()
    ]
    quantization = lazy.quantization
    kind = str(torch_dtype(checkpoint.config)).removeprefix("torch.")
    return Inspection(
        model=str(model),
        architecture=type(lazy.module).__name__,
        format=kind if quantization is None else f"{quantization.layout}, {quantization.bits} bits",
        parameters=sum(p.numel() for p in lazy.module.parameters()),
        bytes=checkpoint.size(),
        files=len(set(checkpoint.shard_of.values())),
        blocks=blocks,
        outside={unit.name: _bits_outside(lazy, unit.name, stored) for unit in units if not unit.is_block},
        unknown=lazy.unknown,
    )


def _bits_outside(lazy: LazyModel, unit: str, stored: dict[str, int]) -> float | None:
    """Of all maps of the unit together; None where it has none with a weight of its own."""
    sizes = [
        (math.prod(matrix_shape(found)), bits_of(lazy, name, stored))
        for name, found in lazy.maps.items()
        if name == unit or name.startswith(f"{unit}.")
    ]
    weights = sum(count for count, bits in sizes if bits > 0)
    return sum(count * bits for count, bits in sizes) / weights if weights else None
