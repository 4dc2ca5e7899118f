"""Compress a module that is in memory: the result is a copy whose linear maps are packed layers."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import nn

from tersor.calibrate.batches import call, first_tensor, without_cache
from tersor.calibrate.draws import PROBE, drawing
from tersor.compress.describe import quantization_config
from tersor.compress.first_run import prepare
from tersor.compress.plan import make_plan, without_stacks
from tersor.compress.result import Compressed, Size, Summary, Timer, loss_of, peak_memory, sparsity_of
from tersor.compress.samples import samples_of
from tersor.compress.settings import Job
from tersor.compress.walk import Hooks, walk, walk_without_samples
from tersor.formats.grid import Stored
from tersor.formats.layouts import write
from tersor.layers.experts import ExpertMap, stored_name
from tersor.layers.linear_map import packable_maps
from tersor.layers.quantized_linear import place_packed
from tersor.methods.block import Block, LayerReport


def compress_module(model: nn.Module, job: Job) -> Compressed:
    module = copy.deepcopy(model).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if hasattr(module, "set_experts_implementation"):
        # the plain loop is the one whose products with single experts can be seen
        module.set_experts_implementation("eager")  # type: ignore[operator]
    plan = make_plan(module, job)
    packs = job.layout is not None and not (job.layout.is_plain or job.layout.expert_stacks)
    if job.layout is not None and packs and hasattr(module, "base_model_prefix"):
        # saved under the module's own names, where transformers looks for whole stacks
        stacked = [name for name, each in plan.all_linears().items() if isinstance(each, ExpertMap)]
        plan = without_stacks(plan, stacked, job.layout, include=job.include, progress=job.progress)
    maps = packable_maps(module)
    first_parameter = next(module.parameters())
    dtype, device = first_parameter.dtype, first_parameter.device
    batches, probe = samples_of(job, job.calibration, plan, module, job.tokenizer, device, dtype)
    stored = None if job.layout is None else Stored(job.layout.scale_dtype or dtype, job.layout.min_zero)
    hessian_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    timer, size = Timer(device), Size()
    reports: list[LayerReport] = []

    def finished(block: Block) -> None:
        timer.lap(block.name)
        reports.extend(block.reports)
        place_packed(module, block.linears, block.packed)
        for weight in block.packed.values():
            size.add(write(weight, job.layout, sym=False) if job.layout else {}, weight)

    hooks = Hooks(lambda unit: None, lambda unit: None, lambda block: False, finished, job.progress)
    before = after = None
    with torch.no_grad(), without_cache(module):
        prepared = prepare(module, plan, job.calibration, batches, probe, hooks)
        plan, batches, probe, first = prepared.plan, prepared.batches, prepared.probe, prepared.traced
        if probe is None or first is None:
            walk_without_samples(module, plan, stored, hessian_dtype, hooks)
        else:
            before = first_tensor(first.output)
            walk(module, plan, batches, probe, first, stored, hessian_dtype, job.routing, hooks)
            with drawing(PROBE):
                after = first_tensor(call(module, probe))
    described: dict[str, Any] = {}
    if job.layout is not None:
        described = quantization_config(
            module, plan, job.recipe, job.layout, lambda name: [stored_name(name, maps[name])]
        )
    summary = Summary(
        model=type(model).__name__,
        method=job.recipe.method.options(),
        format=job.layout.name if job.layout else None,
        layers=reports,
        left=plan.left,
        seconds=time.perf_counter() - job.started,
        seconds_per_block=timer.laps,
        memory_per_block=timer.memory,
        peak_memory=peak_memory(device),
        bits_per_weight=size.bits_per_weight,
        quantization=described,
        sparsity=sparsity_of(reports, plan.all_linears()),
        **loss_of(before, after),
    )
    return Compressed(summary, None, before, after, _module=module)
