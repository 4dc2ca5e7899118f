"""Compress a checkpoint on disk into another, one block in memory at a time.

The walk loads a block, lets the methods replace its linear maps, runs the samples through the compressed block, and gives it
out to be written. A short extra sample, the probe, runs through the whole model with them. Its output tells what was lost, and
whether the files hold what was computed. A model that overflows float16 is walked through once more, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.calibrate.batches import Batch, fingerprint, without_cache
from tersor.calibrate.blocks import units_of
from tersor.checkpoint.hashes import Seen
from tersor.checkpoint.lazy_model import LazyModel, classes_of, compute_dtype, dtypes_to_try
from tersor.checkpoint.room import RESULT_FILE, inputs_of
from tersor.checkpoint.source import STEPS, Checkpoint, open_checkpoint
from tersor.checkpoint.writer import ResultWriter, model_fingerprint
from tersor.compress.describe import described_by, quantization_config
from tersor.compress.driver import Sink, compress_blocks
from tersor.compress.forecast import forecast
from tersor.compress.plan import Plan
from tersor.compress.recipe import plain_rule
from tersor.compress.result import Compressed, directory_for
from tersor.compress.settings import Job, asked_of, recorded
from tersor.compress.shared_writer import follow, lead, open_writer
from tersor.compress.target_bits import chosen_mark
from tersor.compress.walk import Prepared, Probe, trace
from tersor.errors import NotFiniteError, TersorError
from tersor.formats.layout import Layout, QuantizationConfig
from tersor.formats.layouts import write
from tersor.layers.linear_map import as_matrix, columns_of, own_layout, put_packed
from tersor.methods.block import Block, LayerReport
from tersor.methods.method import Report
from tersor.processes import agree, is_first, processes
from tersor.progress import silent
from tersor.version import __version__


def compress_checkpoint(checkpoint: Checkpoint, job: Job) -> Compressed:
    checkpoint = replace(checkpoint, seen=Seen())
    if checkpoint.gguf is not None:
        raise TersorError(
            f"{checkpoint} is a GGUF file, which cannot be compressed further: compress the original, then `tersor export` the "
            "result"
        )
    if "quantization_config" in checkpoint.config:
        raise TersorError(f"{checkpoint} is quantized already; compress the original")
    target, folder = directory_for(job.out)
    target = agree(target)
    if target.resolve() == (checkpoint.origin or checkpoint.directory).resolve():
        raise TersorError(f"{target} is the model itself; give another output directory")
    if job.layout is None:
        raise TersorError("a model given by name is written as it is compressed: format=None is for modules in memory")
    tries = dtypes_to_try(
        checkpoint, job.place, job.dtype, earlier=lambda: open_writer(target, checkpoint).mark("dtype")
    )
    for dtype in tries:
        if dtype != compute_dtype(checkpoint, job.place, job.dtype):
            job.progress("float16 overflows: running in float32", 0, 0)
        lazy = LazyModel(checkpoint, dtype=dtype, device=job.place)
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="tersor-writer") as background:
                files = Files(lazy, target, background)
                return replace(compress_blocks(lazy, files, job), _folder=folder)
        except NotFiniteError:
            if dtype == tries[-1] or (
                files.started and processes() > 1
            ):  # other processes cannot be told, and would go on
                raise
        job = replace(job, overwrite=job.overwrite or files.started)
    raise AssertionError("the last try returns or raises")


class Files(Sink):
    """Writes finished blocks to disk, and reads those of an interrupted run back.

    A single process writes a block while it solves the next. A failure to write is raised when that next block is finished, or in
    the end.
    """

    layout: Layout
    config: QuantizationConfig
    writer: ResultWriter

    def __init__(self, lazy: LazyModel, target: Path, background: ThreadPoolExecutor) -> None:
        super().__init__(lazy.device)
        self.lazy, self.target = lazy, target
        self.started = False
        self._background = background  # of one thread
        self._writing: Future[None] | None = None

    def open(self, job: Job, plan: Plan, samples: list[Batch]) -> None:
        assert job.layout is not None
        self.job, self.layout = job, job.layout
        self.writer = open_writer(
            self.target,
            self.lazy.checkpoint,
            blocks=[unit.name for unit in plan.blocks],
            inputs=inputs_of(self.lazy.checkpoint, calibration=job.calibration),
            tell=lambda line: job.progress(line, 0, 0),
        )
        self.marks = {
            "model": model_fingerprint(self.lazy.checkpoint),
            **asked_of(job, self.layout, self.lazy.dtype),
            **chosen_mark(job),
            "calibration": fingerprint(samples),
        }
        self.writer.check(self.marks, overwrite=job.overwrite, redo=bool(job.redo))
        self.config = described_by(self.layout, self._described(plan))

    def start(self, first: Prepared) -> None:
        job, plan = self.job, first.plan
        again = _blocks_to_redo(plan, job.redo)
        self.started = True
        self.writer.start(self.marks, overwrite=job.overwrite, redo=bool(job.redo))
        self.scratch = self.writer.folder if self.writer.folder.is_dir() else None  # another machine's disk may lack it
        if job.redo:
            names = {
                block: {name: self._published(name) for name in each} for block, each in plan.linears.items() if each
            }
            self.writer.redo(again, names, self.layout.suffixes)
        stored = self.layout.stored(self.lazy.stored_dtype)
        job.progress(forecast(self.lazy, first, job.place, job.activations, stored).text(), 0, 0)
        self.tally.lap("")

    def write(self, block: Block) -> None:
        self.tally.lap(block.name)
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
                self.tally.add(mine, part)
                tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in mine.items()}
                first += rows
        self._wait()
        reports = [report.row() for report in block.reports]
        if processes() == 1:
            self._writing = self._background.submit(self.writer.write_block, block.name, tensors, reports)
        else:  # writing exchanges messages with the other processes, which need a fixed order
            self.writer.write_block(block.name, tensors, reports)
        self.tally.reports.extend(block.reports)

    def restore(self, block: Block) -> bool:
        if block.name not in self.writer.done:
            return False
        self._wait()
        tensors = self.writer.read_block(block.name)
        if tensors is None:
            return False
        self.tally.resumed += 1
        for linear, found in block.linears.items():
            parts = []
            for stem, _ in self.lazy.pieces(linear):
                mine = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == stem}
                if self.layout.is_plain:
                    mine = {suffix: as_matrix(found, each) for suffix, each in mine.items()}
                config = self.config.for_layer(stem, classes=classes_of(found))
                parts.append(self.layout.read(stem, mine, columns_of(found), config))
                self.tally.add(mine, parts[-1])
            packed = type(parts[0]).stack_rows(parts)
            put_packed(found, packed.to(self.lazy.device), self.lazy.dtype)
        self.tally.reports.extend(LayerReport(**row) for row in self.writer.done[block.name])
        return True

    def finish(self, first: Prepared) -> Compressed:
        self._wait()
        if not is_first():
            return follow(self.target)
        job, lazy, plan, probe = self.job, self.lazy, first.plan, first.probe
        job.progress("writing", 0, 1)
        config = self._described(plan)
        extra: dict[str, Any] = {RESULT_FILE: record_of_job(job, self.layout, self.marks, self.tally.reports)}
        if self.layout.config_beside is not None:
            extra[self.layout.config_beside] = config
        replaced = {key for linear in plan.all_linears() for key in lazy.keys_of_map(linear)}
        earlier = lazy.checkpoint.config.get(STEPS) or []
        steps = job.steps or ([*earlier, job.recipe.method.options()] if earlier else [])
        described: dict[str, Any] = {STEPS: steps} if steps else {}
        described |= {"quantization_config": config} if config else {}
        self.writer.place(lazy.checkpoint, replaced, {**lazy.config(), **described}, extra)
        written = open_checkpoint(self.target, unfinished=True)
        if probe is not None and probe.after is not None:
            read = _read_back(written, probe, lazy)
            if max(probe.visits.values()) == 1:
                _check_equal(self.target, read, probe.after)
            probe.after = read  # of a block that is used twice, the walk ran the original the first time
        if job.held is not None:
            job.held.sign(self.target)
        self.writer.seal()
        job.progress("writing", 1, 1)
        sizes = {"size_before": lazy.checkpoint.size(), "size_after": written.size()}
        result = self.tally.result(job, first, model=str(lazy.checkpoint), quantization=config, **sizes)
        return lead(replace(result, directory=self.target))

    def _wait(self) -> None:
        """Wait until every finished block is on disk."""
        if self._writing is not None:
            self._writing.result()

    def _described(self, plan: Plan) -> dict[str, Any]:
        return quantization_config(self.lazy.module, plan, self.job.recipe, self.layout, self._published)

    def _published(self, linear: str) -> list[str]:
        return [stem for stem, _ in self.lazy.pieces(linear)]


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


def record_of_job(job: Job, layout: Layout, marks: dict[str, str], reports: Sequence[Report]) -> dict[str, Any]:
    """What `tersor.json` says of a job. It holds no times, so the same job gives the same bytes."""
    return {
        "method": job.recipe.method.options(),
        "format": layout.name,
        "version": __version__,
        "fingerprint": marks,
        "settings": recorded(job),
        "rules": [plain_rule(rule) for rule in job.recipe.rules],
        "layers": [{k: v for k, v in report.row().items() if k != "seconds"} for report in reports],
    }


def _read_back(written: Checkpoint, probe: Probe, original: LazyModel) -> Tensor:
    """The probe's output from the checkpoint that was written."""
    lazy = LazyModel(written, dtype=original.dtype, device=original.device)
    lazy.load_rest([unit.module for unit in units_of(lazy.module)])
    with without_cache(lazy.module):
        read = trace(lazy, probe.batch, silent).before
    assert read is not None
    return read


def _check_equal(target: Path, read: Tensor, computed: Tensor) -> None:
    error = float((read - computed).abs().max() / computed.abs().max().clamp(min=1e-9))
    if not error < 1e-3:
        raise TersorError(
            f"{target} was written, but read back its output is off by {error:.3g} of the largest value: do not use it, "
            "and please report this with the command and the model"
        )
