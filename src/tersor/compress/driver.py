"""The one driver of methods that go block by block, whatever the model comes from and wherever the result goes.

The walk asks a source for weights, and a sink takes each block when it is finished. A checkpoint is read part by part and written
to files (`stream.py`); a module is copied, and its copy is changed (`in_memory.py`).
"""

from __future__ import annotations

import copy
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.calibrate.batches import Batch, call, first_tensor, without_cache
from tersor.calibrate.blocks import units_of
from tersor.calibrate.draws import PROBE, drawing
from tersor.compress.describe import quantization_config
from tersor.compress.first_run import prepare
from tersor.compress.forecast import by_first_block
from tersor.compress.in_memory import InMemory, Source
from tersor.compress.outputs import output_hessians
from tersor.compress.plan import Plan, make_plan, with_fitting_layout, without_stacks
from tersor.compress.result import Compressed, Tally
from tersor.compress.samples import samples_of, text_tokens
from tersor.compress.settings import Job
from tersor.compress.walk import Prepared, walk
from tersor.formats.layout import Layout
from tersor.formats.layouts import write
from tersor.layers.experts import ExpertMap
from tersor.layers.quantized_linear import place_packed
from tersor.methods.block import Block


class Sink:
    """Where finished blocks go."""

    job: Job
    scratch: Path | None = None  # a folder for activations that wait on disk, once the sink has started

    def __init__(self, device: torch.device) -> None:
        self.tally = Tally(device)

    def open(self, job: Job, plan: Plan, samples: list[Batch]) -> None:
        """Raises TersorError where the result cannot be written; changes nothing. samples: all that are run, the probe's last."""
        self.job = job

    def takes_stacks(self, layout: Layout) -> bool:
        """Whether readers find experts that lie in one tensor."""
        return layout.expert_stacks

    def start(self, first: Prepared) -> None:
        """Called once the probe has run through the original, before the first block."""

    def restore(self, block: Block) -> bool:
        """Put back a block that an earlier run finished; False where none did."""
        return False

    def write(self, block: Block) -> None:
        raise NotImplementedError

    def finish(self, first: Prepared) -> Compressed:
        raise NotImplementedError


def compress_blocks(source: Source, sink: Sink, job: Job) -> Compressed:
    module = source.module
    job = with_fitting_layout(module, job)
    plan = make_plan(module, job)
    if job.layout is not None and not sink.takes_stacks(job.layout):
        experts = [name for name, each in plan.all_linears().items() if isinstance(each, ExpertMap)]
        stacked = [name for name in experts if not source.named_pieces(name)]
        plan = without_stacks(plan, stacked, job.layout, include=job.include, progress=job.progress)
    batches, probe = samples_of(job, plan, source)
    sink.open(job, plan, batches if probe is None else [*batches, probe])
    with torch.no_grad(), without_cache(module):
        source.load_rest([unit.module for unit in units_of(module)])
        first = prepare(source, plan, job, batches, probe)
        first = replace(first, outputs=output_hessians(source, first, job))
        sink.start(first)
        _remark(job, first)
        # An error in the loop ends the walk's threads.
        with closing(walk(source, first, job, sink.restore, sink.scratch)) as blocks:
            began, solved = time.perf_counter(), 0
            for done, block in enumerate(blocks, 1):
                sink.write(block)
                if not solved:
                    solved = done - sink.tally.resumed  # the others are an earlier run's
                    left = sum(bool(plan.linears[unit.name]) for unit in plan.blocks[done:])
                    if solved and (said := by_first_block(time.perf_counter() - began, left)):
                        job.progress(said, 0, 0)
                    began = time.perf_counter()
                del block  # else it stays in memory while the next is solved
        return sink.finish(first)


def _remark(job: Job, first: Prepared) -> None:
    """Say what the methods have to say of this calibration."""
    tokens = text_tokens(first.batches)
    said = [method.remark_on(tokens) for method in dict.fromkeys(first.plan.methods.values())] if tokens else []
    for line in dict.fromkeys(filter(None, said)):
        job.progress(line, 0, 0)


def compress_module(model: nn.Module, job: Job) -> Compressed:
    """A compressed copy of a module: its linear maps are replaced by packed layers."""
    module = copy.deepcopy(model).eval().requires_grad_(False)
    if hasattr(module, "set_experts_implementation"):
        # the plain loop multiplies with one expert at a time, which can be watched
        module.set_experts_implementation("eager")  # type: ignore[operator]
    source = InMemory(module)
    return compress_blocks(source, ToModule(source), job)


class ToModule(Sink):
    """Finished blocks stay where they are, with packed layers."""

    def __init__(self, source: InMemory) -> None:
        super().__init__(source.device)
        self.source = source

    def takes_stacks(self, layout: Layout) -> bool:
        return layout.expert_stacks or layout.is_plain  # plain numbers stay in the parameter that holds them

    def write(self, block: Block) -> None:
        self.tally.lap(block.name)
        self.tally.reports.extend(block.reports)
        place_packed(self.source.module, block.linears, block.packed)
        for weight in block.packed.values():
            self.tally.add(write(weight, self.job.layout, sym=False) if self.job.layout else {}, weight)

    def finish(self, first: Prepared) -> Compressed:
        module, job = self.source.module, self.job
        if first.probe is not None:
            with drawing(PROBE):
                first.probe.after = first_tensor(call(module, first.probe.batch))
        described: dict[str, Any] = {}
        if job.layout is not None:
            described = quantization_config(module, first.plan, job.recipe, job.layout, self.source.published)
        result = self.tally.result(job, first, model=type(module).__name__, quantization=described)
        return replace(result, _module=module)
