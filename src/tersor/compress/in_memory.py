"""A module that is in memory as what a job starts from, and a copy whose linear maps are packed layers as what it ends in."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn

from tersor.calibrate.batches import call, first_tensor
from tersor.calibrate.draws import PROBE, drawing
from tersor.compress.describe import quantization_config
from tersor.compress.driver import Sink, compress_blocks
from tersor.compress.result import Compressed
from tersor.compress.settings import Job
from tersor.compress.walk import Prepared
from tersor.formats.layouts import write
from tersor.layers.experts import stored_name
from tersor.layers.linear_map import matrix_shape, packable_maps
from tersor.layers.quantized_linear import place_packed
from tersor.methods.block import Block


def compress_module(model: nn.Module, job: Job) -> Compressed:
    """A compressed copy of a module."""
    source = InMemory(model)
    return compress_blocks(source, ToModule(source), job)


class InMemory:
    """A source of which all is loaded: a copy of a module."""

    checkpoint = None

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        if hasattr(self.module, "set_experts_implementation"):
            # the plain loop is the one whose products with single experts can be seen
            self.module.set_experts_implementation("eager")  # type: ignore[operator]
        self.maps = packable_maps(self.module)
        first = next(self.module.parameters())
        self.dtype = self.stored_dtype = first.dtype
        self.device = first.device

    def load(self, module: nn.Module) -> None:
        pass

    def release(self, module: nn.Module) -> None:
        pass

    def load_rest(self, units: Iterable[nn.Module]) -> None:
        pass

    def named_pieces(self, linear: str) -> list[tuple[str, int]]:
        """None of a model of transformers, which looks for whole stacks under the module's own names."""
        found = self.maps[linear]
        known = not hasattr(self.module, "base_model_prefix")
        return [(stored_name(linear, found), matrix_shape(found)[0])] if known else []


class ToModule(Sink):
    """Finished blocks stay where they are, with packed layers."""

    def __init__(self, source: InMemory) -> None:
        super().__init__()
        self.source, self.module = source, source.module

    def write(self, block: Block) -> None:
        self.tally.lap(block.name)
        self.tally.reports.extend(block.reports)
        place_packed(self.module, block.linears, block.packed)
        for weight in block.packed.values():
            self.tally.add(write(weight, self.job.layout, sym=False) if self.job.layout else {}, weight)

    def finish(self, first: Prepared) -> Compressed:
        job, probe = self.job, first.probe
        if probe is not None:
            with drawing(PROBE):
                probe.after = first_tensor(call(self.module, probe.batch))
        described = {}
        if job.layout is not None:
            maps = self.source.maps
            described = quantization_config(
                self.module, first.plan, job.recipe, job.layout, lambda name: [stored_name(name, maps[name])]
            )
        summary = self.tally.summary(
            job, first, self.source.device, model=type(self.module).__name__, quantization=described
        )
        return Compressed(summary, None, first.before, first.after, _module=self.module)
