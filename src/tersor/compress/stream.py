"""Compress a checkpoint on disk into another, one block in memory at a time.

The walk loads a block, lets the methods replace its linear maps, runs the samples through the compressed block, writes it, and
lets it go. A short extra sample, the probe, runs along to the end: its output tells what was lost, and whether what was
written is what was computed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tersor
from tersor.calibrate.batches import Batch, fingerprint, first_tensor, without_cache
from tersor.calibrate.blocks import Unit
from tersor.calibrate.parallel import agree, is_first, processes
from tersor.checkpoint.hashes import Seen
from tersor.checkpoint.lazy_model import LazyModel, classes_of, compute_dtype
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.room import RESULT_FILE, inputs_of
from tersor.checkpoint.source import STEPS, open_checkpoint, torch_dtype
from tersor.checkpoint.writer import ResultWriter, model_fingerprint
from tersor.compress.describe import described_by, quantization_config
from tersor.compress.first_run import prepare
from tersor.compress.forecast import forecast
from tersor.compress.layout_choice import with_fitting_layout
from tersor.compress.plan import Plan, make_plan, without_stacks
from tersor.compress.recipe import plain_rule
from tersor.compress.result import Compressed, Size, Summary, Timer, loss_of, peak_memory, sparsity_of
from tersor.compress.samples import samples_by_path, samples_of
from tersor.compress.settings import Job, Settings, recorded
from tersor.compress.shared_writer import follow, lead, open_writer
from tersor.compress.walk import (
    Hooks,
    run,
    units_of,
    walk,
    walk_without_samples,
)
from tersor.errors import NotFiniteError, TersorError
from tersor.formats.grid import Stored
from tersor.formats.layout import Layout, QuantizationConfig
from tersor.formats.layouts import write
from tersor.layers.experts import ExpertMap
from tersor.layers.linear_map import as_matrix, columns_of, own_layout, set_weight_matrix
from tersor.methods.block import Block, LayerReport


def compress_checkpoint(name: str, job: Job) -> Compressed:
    checkpoint = replace(open_checkpoint(name, allow_pickle=job.allow_pickle), seen=Seen())
    if checkpoint.gguf is not None:
        raise TersorError(
            f"{name} is a GGUF file, which comes last: compress the original, then `tersor export` the result"
        )
    if "quantization_config" in checkpoint.config:
        raise TersorError(f"{name} is quantized already; compress the original")
    folder = tempfile.TemporaryDirectory(prefix="tersor-") if job.out is None else None
    target = Path(folder.name) / "model" if folder is not None else job.out
    assert target is not None
    target = agree(target)
    if target.resolve() == (checkpoint.origin or checkpoint.directory).resolve():
        raise TersorError(f"{target} is the model itself; give another output directory")
    if job.layout is None:
        raise TersorError("a model given by name is written as it is compressed: format=None is for modules in memory")

    dtype = compute_dtype(checkpoint, job.place, job.dtype)
    may_widen = job.dtype == "auto" and dtype == torch.float16
    if may_widen and open_writer(target, checkpoint).mark("dtype") == str(torch.float32):
        return _in_float32(name, job)  # as an earlier run of this command decided
    lazy = LazyModel(checkpoint, dtype=dtype, device=job.place)
    job = with_fitting_layout(lazy.module, job)
    layout = job.layout
    assert layout is not None
    plan = make_plan(lazy.module, job)
    if not layout.expert_stacks:
        experts = [name for name, each in plan.all_linears().items() if isinstance(each, ExpertMap)]
        stacked = [name for name in experts if not lazy.named_pieces(name)]
        plan = without_stacks(plan, stacked, layout, include=job.include, progress=job.progress)
    writer = open_writer(
        target,
        checkpoint,
        blocks=[unit.name for unit in plan.blocks],
        inputs=inputs_of(checkpoint, calibration=job.calibration),
        tell=lambda line: job.progress(line, 0, 0),
    )
    tokenizer = job.tokenizer or load_tokenizer(checkpoint.directory)
    batches, probe = samples_of(job, samples_by_path(checkpoint, job), plan, lazy.module, tokenizer, job.place, dtype)
    stored = Stored(layout.scale_dtype or torch_dtype(checkpoint.config), layout.min_zero)
    hessian_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    marks = {
        "model": model_fingerprint(checkpoint),
        **_asked(job, layout, dtype),
        "calibration": fingerprint([*batches, probe] if probe else batches),
    }
    writer.check(marks, overwrite=job.overwrite, redo=bool(job.redo))

    def published(linear: str) -> list[str]:
        return [stem for stem, _ in lazy.pieces(linear)]

    config = quantization_config(lazy.module, plan, job.recipe, layout, published)
    blocks = _Blocks(lazy, writer, layout, described_by(layout, config))
    hooks = Hooks(lazy.load, lazy.release, blocks.restore, blocks.finished, job.progress, job.activations)
    after = None
    with torch.no_grad(), without_cache(lazy.module), blocks:
        lazy.load_rest([unit.module for unit in units_of(lazy.module)])
        try:
            prepared = prepare(lazy.module, plan, job.calibration, batches, probe, hooks)
        except NotFiniteError:
            if not may_widen:
                raise
            return _in_float32(name, job)
        plan, batches, probe, first = prepared.plan, prepared.batches, prepared.probe, prepared.traced
        before = None if first is None else first_tensor(first.output)
        again = _blocks_to_redo(plan, job.redo)
        writer.start(marks, overwrite=job.overwrite, redo=bool(job.redo))
        if job.redo:
            writer.redo(again, _stems_of(plan, published), layout.suffixes)
        job.progress(forecast(lazy, plan, batches, job.place, job.activations).text(), 0, 0)
        blocks.timer.lap("")
        if probe is None or first is None:
            walk_without_samples(lazy.module, plan, stored, hessian_dtype, hooks)
        else:
            try:
                end = walk(lazy.module, plan, batches, probe, first, stored, hessian_dtype, job.routing, hooks)
            except NotFiniteError:
                if not may_widen or processes() > 1:  # the others do not know, and go on
                    raise
                blocks.wait()
                return _in_float32(name, replace(job, overwrite=True))
            after = first_tensor(end)

        blocks.wait()
        if not is_first():
            return follow(target)
        job.progress("writing", 0, 1)
        config = quantization_config(lazy.module, plan, job.recipe, layout, published)
        extra: dict[str, Any] = {RESULT_FILE: _result(job, layout, marks, blocks.reports)}
        if layout.config_beside is not None:
            extra[layout.config_beside] = config
        replaced = {key for linear in plan.all_linears() for key in lazy.keys_of_map(linear)}
        earlier = checkpoint.config.get(STEPS) or []
        steps = job.steps or ([*earlier, job.recipe.method.options()] if earlier else [])
        described: dict[str, Any] = {STEPS: steps} if steps else {}
        described |= {"quantization_config": config} if config else {}
        writer.place(checkpoint, replaced, {**lazy.config(), **described}, extra)
        if probe is not None and first is not None and after is not None:
            read = _read_back(target, probe, first.units, dtype, job.place)
            if max(first.visits.values()) == 1:
                _check_equal(target, read, after)
            after = read  # of a block that is used twice, the walk ran the original the first time
        writer.seal()
        job.progress("writing", 1, 1)

    summary = Summary(
        model=name,
        method=job.recipe.method.options(),
        format=layout.name,
        layers=blocks.reports,
        left=plan.left,
        seconds=time.perf_counter() - job.started,
        seconds_per_block=blocks.timer.laps,
        memory_per_block=blocks.timer.memory,
        peak_memory=peak_memory(job.place),
        bits_per_weight=blocks.size.bits_per_weight,
        quantization=config,
        size_before=checkpoint.size(),
        size_after=open_checkpoint(target).size(),
        sparsity=sparsity_of(blocks.reports, plan.all_linears()),
        resumed_blocks=blocks.resumed,
        **loss_of(before, after),
    )
    return lead(Compressed(summary, target, before, after, _folder=folder))


def _in_float32(name: str, job: Job) -> Compressed:
    job.progress("float16 overflows: running in float32", 0, 0)
    return compress_checkpoint(name, replace(job, dtype="float32"))


def _asked(job: Job, layout: Layout, dtype: torch.dtype) -> dict[str, str]:
    """What decides the bytes of a result beside model and calibration, by the names under which the user gives it."""
    options = {("method" if key == "name" else key): value for key, value in job.recipe.method.options().items()}
    meant = {"format": layout.name, "dtype": dtype, "experts": job.routing}
    settings = {
        each.name: meant.get(each.name, getattr(job, each.name))
        for each in fields(Settings)
        if each.metadata["decides"]
    }
    asked = {**options, "rules": job.recipe.rules, **settings}
    return {key: str(value) for key, value in asked.items()}


class _Blocks:
    """Finished blocks to disk, and those of an interrupted run back from it.

    One process writes a block while it solves the next; a failure to write comes out when that one is finished, or with
    `wait`. Use as a context manager: nothing is written any more when it ends.
    """

    def __init__(self, lazy: LazyModel, writer: ResultWriter, layout: Layout, config: QuantizationConfig) -> None:
        self.lazy, self.writer, self.layout, self.config = lazy, writer, layout, config
        self.timer, self.size = Timer(lazy.device), Size()
        self.reports: list[LayerReport] = []
        self.resumed = 0
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tersor-writer")
        self._writing: Future[None] | None = None

    def __enter__(self) -> _Blocks:
        return self

    def __exit__(self, *_: object) -> None:
        self._background.shutdown()

    def wait(self) -> None:
        """Until everything finished so far is on disk."""
        if self._writing is not None:
            self._writing.result()

    def finished(self, block: Block) -> None:
        self.timer.lap(block.name)
        self.writer.seen.check()
        if block.name in self.writer.done:
            return
        tensors: dict[str, Tensor] = {}
        for linear, weight in block.packed.items():
            first = 0
            for stem, rows in self.lazy.pieces(linear):
                part = weight.rows(first, first + rows)
                sym = self.config.for_layer(stem, classes=classes_of(block.linears[linear])).sym
                mine = write(part, self.layout, sym=sym)
                if self.layout.is_plain:
                    mine = {suffix: own_layout(block.linears[linear], each) for suffix, each in mine.items()}
                self.size.add(mine, part)
                tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in mine.items()}
                first += rows
        self.wait()
        reports = [report.row() for report in block.reports]
        if processes() == 1:
            self._writing = self._background.submit(self.writer.write_block, block.name, tensors, reports)
        else:  # which takes an exchange with the other processes, and these keep an order
            self.writer.write_block(block.name, tensors, reports)
        self.reports.extend(block.reports)

    def restore(self, block: Block) -> bool:
        if block.name not in self.writer.done:
            return False
        self.wait()
        tensors = self.writer.read_block(block.name)
        if tensors is None:
            return False
        self.resumed += 1
        for linear, found in block.linears.items():
            parts = []
            for stem, _ in self.lazy.pieces(linear):
                mine = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == stem}
                if self.layout.is_plain:
                    mine = {suffix: as_matrix(found, each) for suffix, each in mine.items()}
                config = self.config.for_layer(stem, classes=classes_of(found))
                parts.append(self.layout.read(stem, mine, columns_of(found), config))
                self.size.add(mine, parts[-1])
            packed = type(parts[0]).stack_rows(parts)
            set_weight_matrix(found, packed.to(self.lazy.device).dequantize(self.lazy.dtype))
        self.reports.extend(LayerReport(**row) for row in self.writer.done[block.name])
        return True


def _blocks_to_redo(plan: Plan, patterns: tuple[str, ...]) -> set[str]:
    """The blocks that hold a layer that matches. Raises TersorError where a pattern matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in plan.all_linears()):
            raise TersorError(f"--redo {pattern} matches none of the layers that are compressed")
    return {
        block
        for block, linears in plan.linears.items()
        if any(fnmatchcase(name, pattern) for name in linears for pattern in patterns)
    }


def _stems_of(plan: Plan, published: Callable[[str], list[str]]) -> dict[str, dict[str, list[str]]]:
    """{block: {layer: its published names}}"""
    return {block: {name: published(name) for name in linears} for block, linears in plan.linears.items() if linears}


def _result(job: Job, layout: Layout, marks: dict[str, str], reports: list[LayerReport]) -> dict[str, Any]:
    """What is kept beside the checkpoint: no times, so that the same job gives the same bytes."""
    return {
        "method": job.recipe.method.options(),
        "format": layout.name,
        "version": tersor.__version__,
        "fingerprint": marks,
        "settings": recorded(job),
        "rules": [plain_rule(rule) for rule in job.recipe.rules],
        "layers": [{k: v for k, v in report.row().items() if k != "seconds"} for report in reports],
    }


def _read_back(target: Path, probe: Batch, units: list[Unit], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The probe's output from the checkpoint that was written."""
    lazy = LazyModel(open_checkpoint(target, unfinished=True), dtype=dtype, device=device)
    names = {unit.name for unit in units}
    mine = [unit for unit in units_of(lazy.module) if unit.name in names]
    lazy.load_rest([unit.module for unit in mine])
    hooks = Hooks(lazy.load, lazy.release, lambda block: False, lambda block: None, lambda what, done, total: None)
    with without_cache(lazy.module):
        read = first_tensor(run(lazy.module, mine, [probe], hooks)[0])
    assert read is not None
    return read


def _check_equal(target: Path, read: Tensor, computed: Tensor) -> None:
    error = float((read - computed).abs().max() / computed.abs().max().clamp(min=1e-9))
    if not error < 1e-3:
        raise TersorError(
            f"{target} was written, but read back its output is off by {error:.3g} of the largest value: do not use it, "
            "and please report this with the command and the model"
        )
