"""Bytes on disk of a result, from shapes alone: what the job would pack, in the layout that it would choose.

size = size of the original - the tensors that are replaced + the packed tensors, with their entries in the header
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tersor.calibrate.blocks import find_blocks
from tersor.checkpoint.lazy_model import LazyModel, compute_dtype
from tersor.checkpoint.source import Checkpoint, torch_dtype
from tersor.compress.plan import make_plan, with_fitting_layout
from tersor.compress.recipe import Recipe
from tersor.compress.settings import Job, job_of, settings_of
from tersor.layers.linear_map import matrix_shape
from tersor.methods.method import BlockMethod, Method, ModelMethod, PackedMethod

ENTRY = 76  # of a header beside the tensor's name: dtype, shape, offsets


def size_on_disk(checkpoint: Checkpoint, lazy: LazyModel, steps: Sequence[Method]) -> int | None:
    """Bytes of the tensor files; None where a step's result has no formula. Raises TersorError where a method refuses the
    model's layers."""
    while len(steps) > 1 and isinstance(steps[-1], PackedMethod):
        steps = steps[:-1]  # changes numbers, not their size
    *before, last = steps
    if any(isinstance(step, ModelMethod) and not step.keeps_size for step in before):
        return None
    if isinstance(last, ModelMethod):
        return checkpoint.size() if last.keeps_size else None
    assert isinstance(last, BlockMethod)
    if last.quantization() is None:
        return checkpoint.size()  # other numbers in the place of the old ones
    job = with_fitting_layout(lazy.module, job_of(Recipe(last), settings_of({})))
    return checkpoint.size() - _replaced(checkpoint, lazy, job) + _packed(lazy, job)


def least_on_disk(checkpoint: Checkpoint, lazy: LazyModel) -> int:
    """Bytes of the tensors outside the blocks, which no method changes."""
    bytes_of = checkpoint.bytes_of_tensors()
    inside = tuple(f"{unit.name}." for unit in find_blocks(lazy.module) if unit.name)
    if not inside:  # all of it is one block
        return 0
    return sum(bytes_of[key] for name, keys in lazy.keys_of.items() if not name.startswith(inside) for key in keys)


def least_in_memory(lazy: LazyModel, packed: dict[str, int]) -> int:
    """Bytes of the weights alone; a process that runs the model holds at least these. Packed layers count with their bits and
    without steps, others as they are stored."""
    return bytes_in_memory(
        lazy, packed, min(torch_dtype(lazy.checkpoint.config).itemsize, lazy.dtype.itemsize), steps=0.0
    )


def skeleton(checkpoint: Checkpoint) -> LazyModel:
    """The module tree without weights."""
    return LazyModel(checkpoint, dtype=compute_dtype(checkpoint, "cpu", "auto"))


def packed_maps(lazy: LazyModel, steps: Sequence[Method]) -> dict[str, int]:
    """The bits of each layer that the last step packs."""
    last = next((step for step in reversed(steps) if not isinstance(step, PackedMethod)), steps[-1])
    if not isinstance(last, BlockMethod):
        return {}
    plan = make_plan(lazy.module, with_fitting_layout(lazy.module, job_of(Recipe(last), settings_of({}))))
    grids = {name: method.quantization() for name, method in plan.methods.items()}
    return {name: found.bits for name, found in grids.items() if found is not None}


def _replaced(checkpoint: Checkpoint, lazy: LazyModel, job: Job) -> int:
    bytes_of = checkpoint.bytes_of_tensors()
    keys = {key for name in make_plan(lazy.module, job).all_linears() for key in lazy.keys_of_map(name)}
    return sum(bytes_of[key] + ENTRY + len(key) for key in keys)


def _packed(lazy: LazyModel, job: Job) -> int:
    plan, layout = make_plan(lazy.module, job), job.layout
    assert layout is not None
    assert layout.sizes is not None  # the recipe packs
    steps = layout.scale_dtype or torch_dtype(lazy.checkpoint.config)
    total = 0
    for name, found in plan.all_linears().items():
        grids = plan.methods[name].quantization()
        assert grids is not None  # a recipe is one method for all layers, and this one packs
        columns = matrix_shape(found)[1]
        for stem, rows in lazy.pieces(name):
            parts = layout.sizes(rows, columns, grids, steps).values()
            total += sum(parts) + len(parts) * (ENTRY + len(stem) + 12)
    return total


def bytes_in_memory(lazy: LazyModel, packed: dict[str, int], width: int, *, steps: float = 0.3) -> int:
    """Of all weights as they are loaded: `width` bytes a number, packed layers in their bits and `steps` more."""
    total = 0
    shared: set[int] = set()
    apart = {id(parameter): name for name in packed for parameter in _parameters(lazy, name)}
    for parameter in lazy.module.parameters():
        if id(parameter) in shared:
            continue
        shared.add(id(parameter))
        if id(parameter) in apart:
            bits = packed[apart[id(parameter)]]
            total += int(parameter.numel() * (bits + steps) / 8)
        else:
            total += parameter.numel() * width
    return total


def _parameters(lazy: LazyModel, name: str) -> list[nn.Parameter]:
    found = dict(lazy.module.named_parameters()).get(lazy.parameter_of(name))
    return [] if found is None else [found]
