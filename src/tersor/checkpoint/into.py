"""Load a checkpoint into a module that the caller built, for classes that no config.json can describe."""

from __future__ import annotations

import torch
from torch import nn

from tersor.checkpoint.lazy_model import check_finite, check_layer, classes_of, read_layer
from tersor.checkpoint.quantization_config import read_config
from tersor.checkpoint.source import Checkpoint
from tersor.errors import TersorError
from tersor.formats.gguf_blocks import GGUF_SUFFIXES
from tersor.formats.layouts import PACKED_SUFFIXES
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.layers.experts import ExpertMap, stored_name
from tersor.layers.linear_map import matrix_shape, packable_maps
from tersor.layers.quantized_linear import place_packed


def load_into(checkpoint: Checkpoint, module: nn.Module) -> nn.Module:
    """Fill `module` in place, in its own dtype and on its own device; layers that are stored packed are replaced by packed ones.

    Raises TersorError, before anything is changed, where a name or a shape does not fit.
    """
    maps = packable_maps(module)
    packed = _packed(checkpoint, {stored_name(name, found): name for name, found in maps.items()}, module)
    apart = {name.rpartition(".")[0] if isinstance(maps[name], ExpertMap) else f"{name}.weight" for name in packed}
    own = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name not in apart}
    plain = {key for key in checkpoint.shard_of if _stem_of_packed(checkpoint, key) is None}
    here = {id(own[name]) for name in own if name in plain}  # a tied tensor is stored under only one of its names
    for name in sorted(plain - set(own)):
        raise TersorError(f"{checkpoint.directory} holds {name}, which the {type(module).__name__} has no place for")
    for name, tensor in own.items():
        if id(tensor) not in here:
            raise TersorError(f"{checkpoint.directory} lacks {name} of the {type(module).__name__}")
        if name in plain and checkpoint.shape(name) != tuple(tensor.shape):
            raise TersorError(f"{name} is {checkpoint.shape(name)}; the module's is {tuple(tensor.shape)}")
    with torch.no_grad(), checkpoint.tensors(sorted(plain)) as slices:
        for name, piece in slices.items():
            values = piece[...]
            check_finite(name, values)
            own[name].copy_(values)
    place_packed(module, maps, packed)
    return module.eval()


def _packed(checkpoint: Checkpoint, linears: dict[str, str], module: nn.Module) -> dict[str, QuantizedWeight]:
    """Every packed layer of the checkpoint, by the name of its linear map. linears: {name on disk: name of the map}."""
    config, maps = read_config(checkpoint.directory, checkpoint.config), packable_maps(module)
    device = next(module.parameters()).device
    found: dict[str, QuantizedWeight] = {}
    for stem in sorted({stem for key in checkpoint.shard_of if (stem := _stem_of_packed(checkpoint, key))}):
        if stem not in linears or config is None:
            raise TersorError(
                f"{checkpoint.directory} holds a quantized {stem}; the {type(module).__name__} has no linear layer there"
            )
        name = linears[stem]
        out_features, in_features = matrix_shape(maps[name])
        keys = [key for key in checkpoint.shard_of if _stem_of_packed(checkpoint, key) == stem]
        with checkpoint.tensors(keys) as slices:
            headers = {key: (piece.get_dtype(), tuple(piece.get_shape())) for key, piece in slices.items()}
        own = config.for_layer(stem, name, classes=classes_of(maps[name]))
        check_layer(stem, headers, in_features, own)
        tensors = {key.rpartition(".")[2]: tensor for key, tensor in checkpoint.read(keys).items()}
        weight = read_layer(stem, tensors, in_features, own)
        if weight.out_features != out_features:
            raise TersorError(f"{stem} has {weight.out_features} outputs; the module's layer has {out_features}")
        found[name] = weight.to(device)
    return found


def _stem_of_packed(checkpoint: Checkpoint, key: str) -> str | None:
    """The packed layer that this tensor belongs to; None where it belongs to none."""
    stem, _, suffix = key.rpartition(".")
    if suffix not in PACKED_SUFFIXES:
        return None
    whole = {f"{stem}.{each}" for each in ("qweight", "weight_packed", *GGUF_SUFFIXES)}
    unpacked = {f"{stem}.weight", f"{stem}.weight_scale"}  # 8-bit integers as they are, beside their steps
    return stem if whole & checkpoint.shard_of.keys() or unpacked <= checkpoint.shard_of.keys() else None
