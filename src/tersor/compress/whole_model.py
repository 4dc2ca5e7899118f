"""Apply a method that needs the whole model in memory, and write what it made."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from tersor.calibrate.batches import call, first_tensor, without_cache, without_target
from tersor.calibrate.draws import PROBE, drawing
from tersor.checkpoint.lazy_model import compute_dtype
from tersor.checkpoint.load import load_opened, load_tokenizer
from tersor.checkpoint.preprocessing import PREPROCESSOR, image_settings, preprocessor_config
from tersor.checkpoint.room import check_free, inputs_of
from tersor.checkpoint.source import open_checkpoint, torch_dtype
from tersor.compress.first_run import UNFIT, fitted
from tersor.compress.result import Compressed, Summary, loss_of, peak_memory
from tersor.compress.samples import probe_for, read_samples, samples_by_path
from tersor.compress.save import save_plain
from tersor.compress.settings import Job
from tersor.errors import TersorError
from tersor.formats.layouts import PLAIN
from tersor.layers.linear_map import linear_maps
from tersor.methods.method import ModelMethod, Work


def compress_whole_checkpoint(name: str, job: Job) -> Compressed:
    """Load a model as it is, compress it, and write it to `job.out` where that is given. Nothing is left where it fails."""
    checkpoint = open_checkpoint(name, allow_pickle=job.allow_pickle)
    if "quantization_config" in checkpoint.config:
        raise TersorError(f"{name} is quantized already; compress the original")
    inputs = inputs_of(checkpoint, calibration=job.calibration)
    if job.out is not None:
        check_free(job.out, overwrite=job.overwrite, inputs=inputs)
    dtype = compute_dtype(checkpoint, job.place, job.dtype)
    module = load_opened(checkpoint, dtype=dtype, device=job.place)
    tokenizer = job.tokenizer or load_tokenizer(checkpoint.directory)
    job = replace(job, tokenizer=tokenizer, calibration=samples_by_path(checkpoint, job))
    result = _compress(module, job, torch_dtype(checkpoint.config))
    summary = replace(result.summary, model=name, size_before=checkpoint.size())
    extra: dict[str, Any] = {}
    if "mean" in checkpoint.config:  # facts that lie in a config.json of timm's and not in ours
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
    )
    summary = replace(summary, size_after=open_checkpoint(job.out).size())
    return Compressed(summary, job.out, result.before, result.after)


def compress_whole_module(model: nn.Module, job: Job) -> Compressed:
    """A compressed copy of a module in memory."""
    return _compress(copy.deepcopy(model), job, next(model.parameters()).dtype)


def _compress(module: nn.Module, job: Job, stored: torch.dtype) -> Compressed:
    """module: to be changed. stored: the dtype of the parameters on disk, to which the result's are rounded."""
    method = job.recipe.method
    assert isinstance(method, ModelMethod)
    check_patterns(job, list(linear_maps(module)))
    first, samples = next(module.parameters()), []
    if method.needs_samples or job.calibration is not None:
        samples = read_samples(job, job.calibration, module, job.tokenizer, first.device, first.dtype)
    size = _parameters_of(module)
    probe = probe_for(job, module, without_target(samples[0]) if samples else None, first.device, first.dtype)
    before = None
    module.eval()
    with without_cache(module):
        with torch.no_grad(), drawing(PROBE):
            try:
                if probe:
                    before, samples, probe = fitted(
                        module, samples, probe, lambda each: first_tensor(call(module, each))
                    )
            except UNFIT:
                if samples:
                    raise
                probe = None  # a model that does not run on text alone, and nobody gave anything else
        work = Work(samples, lambda name: is_wanted(job, name), job.progress)
        compressed = method.compress_model(module, work).eval()
        for parameter in compressed.parameters():
            parameter.data = parameter.data.to(stored).to(parameter.dtype)
        with torch.no_grad(), drawing(PROBE):
            after = first_tensor(call(compressed, probe)) if probe else None
    summary = Summary(
        model=type(module).__name__,
        method=method.options(),
        format=PLAIN.name,
        layers=work.reports,
        left=[],
        seconds=time.perf_counter() - job.started,
        seconds_per_block={},
        peak_memory=peak_memory(job.place),
        bits_per_weight=8.0 * stored.itemsize,
        quantization={},
        parameters_before=size,
        parameters_after=_parameters_of(compressed),
        **loss_of(job, before, after),
    )
    return Compressed(summary, None, before, after, _module=compressed)


def _parameters_of(module: nn.Module) -> int:
    """How many numbers were learned: parameters, and those that exchanged modules hold packed."""
    packed = sum(int(getattr(each, "packed_parameters", 0)) for each in module.modules())
    return packed + sum(parameter.numel() for parameter in module.parameters())


def is_wanted(job: Job, name: str) -> bool:
    """Whether the user asked for this layer."""
    included = not job.include or any(fnmatchcase(name, pattern) for pattern in job.include)
    excluded = any(fnmatchcase(name, pattern) for pattern in job.exclude)
    return included and not excluded and job.recipe.method_for(name) is not None


def check_patterns(job: Job, layers: list[str]) -> None:
    """Raise TersorError where a pattern matches none of the layers, or a rule does more than skip some."""
    job.recipe.check_matches(layers)
    for rule in job.recipe.rules:
        if not rule.skip:
            raise TersorError(
                f"method {job.recipe.method.name} works on the whole model: its rules can only skip layers"
            )
    for pattern in (*job.include, *job.exclude):
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise TersorError(f"the pattern {pattern!r} matches none of the {len(layers)} linear layers")
