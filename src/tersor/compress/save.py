"""Save a compressed result: copy a finished directory, or write a module that was compressed in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor import models
from tersor.checkpoint.quantization_config import parse_config
from tersor.checkpoint.room import RESULT_FILE, RUN_FILE, Held, Inputs, appearing, write_record
from tersor.checkpoint.source import STEPS, Checkpoint, torch_dtype
from tersor.compress.summary import Summary
from tersor.errors import TersorError
from tersor.formats.layouts import PLAIN, layout_named, write
from tersor.layers.exchange import EXCHANGED, exchanged_in
from tersor.layers.experts import PackedExperts
from tersor.layers.quantized_embedding import QuantizedEmbedding
from tersor.layers.quantized_linear import QuantizedConv2d, QuantizedLinear


def copy_directory(source: Path, target: Path, *, overwrite: bool) -> Path:
    with appearing(target, overwrite=overwrite, inputs={"result": source}) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
    return target


def save_module(module: nn.Module, summary: Summary, target: Path, *, overwrite: bool) -> Path:
    """Write a module with packed layers, under its own tensor names, with its config where it has one."""
    if summary.format == PLAIN.name:
        return save_plain(module, summary, target, overwrite=overwrite)
    if summary.format is None:
        raise TersorError(
            "the model was compressed with format=None, in numbers that no file format holds; name a format"
        )
    layout, quantization = layout_named(summary.format), parse_config(summary.quantization)
    tensors: dict[str, Tensor] = {}
    packed: set[str] = set()
    for name, each in module.named_modules():
        if any(name[:end] in packed for end, letter in enumerate(name) if letter == "."):
            continue  # a part of a packed convolution or of packed experts
        found = _packed_layers(name, each)
        for stem, linear in found.items():
            tensors |= {
                f"{stem}.{s}": t for s, t in write(linear.packed, layout, sym=quantization.for_layer(stem).sym).items()
            }
        if found:
            packed.add(name)
            if isinstance(getattr(each, "bias", None), Tensor):
                tensors[f"{name}.bias"] = each.bias
    inside = tuple(f"{name}." for name in packed)
    tensors |= {n: t for n, t in _own_tensors(module).items() if not n.startswith(inside)}
    steps = {STEPS: list(summary.steps)} if summary.steps else {}
    config = {
        **config_of(module),
        EXCHANGED: exchanged_in(module),
        **steps,
        "quantization_config": summary.quantization,
    }
    own = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with appearing(target, overwrite=overwrite) as partial:
        save_file(own, partial / "model.safetensors", {"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_record(partial, {"method": summary.method, "format": layout.name})
    return target


def save_plain(
    module: nn.Module,
    summary: Summary,
    target: Path,
    *,
    source: Checkpoint | None = None,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    inputs: Inputs | None = None,
    held: Held | None = None,
) -> Path:
    """Write a module as it is: its tensors, its config with what was exchanged in it, and the other files of `source`.

    Parameters are stored in the source's dtype, buffers in their own. `target` appears whole or not at all.
    extra: JSON files to write, by name. inputs: what the job read; these files are never replaced. held: its hold
    on `target`.
    """
    stored = next(module.parameters()).dtype if source is None else torch_dtype(source.config)
    config = config_of(module) | {EXCHANGED: exchanged_in(module)}
    if summary.steps:
        config[STEPS] = list(summary.steps)
    if "dtype" in config or "tersor_model" not in config:
        config["dtype"] = str(stored).removeprefix("torch.")
    kept = {} if source is None else {path.relative_to(source.directory): path for path in source.other_files()}
    result = {"method": summary.method, "format": PLAIN.name, "layers": [each.row() for each in summary.layers]}
    written = {"config.json": config, **(extra or {})}
    with appearing(target, overwrite=overwrite, inputs=inputs, held=held) as partial:
        save_file(_own_tensors(module, stored), partial / "model.safetensors", {"format": "pt"})
        for relative, path in kept.items():
            if relative.as_posix() not in (*written, RESULT_FILE, RUN_FILE):
                (partial / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, partial / relative)
        for name, content in written.items():
            (partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_record(partial, result)
    return target


def _own_tensors(module: nn.Module, stored: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor once; a tied one under its first name. Parameters are in dtype `stored` where that is given."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        narrow = stored is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        tensors[name] = tensor.detach().to("cpu", stored if narrow else tensor.dtype).contiguous()
    return tensors


def config_of(module: nn.Module) -> dict[str, Any]:
    """What is needed to build the module again: a transformers config, a tersor model's, or only the class's name."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        return {**found, "architectures": [type(module).__name__]}
    if hasattr(type(module), "system"):
        return models.config_of(module)
    return {"module": f"{type(module).__module__}.{type(module).__qualname__}"}


def _packed_layers(name: str, module: nn.Module) -> dict[str, QuantizedLinear | QuantizedEmbedding]:
    """The packed layers that a module consists of, by their names in the file."""
    if isinstance(module, PackedExperts):
        owner, _, stack = name.rpartition(".")
        return {
            f"{owner}.{n}.{stack}": each for n, each in enumerate(module.linears) if isinstance(each, QuantizedLinear)
        }
    if isinstance(module, QuantizedConv2d):
        return {name: module.matrix}
    return {name: module} if isinstance(module, QuantizedLinear | QuantizedEmbedding) else {}
