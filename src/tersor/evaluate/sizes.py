"""Where the bytes of a checkpoint are: by the role of a tensor in the model, and inside packed layers by what it holds.

Headers only; no weights are read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tersor.calibrate.blocks import find_units
from tersor.checkpoint.lazy_model import LazyModel, lazily
from tersor.checkpoint.source import Openable
from tersor.evaluate.weight_view import place_of
from tersor.formats.layouts import PACKED_SUFFIXES
from tersor.layers.linear_map import matrix_shape

HOLDS = {  # what the tensors of a packed layer hold, by suffix
    "qweight": "integers",
    "weight_packed": "integers",
    "weight": "integers",
    "scales": "steps",
    "weight_scale": "steps",
    "qzeros": "zero points",
    "weight_zero_point": "zero points",
    "g_idx": "order of columns",
    "weight_g_idx": "order of columns",
    "weight_shape": "shapes",
}


@dataclass(frozen=True)
class Part:
    """Tensors of one kind: how many bytes they take."""

    kind: str
    bytes: int


@dataclass(frozen=True)
class Sizes:
    """Where the bytes of a checkpoint are."""

    everything: list[Part]  # all tensors, by their role
    packed: list[Part]  # the tensors of packed layers, by what they hold
    packed_weights: int  # how many weights these stand for: bits a weight are 8 · bytes / packed_weights
    files: int  # bytes of the tensor files, which have headers too
    layers: dict[str, float]  # bits a weight on disk of every linear map, by name
    looked_up: int  # bytes of embedding tables; a step reads single rows of them
    experts: bool  # whether it is a mixture of experts; a step reads some of them

    @property
    def packed_bits(self) -> float | None:
        """Bits a packed weight; None where nothing is packed."""
        return 8 * sum(each.bytes for each in self.packed) / self.packed_weights if self.packed_weights else None


def sizes_of(model: Openable | LazyModel) -> Sizes:
    """Raises TersorError where it is no model."""
    lazy = lazily(model)
    checkpoint = lazy.checkpoint
    stored = checkpoint.bytes_of_tensors()
    everything: dict[str, int] = defaultdict(int)
    packed: dict[str, int] = defaultdict(int)
    seen: set[str] = set()
    weights = 0
    inputs, outputs = _name_of(lazy.module, "get_input_embeddings"), _name_of(lazy.module, "get_output_embeddings")
    blocks = tuple(f"{unit.name}." for unit in find_units(lazy.module) if unit.is_block)
    for name, stems in lazy.quantized.items():
        keys = [f"{stem}.{suffix}" for stem in stems for suffix in PACKED_SUFFIXES if f"{stem}.{suffix}" in stored]
        role = _role(name, inputs, outputs)
        everything[f"{role}, packed"] += sum(stored[key] for key in keys)
        for key in keys:
            packed[HOLDS.get(key.rpartition(".")[2], "integers with their steps")] += stored[key]
        seen |= set(keys)
        weights += math.prod(matrix_shape(lazy.maps[name]))
    looked_up = 0
    for name, parameter in lazy.module.named_parameters():
        keys = [key for key in lazy.keys_of.get(name, []) if key not in seen]
        seen |= set(keys)
        size = sum(stored[key] for key in keys)
        owner = name.rpartition(".")[0]
        if parameter.dim() < 2:
            role = "norms, biases and other vectors"
        elif owner in (inputs, outputs):
            role = f"{_role(owner, inputs, outputs)}, not packed"
        else:
            role = "linear layers, not packed" if name.startswith(blocks) else "outside the blocks, not packed"
        everything[role] += size
    everything["tensors that the model does not use"] += sum(stored[key] for key in stored if key not in seen)
    own_head = f"{outputs}.weight" in lazy.keys_of or outputs in lazy.quantized
    tied = inputs is not None and outputs is not None and not own_head
    if inputs is not None and not tied:
        owned = [f"{stem}.{suffix}" for stem in lazy.quantized.get(inputs, ()) for suffix in PACKED_SUFFIXES]
        owned += lazy.keys_of.get(f"{inputs}.weight", [])
        looked_up = sum(stored.get(key, 0) for key in owned)
    layers = {name: bits for name in lazy.maps if (bits := bits_of(lazy, name, stored))}
    experts = any("*" in place_of(name)[1] for name in lazy.maps)
    return Sizes(_parts(everything), _parts(packed), weights, checkpoint.size(), layers, looked_up, experts)


def bits_of(lazy: LazyModel, name: str, stored: Mapping[str, int]) -> float:
    """Bits a weight on disk of a linear map or embedding: of an expert its stack's, 0 where another map holds the weight.

    stored: bytes of the checkpoint's tensors by name.
    """
    if name in lazy.quantized:
        keys = [f"{stem}.{suffix}" for stem in lazy.quantized[name] for suffix in PACKED_SUFFIXES]
        return 8 * sum(stored.get(key, 0) for key in keys) / math.prod(matrix_shape(lazy.maps[name]))
    parameter = lazy.parameter_of(name)
    size = sum(stored[key] for key in lazy.keys_of.get(parameter, []))
    return 8 * size / lazy.module.get_parameter(parameter).numel()


def _parts(found: dict[str, int]) -> list[Part]:
    """The largest first, without what takes nothing."""
    return [Part(kind, size) for kind, size in sorted(found.items(), key=lambda each: -each[1]) if size]


def _role(name: str, inputs: str | None, outputs: str | None) -> str:
    return "embedding" if name == inputs else "output head" if name == outputs else "linear layers"


def _name_of(module: Any, getter: str) -> str | None:
    """The name of the embedding or head that a transformers model declares."""
    try:
        found = getattr(module, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, each in module.named_modules() if found is not None and each is found), None)
