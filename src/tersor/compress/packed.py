"""Tune a packed model towards its original, and write the same files with other integers and steps."""

from __future__ import annotations

import copy
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor.calibrate.batches import fingerprint, without_cache
from tersor.checkpoint.lazy_model import LazyModel, classes_of, compute_dtype
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.room import RESULT_FILE, appearing, check_free, inputs_of, record_of, write_record
from tersor.checkpoint.source import STEPS, Checkpoint, open_checkpoint
from tersor.checkpoint.writer import model_fingerprint
from tersor.compress.result import Compressed, directory_for
from tersor.compress.samples import read_samples, samples_by_path
from tersor.compress.settings import Job, asked_of
from tersor.compress.stream import record_of_job
from tersor.compress.summary import Summary
from tersor.compress.whole_model import check_rules, compared
from tersor.errors import TersorError
from tersor.formats.layouts import LAYOUTS, Layout, write
from tersor.layers.linear_map import matrix_shape
from tersor.layers.quantized_linear import QuantizedLinear, packed_layers
from tersor.methods.method import PackedMethod, Work

# The tensors of a layer that tuning may change
CHANGED = ("qweight", "scales", "weight_packed", "weight", "weight_scale")


def compress_packed_checkpoint(checkpoint: Checkpoint, job: Job) -> Compressed:
    """Read a packed model and its original, tune the packed one, and write it to `job.out` (or a temporary directory). Leaves
    nothing behind where it fails."""
    method = job.recipe.method.name
    if job.original is None:
        raise TersorError(f"{method} compares with the model that was packed: give it as --original")
    if isinstance(job.original, nn.Module):
        raise TersorError("the original of a model given by name is given by name too")
    source = open_checkpoint(job.original, allow_pickle=job.allow_pickle)
    if "quantization_config" in source.config:
        raise TersorError(
            f"the original {job.original} is quantized itself; give the model that {checkpoint} was made from"
        )
    target, folder = directory_for(job.out)
    inputs = inputs_of(checkpoint, calibration=job.calibration, original=source.directory)
    check_free(target, overwrite=job.overwrite, inputs=inputs)
    earlier, record = checkpoint.config.get(STEPS) or [], record_of(checkpoint.directory) or {}
    assert isinstance(job.recipe.method, PackedMethod)
    check_keeps_zeros(job.recipe.method, [*earlier, record.get("method"), *(record.get("rules") or [])])
    dtype = _wide_enough(compute_dtype(source, job.place, job.dtype), job)
    lazy = LazyModel(checkpoint, dtype=dtype, device=job.place, packed=True)
    layout = _layout_of(lazy, method)
    module = lazy.load_all().to(job.place)
    original = LazyModel(source, dtype=dtype, device=job.place).load_all().to(job.place)
    tokenizer = job.tokenizer or load_tokenizer(checkpoint.directory)
    job = replace(job, calibration=samples_by_path(source, job), tokenizer=tokenizer)
    result, samples = _compress(module, original, job)
    tensors = _changed_tensors(lazy, module, layout)
    made_by = [record.get("method")] if not earlier else []
    steps = job.steps or [*earlier, *filter(None, made_by), job.recipe.method.options()]
    marks = {
        "model": model_fingerprint(checkpoint),
        "original": model_fingerprint(source),
        **asked_of(job, layout, dtype),
        "calibration": samples,
    }
    made = record_of_job(job, layout, marks, result.summary.layers)
    _write(checkpoint, tensors, made, {**checkpoint.config, STEPS: steps}, target, job, inputs)
    summary = replace(
        result.summary,
        model=str(checkpoint),
        format=layout.name,
        quantization=checkpoint.config["quantization_config"],
        bits_per_weight=_bits_per_weight(lazy),
        size_before=source.size(),
        size_after=open_checkpoint(target).size(),
    )
    return Compressed(summary, target, result.before, result.after, _folder=folder)


def compress_packed_module(model: nn.Module, job: Job) -> Compressed:
    """A tuned copy of a packed module in memory. Its original is a module too."""
    if not isinstance(job.original, nn.Module):
        raise TersorError(f"{job.recipe.method.name} on a module in memory compares with another: give it as original=")
    original = copy.deepcopy(job.original)  # so that the user's module stays as it is
    module = copy.deepcopy(model)
    with _out_of_float16(module, original):
        return _compress(module, original, job)[0]


def check_keeps_zeros(method: PackedMethod, before: Sequence[Any]) -> None:
    """Raise TersorError where the method would move weights that a step before made zero. before: the options of those steps."""
    sparse = next((each for each in before if isinstance(each, Mapping) and each.get("sparsity")), None)
    if sparse is not None and method.moves_integers:
        way = "leave --integers out" if method.name == "scales" else "use scales, which keeps them"
        raise TersorError(
            f"{method.name} moves integers, so the zeros of sparsity {sparse['sparsity']:g} would be lost: {way}"
        )


def _wide_enough(dtype: torch.dtype, job: Job) -> torch.dtype:
    """The dtype to tune in: float32 instead of float16, which holds no small gradients."""
    if dtype != torch.float16:
        return dtype
    job.progress("gradients are too small for float16: tuning in float32", 0, 0)
    return torch.float32


def _floats_of(module: nn.Module) -> list[Tensor]:
    """The floating tensors of a module that meet activations."""
    if isinstance(module, QuantizedLinear):
        return [module.like]
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


@contextmanager
def _out_of_float16(*modules: nn.Module) -> Iterator[None]:
    """Meanwhile parameters and buffers in float16 are float32, for the gradients. Packed layers keep theirs."""
    held = [
        tensor
        for module in modules
        for each in module.modules()
        for tensor in _floats_of(each)
        if tensor.dtype == torch.float16
    ]
    for tensor in held:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor in held:
            tensor.data = tensor.data.half()


def as_packed_before(tuned: Summary, packed: Summary) -> Summary:
    """The summary of a step that tunes what the step before packed: the format and what is left stay as they were."""
    same = ("format", "quantization", "bits_per_weight", "left")
    return replace(tuned, **{name: getattr(packed, name) for name in same})


def _layout_of(lazy: LazyModel, method: str) -> Layout:
    name, found = lazy.checkpoint, lazy.quantization
    if found is None or not lazy.quantized:
        raise TersorError(f"{name} is not packed, and {method} tunes what gptq or rtn made: run one of them first")
    if found.layout not in LAYOUTS:
        raise TersorError(f"{name} is packed as {found.layout}, which tersor reads but does not write")
    return LAYOUTS[found.layout]


def _compress(module: nn.Module, original: nn.Module, job: Job) -> tuple[Compressed, str]:
    """The result, and a fingerprint of the samples. Changes `module` in place."""
    method = job.recipe.method
    assert isinstance(method, PackedMethod)
    layers = packed_layers(module)
    if not layers:
        raise TersorError(f"the model has no packed layer, and {method.name} tunes what gptq or rtn made")
    check_rules(job)
    job.check_patterns(list(layers))
    first = next(original.parameters())
    samples = read_samples(job, original, first.device, first.dtype)
    for each in (module, original):
        each.eval().requires_grad_(False)

    def change(work: Work) -> nn.Module:
        with torch.no_grad():
            method.tune(module, original, work)
        return module

    with without_cache(module):
        return compared(original, job, samples, change), fingerprint(samples)


def _changed_tensors(lazy: LazyModel, module: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The tensors of all packed layers by the names that they have in the checkpoint, with the integers and steps of `module`."""
    found: dict[str, Tensor] = {}
    for name, layer in packed_layers(module).items():
        first, weight = 0, layer.packed.to("cpu")
        stems = lazy.quantized[name]
        for stem in stems:
            shape = lazy.checkpoint.shape
            scales = next(
                f"{stem}.{s}" for s in ("scales", "weight_scale") if f"{stem}.{s}" in lazy.checkpoint.shard_of
            )
            rows = shape(scales)[1 if scales.endswith(".scales") else 0]
            assert lazy.quantization is not None
            sym = lazy.quantization.for_layer(stem, name, classes=classes_of(lazy.maps[name])).sym
            made = write(weight.rows(first, first + rows), layout, sym=sym)
            found |= {f"{stem}.{suffix}": made[suffix] for suffix in CHANGED if suffix in made}
            found[scales] = found[scales].reshape(shape(scales))
            first += rows
    return found


def _bits_per_weight(lazy: LazyModel) -> float:
    sizes = lazy.checkpoint.bytes_of_tensors()
    stems = tuple(f"{stem}." for found in lazy.quantized.values() for stem in found)
    packed = sum(size for key, size in sizes.items() if key.startswith(stems) and not key.endswith(".bias"))
    shapes = [matrix_shape(lazy.maps[name]) for name in lazy.quantized]
    return 8 * packed / sum(rows * columns for rows, columns in shapes)


def _write(
    source: Checkpoint,
    tensors: dict[str, Tensor],
    record: dict[str, Any],
    config: dict[str, Any],
    target: Path,
    job: Job,
    inputs: dict[str, Path],
) -> None:
    """The files of `source` with these tensors in the place of its own, shard by shard."""
    shards: dict[Path, list[str]] = defaultdict(list)
    for key, path in source.shard_of.items():
        shards[path].append(key)
    with appearing(target, overwrite=job.overwrite, inputs=inputs, held=job.held) as partial:
        for path, keys in shards.items():
            place = partial / path.relative_to(source.directory)
            place.parent.mkdir(parents=True, exist_ok=True)
            kept = source.read(key for key in keys if key not in tensors)
            mine = {key: tensors[key].contiguous() for key in keys if key in tensors}
            save_file({**kept, **mine}, place.with_suffix(".safetensors"), {"format": "pt"})
        for path in {*source.other_files(), *source.directory.glob("*.index.json")}:
            relative = path.relative_to(source.directory)
            if relative.as_posix() not in ("config.json", RESULT_FILE):
                (partial / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, partial / relative)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        write_record(partial, record)
