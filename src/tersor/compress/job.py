"""`tersor.compress`: walk a model block by block and let a method compress each.

The walk: load a block, gather what the method needs from the samples that wait in front of it, let the method replace the block's
linear maps, run the samples through the compressed block, write it, let it go. A model given by name is never whole in memory.
A short extra sample, the probe, runs along to the end: its output tells what was lost, and whether what was written is what was
computed.
"""

from __future__ import annotations

import copy
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

import tersor
from tersor.calibrate.batches import (
    Batch,
    Calibration,
    call,
    fingerprint,
    make_batches,
    probe_of,
    to_device,
    without_cache,
)
from tersor.calibrate.blocks import Unit
from tersor.checkpoint.lazy_model import LazyModel, compute_dtype, read_layer
from tersor.checkpoint.load import load_tokenizer, pick_device
from tersor.checkpoint.quantization_config import make_config, parse_config
from tersor.checkpoint.source import open_checkpoint, torch_dtype
from tersor.checkpoint.writer import RESULT_FILE, Job, model_fingerprint
from tersor.compress.block import Block, LayerReport
from tersor.compress.method import Method
from tersor.compress.plan import Plan, make_plan, without
from tersor.compress.recipe import Recipe, Rule, make_rules
from tersor.compress.result import Compressed, Summary, Timer, loss_of, peak_memory
from tersor.compress.walk import Hooks, Progress, first_tensor, run, trace, units_of, walk, walk_without_samples
from tersor.errors import TersorError
from tersor.formats.grid import Stored
from tersor.formats.layouts import Layout, layout_named, write
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.layers.experts import stored_name
from tersor.layers.linear_map import columns_of, linear_maps, set_weight_matrix
from tersor.layers.quantized_linear import place_packed


def compress(
    model: str | Path | nn.Module,
    method: Method,
    *,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    calibration: Calibration = None,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    format: str | None = "gptq",
    out: str | Path | None = None,
    overwrite: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Compressed:
    """Compress a model with one method, or with several by rules.

    model: a directory, a hub name or a built-in name, which is read block by block and written to `out` (a temporary directory
        where none is given) as blocks are finished; or a module in memory, of which a compressed copy is made.
    calibration: a text file, "builtin" (also None), "hf:NAME", a list of strings, or an iterable of the model's own inputs.
    format: how the result is stored, which also bounds its precision: "gptq", "gptq_v2" or "compressed-tensors"; None keeps
        exact numbers, for a module in memory only.
    rules: what is different for some layers (see `recipe.py`), such as {"match": "*.down_proj", "bits": 8}; the last that
        matches wins.
    include, exclude: patterns of linear layers, such as "*.mlp.*". head: compress the output head too.
    progress: called as progress(what, done, total).

    Raises TersorError on bad input, before anything is written. An interrupted job goes on when called again with the same
    arguments and `out`.
    """
    layout = None if format is None else layout_named(format)
    recipe = Recipe(method, make_rules(rules))
    if samples < 1 or seq_len < 1:
        raise TersorError(f"samples={samples} and seq_len={seq_len} must be positive")
    job = _Settings(recipe, layout, pick_device(device), progress or (lambda what, done, total: None))
    texts = {"samples": samples, "seq_len": seq_len, "seed": seed}
    choice: _Choice = {"include": tuple(include), "exclude": tuple(exclude), "head": head}
    if isinstance(model, nn.Module):
        if out is not None:
            raise TersorError(
                "a module in memory is compressed in memory: call save(directory) on the result, not out="
            )
        return _compress_module(model, job, calibration, texts, choice, tokenizer)
    if layout is None:
        raise TersorError("a model given by name is written as it is compressed: format=None is for modules in memory")
    return _compress_checkpoint(str(model), job, calibration, texts, choice, tokenizer, dtype, out, overwrite)


class _Choice(TypedDict):
    """Which layers to compress."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    head: bool


@dataclass(frozen=True)
class _Settings:
    recipe: Recipe
    layout: Layout | None
    device: torch.device
    progress: Progress
    started: float = field(default_factory=time.perf_counter)


def _compress_checkpoint(
    name: str,
    job: _Settings,
    calibration: Calibration,
    texts: dict[str, int],
    choice: _Choice,
    tokenizer: Any,
    dtype: str,
    out: str | Path | None,
    overwrite: bool,
) -> Compressed:
    checkpoint = open_checkpoint(name)
    if "quantization_config" in checkpoint.config:
        raise TersorError(f"{name} is quantized already; compress the original")
    folder = tempfile.TemporaryDirectory(prefix="tersor-") if out is None else None
    target = Path(folder.name) / "model" if folder is not None else Path(str(out)).expanduser()
    if target.resolve() == checkpoint.directory.resolve():
        raise TersorError(f"{target} is the model itself; give another output directory")
    layout = job.layout
    assert layout is not None
    model_dtype = compute_dtype(checkpoint, job.device, dtype)
    lazy = LazyModel(checkpoint, dtype=model_dtype, device=job.device)
    plan = make_plan(lazy.module, job.recipe, layout, **choice)
    tokenizer = tokenizer or load_tokenizer(checkpoint.directory)
    batches, probe = _samples(job, plan.methods.values(), lazy.module, calibration, texts, tokenizer, model_dtype)
    stored = Stored(layout.scale_dtype or torch_dtype(checkpoint.config), layout.min_zero)
    hessian_dtype = torch.float64 if model_dtype == torch.float64 else torch.float32

    writer = Job(target)
    marks = {
        "model": model_fingerprint(checkpoint),
        "method": repr((job.recipe, layout.name, str(model_dtype), sorted(choice.items()))),
        "calibration": fingerprint([*batches, probe] if probe else batches),
    }
    writer.check(marks, overwrite=overwrite)
    timer, size = Timer(), _Size()
    reports: list[LayerReport] = []
    resumed = 0

    def stems(linear: str) -> list[str]:
        return [stem for stem, _ in lazy.pieces(linear)]

    quantization = _quantization_config(lazy.module, plan, job, stems)
    config = parse_config(quantization)

    def restore(block: Block) -> bool:
        nonlocal resumed
        if block.name not in writer.done:
            return False
        resumed += 1
        tensors = writer.read_block(block.name)
        for linear, found in block.linears.items():
            parts = []
            for stem, _ in lazy.pieces(linear):
                mine = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == stem}
                parts.append(read_layer(stem, mine, columns_of(found), config))
                size.add(mine, parts[-1])
            packed = QuantizedWeight.stack_rows(parts)
            set_weight_matrix(found, packed.to(job.device).dequantize(model_dtype))
        reports.extend(LayerReport(**row) for row in writer.done[block.name])
        return True

    def finished(block: Block) -> None:
        timer.lap(block.name)
        if block.name in writer.done:
            return
        tensors: dict[str, Tensor] = {}
        for linear, weight in block.packed.items():
            first = 0
            for stem, rows in lazy.pieces(linear):
                part = weight.rows(first, first + rows)
                mine = write(part, layout, sym=config.for_layer(stem).sym)
                size.add(mine, part)
                tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in mine.items()}
                first += rows
        writer.write_block(block.name, tensors, [report.row() for report in block.reports])
        reports.extend(block.reports)

    hooks = Hooks(lazy.load, lazy.release, restore, finished, job.progress)
    before = after = None
    with torch.no_grad(), without_cache(lazy.module):
        lazy.load_rest([unit.module for unit in units_of(lazy.module)])
        if probe is not None:
            first = trace(lazy.module, probe, hooks)
            before = first_tensor(first.output)
            plan = without(plan, {name for name in plan.all_linears() if not first.is_called(name)})
            _check_reached(plan, first.visits)
        writer.start(marks, overwrite=overwrite)
        timer.lap("")
        if probe is None:
            walk_without_samples(lazy.module, plan, stored, hessian_dtype, hooks)
        else:
            output = walk(lazy.module, plan, batches, probe, first, stored, hessian_dtype, hooks)
            after = first_tensor(output)
        replaced = {key for linear in plan.all_linears() for key in lazy.keys_of_map(linear)}
        result: dict[str, Any] = {
            "method": job.recipe.method.options(),
            "format": layout.name,
            "version": tersor.__version__,
        }
        result |= {"layers": [{k: v for k, v in r.row().items() if k != "seconds"} for r in reports]}
        written = {**checkpoint.config, "quantization_config": _quantization_config(lazy.module, plan, job, stems)}
        extra: dict[str, Any] = {RESULT_FILE: result}
        if layout.name != "compressed-tensors":
            extra["quantize_config.json"] = written["quantization_config"]
        job.progress("writing", 0, 1)
        writer.finish(checkpoint, replaced, written, extra)
        if probe is not None and after is not None:
            read = _read_back(target, probe, first.units, model_dtype, job)
            if max(first.visits.values()) == 1:
                _check_equal(target, read, after)
            after = read  # of a block that is used twice, the walk ran the original the first time
        job.progress("writing", 1, 1)

    size_after = open_checkpoint(target).size()
    summary = Summary(
        model=name,
        method=job.recipe.method.options(),
        format=layout.name,
        layers=reports,
        left=plan.left,
        seconds=time.perf_counter() - job.started,
        seconds_per_block=timer.laps,
        peak_memory=peak_memory(job.device),
        bits_per_weight=size.bits_per_weight,
        quantization=written["quantization_config"],
        size_before=checkpoint.size(),
        size_after=size_after,
        resumed_blocks=resumed,
        **loss_of(before, after),
    )
    return Compressed(summary, target, _folder=folder)


def _compress_module(
    model: nn.Module,
    job: _Settings,
    calibration: Calibration,
    texts: dict[str, int],
    choice: _Choice,
    tokenizer: Any,
) -> Compressed:
    module = copy.deepcopy(model).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")  # type: ignore[operator]  # the one whose products with single experts can be seen
    plan = make_plan(module, job.recipe, None, **choice)
    dtype = next(module.parameters()).dtype
    device = next(module.parameters()).device
    job = replace(job, device=device)
    batches, probe = _samples(job, plan.methods.values(), module, calibration, texts, tokenizer, dtype)
    stored = None if job.layout is None else Stored(job.layout.scale_dtype or dtype, job.layout.min_zero)
    hessian_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    timer, size, reports = Timer(), _Size(), []

    def finished(block: Block) -> None:
        timer.lap(block.name)
        reports.extend(block.reports)
        place_packed(module, block.linears, block.packed)
        for weight in block.packed.values():
            size.add(write(weight, job.layout, sym=False) if job.layout else {}, weight)

    def stems(linear: str) -> list[str]:
        return [stored_name(linear, plan_maps[linear])]

    plan_maps = linear_maps(module)
    hooks = Hooks(lambda unit: None, lambda unit: None, lambda block: False, finished, job.progress)
    before = after = None
    with torch.no_grad(), without_cache(module):
        if probe is None:
            walk_without_samples(module, plan, stored, hessian_dtype, hooks)
        else:
            first = trace(module, probe, hooks)
            before = first_tensor(first.output)
            plan = without(plan, {name for name in plan.all_linears() if not first.is_called(name)})
            _check_reached(plan, first.visits)
            walk(module, plan, batches, probe, first, stored, hessian_dtype, hooks)
            after = first_tensor(call(module, probe))
    summary = Summary(
        model=type(model).__name__,
        method=job.recipe.method.options(),
        format=job.layout.name if job.layout else None,
        layers=reports,
        left=plan.left,
        seconds=time.perf_counter() - job.started,
        seconds_per_block=timer.laps,
        peak_memory=peak_memory(device),
        bits_per_weight=size.bits_per_weight,
        quantization=_quantization_config(module, plan, job, stems) if job.layout else {},
        **loss_of(before, after),
    )
    return Compressed(summary, None, module)


@dataclass
class _Size:
    """Bits that the packed layers take, per weight in them."""

    bits: int = 0
    weights: int = 0

    def add(self, tensors: Mapping[str, Tensor], weight: QuantizedWeight) -> None:
        self.weights += weight.in_features * weight.out_features
        self.bits += 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return self.bits / max(self.weights, 1)


def _samples(
    job: _Settings,
    methods: Iterable[Method],
    module: nn.Module,
    calibration: Calibration,
    texts: dict[str, int],
    tokenizer: Any,
    dtype: torch.dtype,
) -> tuple[list[Batch], Batch | None]:
    """The calibration samples and the probe, on the device. A method that needs no samples gets none."""
    config = getattr(module, "config", None)
    needed = any(method.needs_samples for method in methods)
    if calibration is None and tokenizer is None and not needed:
        return [], None
    positions = getattr(config, "max_position_embeddings", None)
    batches = make_batches(calibration, tokenizer, max_positions=positions, **texts)
    moved = [to_device(batch, job.device, dtype) for batch in batches]
    return (moved if needed else []), probe_of(moved[0])


def _check_reached(plan: Plan, visits: Counter[str]) -> None:
    lost = [unit.name for unit in plan.blocks if plan.linears[unit.name] and not visits[unit.name]]
    if lost:
        raise TersorError(
            f"the calibration sample does not reach {lost[0]}{f' and {len(lost) - 1} more blocks' if len(lost) > 1 else ''}; "
            "give samples with all of the model's inputs, or --exclude what should stay as it is"
        )


def _read_back(target: Path, probe: Batch, units: list[Unit], dtype: torch.dtype, job: _Settings) -> Tensor:
    """The probe's output from the checkpoint that was written."""
    lazy = LazyModel(open_checkpoint(target), dtype=dtype, device=job.device)
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


def _quantization_config(
    model: nn.Module, plan: Plan, job: _Settings, stems: Callable[[str], list[str]]
) -> dict[str, Any]:
    """What the checkpoint says of itself: the recipe's method, layers that differ from it, and layers left as they are.

    stems: the published names of a linear map.
    """
    assert job.layout is not None
    base = job.recipe.method.quantization()
    changed = {
        stem: method.quantization()
        for name, method in plan.methods.items()
        if method.quantization() != base
        for stem in stems(name)
    }
    ignored = [stem for name in plan.left for stem in stems(name)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    config = make_config(
        job.layout.name,
        base,
        overrides=changed,
        ignored=ignored,
        head=any(found is head for found in plan.all_linears().values()),
        version=tersor.__version__,
    )
    inside = [name for name in plan.left if any(name.startswith(f"{unit.name}.") for unit in plan.blocks)]
    if job.layout.name != "compressed-tensors" and inside:
        left: dict[str, Any] = {f"-:^{re.escape(stem)}$": {} for name in inside for stem in stems(name)}
        config["dynamic"] = {**left, **config.get("dynamic", {})}
        unit = next(unit for unit in plan.blocks if plan.linears[unit.name])
        names = [name.removeprefix(f"{unit.name}.") for name in plan.linears[unit.name]]
        config["modules_in_block_to_quantize"] = [names]
    return config
