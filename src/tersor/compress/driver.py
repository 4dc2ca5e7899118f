"""The one driver of methods that go block by block: whatever the model comes from, and wherever the result goes.

A source gives a walk the weights that it asks for; a sink takes the blocks as they are finished. A checkpoint goes to files
(`stream.py`), a module to another module (`in_memory.py`).
"""

from __future__ import annotations

from contextlib import closing

import torch

from tersor.calibrate.batches import Batch, without_cache
from tersor.compress.first_run import prepare
from tersor.compress.layout_choice import with_fitting_layout
from tersor.compress.plan import Plan, make_plan, without_stacks
from tersor.compress.result import Compressed, Tally
from tersor.compress.samples import samples_of
from tersor.compress.settings import Job
from tersor.compress.walk import Prepared, Source, units_of, walk
from tersor.layers.experts import ExpertMap
from tersor.methods.block import Block


class Sink:
    """Where finished blocks go."""

    job: Job

    def __init__(self) -> None:
        self.tally = Tally()

    def open(self, job: Job, plan: Plan, samples: list[Batch]) -> None:
        """Raises TersorError where there is no place for this job's result; changes nothing. samples: all that are run."""
        self.job = job

    def start(self, first: Prepared) -> None:
        """The model runs, and the walk begins."""

    def restore(self, block: Block) -> bool:
        """Put back a block that an earlier run finished. False where none did."""
        return False

    def write(self, block: Block) -> None:
        raise NotImplementedError

    def finish(self, first: Prepared) -> Compressed:
        """The result, after all blocks."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is written any more."""


def compress_blocks(source: Source, sink: Sink, job: Job) -> Compressed:
    module = source.module
    job = with_fitting_layout(module, job)
    plan = make_plan(module, job)
    if job.layout is not None and job.layout.name == "compressed-tensors":
        experts = [name for name, each in plan.all_linears().items() if isinstance(each, ExpertMap)]
        stacked = [name for name in experts if not source.named_pieces(name)]
        plan = without_stacks(plan, stacked, include=job.include, progress=job.progress)
    batches, probe = samples_of(job, plan, source)
    sink.open(job, plan, batches if probe is None else [*batches, probe])
    with torch.no_grad(), without_cache(module), closing(sink):
        source.load_rest([unit.module for unit in units_of(module)])
        first = prepare(source, plan, job, batches, probe)
        sink.start(first)
        for block in walk(source, first, job, sink.restore):
            sink.write(block)
        return sink.finish(first)
