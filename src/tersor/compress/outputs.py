"""The output factors of a job, made before its first block: a backward pass through the whole model in memory.

An unfinished job makes them again. The samples and the drawn labels are the same, so it goes on with the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import to_device
from tersor.calibrate.output_hessians import gather_output_hessians
from tersor.checkpoint.lazy_model import LazyModel
from tersor.compress.in_memory import Source
from tersor.compress.settings import Job
from tersor.compress.walk import Prepared
from tersor.devices import memory_total
from tersor.errors import TersorError
from tersor.layers.linear_map import matrix_shape
from tersor.processes import processes

ROOM = 0.9  # of the memory


def output_hessians(source: Source, first: Prepared, job: Job) -> dict[str, Tensor]:
    """H_O of every layer whose method asks for it, by name; none of experts. Raises TersorError where memory cannot hold them."""
    plan = first.plan
    asking = {
        name
        for block in plan.linears
        for method, names in plan.by_method(block).items()
        if method.weighs_outputs
        for name in names
    }
    shapes = {
        name: matrix_shape(each)
        for name, each in plan.all_linears().items()
        if name in asking and isinstance(each, nn.Module)
    }
    if not shapes or first.probe is None:
        return {}
    if processes() > 1:
        raise TersorError("output_factor runs the whole model in one process: start it without torchrun")
    model, dtype = source.module, source.dtype
    if isinstance(source, LazyModel) and dtype == torch.float16:
        dtype = torch.float32  # gradients underflow
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    factors = 4 * sum(rows * rows for rows, _ in shapes.values())
    for place in {source.device, torch.device("cpu")}:
        total = memory_total(place)
        needed = factors + (weights if place == source.device else 0)
        if total is not None and needed > ROOM * total:
            raise TersorError(
                f"output_factor holds {needed / 2**30:.1f} GiB (the model, and a matrix [out, out] for each layer) at once, and "
                f"{place} has {total / 2**30:.1f} GiB: leave it out, or choose fewer layers with --include"
            )
    if isinstance(source, LazyModel):
        model = LazyModel(source.checkpoint, dtype=dtype, device=source.device).load_all().to(source.device).eval()
    model.requires_grad_(False)
    layers = {name: model.get_submodule(name) for name in shapes}
    batches = [to_device(batch, source.device, dtype) for batch in first.batches]
    return gather_output_hessians(model, layers, batches, job.progress)
