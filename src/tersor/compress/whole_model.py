"""Apply a method that needs the whole model in memory, and write what it made."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tersor.calibrate.batches import Batch, call, first_tensor, without_cache, without_target
from tersor.calibrate.draws import PROBE, drawing
from tersor.checkpoint.lazy_model import compute_dtype
from tersor.checkpoint.load import load_opened, load_tokenizer
from tersor.checkpoint.preprocessing import PREPROCESSOR, image_settings, preprocessor_config
from tersor.checkpoint.room import check_free, inputs_of
from tersor.checkpoint.source import Checkpoint, open_checkpoint, torch_dtype
from tersor.compress.first_run import UNFIT, fitted
from tersor.compress.result import Compressed
from tersor.compress.samples import probe_for, read_samples, samples_by_path
from tersor.compress.save import save_plain
from tersor.compress.settings import Job
from tersor.compress.summary import Summary, loss_of
from tersor.devices import peak_memory
from tersor.errors import TersorError
from tersor.formats.layouts import PLAIN
from tersor.layers.linear_map import linear_maps
from tersor.methods.method import ModelMethod, Work


def compress_whole_checkpoint(checkpoint: Checkpoint, job: Job) -> Compressed:
    """Load a model, compress it, and write it to `job.out` where that is given. Leaves nothing behind where it fails."""
    if "quantization_config" in checkpoint.config:
        raise TersorError(f"{checkpoint} is quantized already; compress the original")
    inputs = inputs_of(checkpoint, calibration=job.calibration)
    if job.out is not None:
        check_free(job.out, overwrite=job.overwrite, inputs=inputs)
    dtype = compute_dtype(checkpoint, job.place, job.dtype)
    module = load_opened(checkpoint, dtype=dtype, device=job.place)
    tokenizer = job.tokenizer or load_tokenizer(checkpoint.directory)
    job = replace(job, tokenizer=tokenizer, calibration=samples_by_path(checkpoint, job))
    result = _compress(module, job, torch_dtype(checkpoint.config))
    summary = replace(result.summary, model=str(checkpoint), size_before=checkpoint.size())
    extra: dict[str, Any] = {}
    if "mean" in checkpoint.config:  # timm keeps these in its config.json, which ours takes the place of
        extra[PREPROCESSOR] = preprocessor_config(image_settings(checkpoint))
    if job.out is None:
        return replace(result, summary=summary)
    save_plain(
        result.model,
        replace(summary, steps=job.steps),
        job.out,
        source=checkpoint,
        extra=extra,
        overwrite=job.overwrite,
        inputs=inputs,
        held=job.held,
    )
    summary = replace(summary, size_after=open_checkpoint(job.out).size())
    return Compressed(summary, job.out, result.before, result.after)


def compress_whole_module(model: nn.Module, job: Job) -> Compressed:
    """A compressed copy of a module in memory."""
    return _compress(copy.deepcopy(model), job, next(model.parameters()).dtype)


def _compress(module: nn.Module, job: Job, stored: torch.dtype) -> Compressed:
    """Changes `module`. stored: the dtype of the parameters on disk; the result is rounded to it."""
    method = job.recipe.method
    assert isinstance(method, ModelMethod)
    check_rules(job)
    job.check_patterns(list(linear_maps(module)))
    first, samples = next(module.parameters()), []
    if method.needs_samples or job.calibration is not None:
        samples = read_samples(job, module, first.device, first.dtype)
    size = _parameters_of(module)

    def change(work: Work) -> nn.Module:
        compressed = method.compress_model(module, work).eval()
        for parameter in compressed.parameters():
            parameter.data = parameter.data.to(stored).to(parameter.dtype)
        return compressed

    found = compared(module.eval(), job, samples, change)
    summary = replace(
        found.summary,
        format=PLAIN.name,
        bits_per_weight=8.0 * stored.itemsize,
        parameters_before=size,
        parameters_after=_parameters_of(found.model),
    )
    return replace(found, summary=summary)


def compared(original: nn.Module, job: Job, samples: list[Batch], change: Callable[[Work], nn.Module]) -> Compressed:
    """The model that `change` makes. What `probe_for` gives runs through the original before and through the result after. The
    summary says nothing of a file."""
    first = next(original.parameters())
    probe = probe_for(job, original, without_target(samples[0]) if samples else None, first.device, first.dtype)
    before = after = None
    with without_cache(original):
        with torch.no_grad(), drawing(PROBE):
            try:
                if probe:
                    before, samples, probe = fitted(
                        original, samples, probe, lambda batch: first_tensor(call(original, batch))
                    )
            except UNFIT:
                if samples:
                    raise
                probe = None  # a model that does not run on text alone, and nobody gave anything else
        work = Work(samples, job.wants, job.progress)
        made = change(work)
        if probe:
            with torch.no_grad(), drawing(PROBE):
                after = first_tensor(call(made, probe))
    summary = Summary(
        model=type(original).__name__,
        method=job.recipe.method.options(),
        format=None,
        layers=work.reports,
        left=[],
        seconds=time.perf_counter() - job.started,
        seconds_per_block={},
        peak_memory=peak_memory(job.place),
        bits_per_weight=0.0,
        quantization={},
        **loss_of(job, before, after),
    )
    return Compressed(summary, None, before, after, _module=made)


def _parameters_of(module: nn.Module) -> int:
    """How many numbers were learned: the parameters, and what exchanged modules hold packed."""
    packed = sum(int(getattr(each, "packed_parameters", 0)) for each in module.modules())
    return packed + sum(parameter.numel() for parameter in module.parameters())


def check_rules(job: Job) -> None:
    """Raise TersorError where a rule does more than skip layers, or the method takes none."""
    method = job.recipe.method
    if isinstance(method, ModelMethod) and not method.takes_layers and job.recipe.rules:
        raise TersorError(f"method {method.name} does not work on single layers: it takes no rules")
    if any(not rule.skip for rule in job.recipe.rules):
        raise TersorError(f"method {method.name} works on the whole model: its rules can only skip layers")
