"""What is in a checkpoint: blocks, linear layers, formats, bits per weight. Reads headers only."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersor.calibrate.blocks import find_units
from tersor.checkpoint.lazy_model import LazyModel, classes_of
from tersor.checkpoint.room import record_of
from tersor.checkpoint.source import NAMES, STEPS, open_checkpoint, torch_dtype
from tersor.checkpoint.tree import state_of
from tersor.errors import TersorError
from tersor.evaluate.sizes import bits_of
from tersor.layers.exchange import exchanged_in
from tersor.layers.linear_map import linear_maps, matrix_shape

Layer = tuple[str, tuple[int, int], float, int | None]  # name within its block, shape, bits a weight, bits of the input


@dataclass(frozen=True)
class BlockGroup:
    """Blocks that are alike. Their linear layers are in one order."""

    first: str  # the name of the first block
    count: int
    linears: list[str]  # names within a block
    shapes: list[tuple[int, int]]  # [out, in]
    bits: list[float]  # a weight, on disk
    a_bits: list[int | None]  # bits to which a layer rounds its input; None: it does not


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint."""

    model: str
    architecture: str
    format: str
    methods: list[dict[str, Any]]  # those of the job that wrote it, with their options, as the result says itself
    parameters: int  # of the dense model
    size: int  # bytes on disk
    files: int  # on disk
    blocks: list[BlockGroup]
    outside: dict[str, float | None]  # what lies outside the blocks: bits a weight of its linear maps and embeddings
    unknown: list[str]


def inspect_checkpoint(model: str | Path) -> Inspection:
    """Look into a checkpoint. Raises TersorError where it is none."""
    checkpoint = open_checkpoint(model)
    lazy = LazyModel(checkpoint, dtype=torch_dtype(checkpoint.config))
    _check_shapes(lazy)
    stored = checkpoint.bytes_of_tensors()
    units = find_units(lazy.module)
    inside = tuple(f"{unit.name}." for unit in units if unit.is_block)
    layers: dict[str, list[Layer]] = {unit.name: [] for unit in units if unit.is_block}
    exchanged = _exchanged(lazy)
    found = _layers(lazy, exchanged, stored)
    for name, facts in found.items():
        block = next((each for each in inside if name.startswith(each)), None)
        if block is None and name in exchanged:  # blocks whose maps were all exchanged
            block = next(iter(re.findall(r"^.+?\.\d+\.", name)), None)
        if block is not None:
            layers.setdefault(block[:-1], []).append((name.removeprefix(block), *facts))
    groups: dict[tuple[str, tuple[Layer, ...]], list[str]] = {}
    for name, rows in layers.items():
        groups.setdefault((re.sub(r"\.\d+$", "", name), tuple(rows)), []).append(name)
    blocks = [
        BlockGroup(names[0], len(names), *([row[n] for row in rows] for n in range(4)))  # type: ignore[arg-type]
        for (_, rows), names in groups.items()
    ]
    of_blocks = tuple(f"{name}." for name in layers)
    outside = [unit.name for unit in units if not f"{unit.name}.".startswith(of_blocks)]
    quantization = lazy.quantization
    made_by = (record_of(checkpoint.directory) or {}).get("method")
    steps = checkpoint.config.get(STEPS) or [made_by]
    return Inspection(
        model=str(model),
        architecture=type(lazy.module).__name__,
        format=_stored_as(lazy, stored) if quantization is None else f"{quantization.layout}, {quantization.bits} bits",
        methods=[each for each in steps if isinstance(each, dict)],
        parameters=sum(p.numel() for p in lazy.module.parameters()) + sum(map(_packed, lazy.module.modules())),
        size=checkpoint.size(),
        files=len(set(checkpoint.shard_of.values())),
        blocks=blocks,
        outside={name: found[name][1] if name in exchanged else _bits_outside(lazy, name, stored) for name in outside},
        unknown=lazy.unknown,
    )


def _check_shapes(lazy: LazyModel) -> None:
    """Raise TersorError where a tensor has not the shape that the model has for it, as loading does; GGUF's were checked."""
    if lazy.checkpoint.gguf is not None:
        return
    shapes = lazy.checkpoint.shapes()
    for name, tensor in state_of(lazy.module, ""):
        keys = lazy.keys_of.get(name, [])
        if len(keys) == 1 and not lazy.is_converted(name) and shapes[keys[0]] != tuple(tensor.shape):
            raise TersorError(f"{keys[0]} is {shapes[keys[0]]}; the model's is {tuple(tensor.shape)}")


def _stored_as(lazy: LazyModel, stored: dict[str, int]) -> str:
    """The dtype that most bytes have, and whether a method packed layers beside it."""
    kind = torch_dtype(lazy.checkpoint.config)
    if lazy.checkpoint.gguf is None:
        held: Counter[str] = Counter()
        with lazy.checkpoint.tensors(stored) as slices:
            for name, each in slices.items():
                held[each.get_dtype()] += stored[name]
        floating = {name: dtype for dtype, name in NAMES.items() if dtype.is_floating_point and name in held}
        kind = max(floating.items(), key=lambda each: held[each[0]], default=("", kind))[1]
    plain = str(kind).removeprefix("torch.")
    return f"packed by its method, the rest {plain}" if any(map(_packed, lazy.module.modules())) else plain


def _packed(module: nn.Module) -> int:
    """Weights that a module holds packed."""
    return int(getattr(module, "packed_parameters", 0))


def _exchanged(lazy: LazyModel) -> dict[str, Any]:
    """The modules that a method put in the place of linear maps, and that hold weights in a way of their own."""
    modules = {name: lazy.module.get_submodule(name) for name in exchanged_in(lazy.module)}
    return {name: each for name, each in modules.items() if hasattr(each, "in_features") and not linear_maps(each)}


def _layers(
    lazy: LazyModel, exchanged: dict[str, Any], stored: dict[str, int]
) -> dict[str, tuple[tuple[int, int], float, int | None]]:
    """Shape, bits a weight on disk and bits of the input of every linear layer, whichever module holds it."""
    found: dict[str, tuple[tuple[int, int], float, int | None]] = {
        name: (matrix_shape(each), bits_of(lazy, name, stored), _rounded_to(lazy, name))
        for name, each in linear_maps(lazy.module).items()
    }
    for name, module in exchanged.items():
        shape = (module.out_features, module.in_features)
        size = sum(size for key, size in stored.items() if key.startswith(f"{name}.") and not key.endswith(".bias"))
        a_bits = getattr(module, "a_bits", None)
        found[name] = (shape, 8 * size / (shape[0] * shape[1]), a_bits)
    order = [name for name, _ in lazy.module.named_modules() if name in found]
    return {name: found[name] for name in order} | found


def _rounded_to(lazy: LazyModel, name: str) -> int | None:
    """Bits to which a packed layer rounds its inputs."""
    if lazy.quantization is None or name not in lazy.quantized:
        return None
    return lazy.quantization.for_layer(lazy.quantized[name][0], name, classes=classes_of(lazy.maps[name])).a_bits


def _bits_outside(lazy: LazyModel, unit: str, stored: dict[str, int]) -> float | None:
    """Bits a weight of all maps of the unit together; None where no map has a weight of its own."""
    sizes = [
        (math.prod(matrix_shape(found)), bits_of(lazy, name, stored))
        for name, found in lazy.maps.items()
        if name == unit or name.startswith(f"{unit}.")
    ]
    weights = sum(count for count, bits in sizes if bits > 0)
    return sum(count * bits for count, bits in sizes) / weights if weights else None
