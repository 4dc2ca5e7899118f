"""A GGUF file of the LLaMA family as a checkpoint: its config, and its tensors under transformers' names.

Linear layers in Q4_0, Q4_1, Q5_0 and Q8_0 stay packed; their blocks are read under the layer's name and a suffix of their own
(`formats.gguf_blocks`). F32, F16 and BF16 are dense as they are. A quantized embedding, Q4_1 without zero points, and what else
the `gguf` package dequantizes, such as the K types, become dense float32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.checkpoint.gguf_architecture import (
    ARCHITECTURES,
    FREQUENCIES,
    config_of,
    heads_permuted,
    name_from_file,
    rows_in_file,
)
from tersor.errors import TersorError
from tersor.formats.gguf_blocks import BLOCK, BLOCK_TYPES, dequantize_blocks, on_grid

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NOT_LINEAR = ("model.embed_tokens.weight",)


class GGUFTensor:
    """One tensor of the file, with the interface of a safetensors slice: read, and its rows put in order, when indexed."""

    def __init__(self, found: Any, *, packed: bool, heads: int | None) -> None:
        self._found, self._packed, self._heads = found, packed, heads
        self.kind = str(found.tensor_type.name)
        self.bytes = int(found.n_bytes)
        self._shape = [int(n) for n in reversed(found.shape)]  # the file has the innermost dimension first

    def get_shape(self) -> list[int]:
        if self._packed:
            return [*self._shape[:-1], self._shape[-1] // BLOCK * BLOCK_TYPES[self.kind].bytes]
        return self._shape

    def get_dtype(self) -> str:
        return "U8" if self._packed else self.kind if self.kind in PLAIN else "F32"

    def __getitem__(self, index: Any) -> Tensor:
        values = self._values()
        if self._heads is not None:
            values = values[rows_in_file(len(values), self._heads).argsort()]
        return values[index]

    def raw(self) -> Tensor:
        """The tensor's bytes, copied out of the mapped file: uint8 [..., bytes of a row]."""
        return torch.from_numpy(np.array(self._found.data.view(np.uint8)))

    def _values(self) -> Tensor:
        raw = self.raw()
        if self._packed:
            return raw
        if self.kind in PLAIN:
            return raw.view(PLAIN[self.kind])
        if self.kind in BLOCK_TYPES:
            return dequantize_blocks(raw, BLOCK_TYPES[self.kind])
        return torch.from_numpy(gguf_package().quants.dequantize(raw.numpy(), self._found.tensor_type))


@dataclass(frozen=True)
class GGUFFile:
    """fields: the metadata; config: what config.json would say; tensors: by transformers' names, or those of their blocks."""

    path: Path
    fields: dict[str, Any]
    config: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def gguf_package() -> ModuleType:
    """The `gguf` package. Raises TersorError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise TersorError("GGUF files need the package gguf: pip install 'tersor[gguf]'") from None
    return gguf


def open_gguf(path: Path) -> GGUFFile:
    """Read the header of a file. Raises TersorError where it is damaged, or holds what tersor does not read."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: _value(field) for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OSError) as error:
        raise TersorError(f"{path} cannot be read as a GGUF file: {error}") from None
    if reader.byte_order != "I":
        raise TersorError(
            f"{path} is a GGUF file in the other byte order; convert it with the gguf package's own script"
        )
    if int(fields.get("split.count", 0)) > 1:
        raise TersorError(
            f"{path} is one of {fields['split.count']} parts; merge them first with llama.cpp's llama-gguf-split"
        )
    raw = {str(each.name): each for each in reader.tensors}
    divisors = None
    if FREQUENCIES in raw:
        divisors = GGUFTensor(raw.pop(FREQUENCIES), packed=False, heads=None)[...]
    try:
        config = config_of(fields, raw, divisors)
    except TersorError as error:
        raise TersorError(f"{path}: {error}") from None
    tensors = _named(path, raw, config)
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise TersorError(f"{path} lacks the tensor token_embd.weight")
    config["vocab_size"] = embedding.get_shape()[0]
    config["dtype"] = {"F32": "float32", "BF16": "bfloat16"}.get(embedding.kind, "float16")
    packed = Counter(4 if each.kind != "Q8_0" else 8 for name, each in tensors.items() if "gguf_" in name)
    if packed:
        config["quantization_config"] = {
            "quant_method": "gguf",
            "bits": packed.most_common(1)[0][0],
            "group_size": BLOCK,
        }
    return GGUFFile(path, fields, config, tensors)


def _named(path: Path, raw: dict[str, Any], config: dict[str, Any]) -> dict[str, GGUFTensor]:
    quants = gguf_package().quants
    permuted = ARCHITECTURES[config["architectures"][0]].permuted
    found: dict[str, GGUFTensor] = {}
    for short, each in raw.items():
        name = name_from_file(short) or short  # what is unknown is reported as such by whoever builds the model
        heads = heads_permuted(name, config["num_attention_heads"], config["num_key_value_heads"]) if permuted else None
        kind = str(each.tensor_type.name)
        if kind not in PLAIN and kind not in BLOCK_TYPES:
            try:
                quants.dequantize(each.data[:1], each.tensor_type)
            except NotImplementedError:
                raise TersorError(f"{path}: {short} is of the type {kind}, which tersor does not read") from None
        dense = GGUFTensor(each, packed=False, heads=heads)
        linear = name.endswith(".weight") and name not in _NOT_LINEAR and len(each.shape) == 2
        if linear and kind in BLOCK_TYPES and (kind != "Q4_1" or on_grid(dense.raw(), BLOCK_TYPES[kind])):
            stem = name.removesuffix(".weight")
            found[f"{stem}.{BLOCK_TYPES[kind].suffix}"] = GGUFTensor(each, packed=True, heads=heads)
        else:
            found[name] = dense
    return found


def _value(field: Any) -> Any:
    """A metadata value as Python has it; a float32 as the shortest number that rounds to it, which is the one that was meant."""
    value = field.contents()
    if field.types and field.types[-1].name == "FLOAT32":
        return [float(str(np.float32(v))) for v in value] if isinstance(value, list) else float(str(np.float32(value)))
    return value
