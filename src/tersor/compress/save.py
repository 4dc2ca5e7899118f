"""Save a compressed result: copy a finished directory, or write a module that was compressed in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from tersor import models
from tersor.checkpoint.quantization_config import parse_config
from tersor.checkpoint.writer import RESULT_FILE
from tersor.compress.result import Summary
from tersor.errors import TersorError
from tersor.formats.layouts import layout_named, write
from tersor.layers.experts import PackedExperts
from tersor.layers.quantized_linear import QuantizedConv2d, QuantizedLinear


def copy_directory(source: Path, target: Path, *, overwrite: bool) -> Path:
    _make_room(target, overwrite=overwrite)
    shutil.copytree(source, target)
    return target


def save_module(module: nn.Module, summary: Summary, target: Path, *, overwrite: bool) -> Path:
    """Write a module whose layers were replaced by packed ones, under its own tensor names, with its config where it has one."""
    if summary.format is None:
        raise TersorError(
            "the model was compressed with format=None, in numbers that no file format holds; name a format"
        )
    layout, quantization = layout_named(summary.format), parse_config(summary.quantization)
    tensors: dict[str, Tensor] = {}
    packed: list[str] = []
    for name, each in module.named_modules():
        found = _packed_layers(name, each)
        for stem, linear in found.items():
            tensors |= {
                f"{stem}.{s}": t for s, t in write(linear.packed, layout, sym=quantization.for_layer(stem).sym).items()
            }
        if found:
            packed.append(name)
            if isinstance(getattr(each, "bias", None), Tensor):
                tensors[f"{name}.bias"] = each.bias
    inside = tuple(f"{name}." for name in packed)
    seen: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not name.startswith(inside) and seen.setdefault(id(tensor), name) == name:  # a tied tensor is stored once
            tensors[name] = tensor.detach()
    _make_room(target, overwrite=overwrite)
    target.mkdir(parents=True)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    config = {**config_of(module), "quantization_config": summary.quantization}
    (target / RESULT_FILE).write_text(json.dumps({"method": summary.method, "format": layout.name}, indent=2) + "\n")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return target


def config_of(module: nn.Module) -> dict[str, Any]:
    """What is needed to build the module again: a transformers config, a tersor model's, or only the class's name."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        return {**found, "architectures": [type(module).__name__]}
    if hasattr(type(module), "system"):
        return models.config_of(module)
    return {"module": f"{type(module).__module__}.{type(module).__qualname__}"}


def _packed_layers(name: str, module: nn.Module) -> dict[str, QuantizedLinear]:
    """The packed layers that a module consists of, by the names under which they are stored."""
    if isinstance(module, PackedExperts):
        owner, _, stack = name.rpartition(".")
        return {
            f"{owner}.{n}.{stack}": each for n, each in enumerate(module.linears) if isinstance(each, QuantizedLinear)
        }
    if isinstance(module, QuantizedConv2d):
        return {name: module.matrix}
    inner = name.endswith(".matrix") or ".linears." in name  # parts of the two above
    return {name: module} if isinstance(module, QuantizedLinear) and not inner else {}


def _make_room(target: Path, *, overwrite: bool) -> None:
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise TersorError(f"{target} exists and is not empty; give another directory or overwrite=True")
        if not (target / "config.json").exists():
            raise TersorError(f"{target} is no model directory, so it is not overwritten; remove it yourself")
        shutil.rmtree(target)
    elif target.exists() and not target.is_dir():
        raise TersorError(f"{target} is a file; give a directory")
    elif target.is_dir():
        target.rmdir()
