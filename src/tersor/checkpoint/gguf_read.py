"""A GGUF file of the LLaMA family as a checkpoint: its config, and its tensors under transformers' names.

Linear layers in Q4_0, Q4_1, Q5_0 and Q8_0 stay packed; a tensor of blocks has the layer's name and a suffix of its own
(`formats.gguf_blocks`). F32, F16 and BF16 stay as they are. Three things become dense float32: a quantized embedding, Q4_1
without zero points, and other types that the `gguf` package dequantizes, such as the K types.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
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
from tersor.checkpoint.gguf_header import Place, gguf_package, read_header
from tersor.errors import TersorError
from tersor.formats.gguf_blocks import BLOCK, BLOCK_TYPES, dequantize_blocks, on_grid
from tersor.untrusted import check_config

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NOT_LINEAR = ("model.embed_tokens.weight",)


class GGUFTensor:
    """One tensor of the file, with the interface of a safetensors slice. Indexing reads it and puts its rows in order."""

    def __init__(self, data: Any, place: Place, *, packed: bool, heads: int | None) -> None:
        self._data, self._place, self._packed, self._heads = data, place, packed, heads
        self.kind, self.bytes = place.kind, place.stop - place.start

    def get_shape(self) -> list[int]:
        shape = list(self._place.shape)
        if self._packed:
            shape[-1] = shape[-1] // BLOCK * BLOCK_TYPES[self.kind].bytes
        return shape

    def get_dtype(self) -> str:
        return "U8" if self._packed else self.kind if self.kind in PLAIN else "F32"

    def __getitem__(self, index: Any) -> Tensor:
        values = self._values()
        if self._heads is not None:
            values = values[rows_in_file(len(values), self._heads).argsort()]
        return values[index]

    def raw(self) -> Tensor:
        """The tensor's bytes, copied out of the mapped file: uint8 [..., bytes of a row]."""
        content = np.array(self._data[self._place.start : self._place.stop])
        return torch.from_numpy(content).view(*self._place.shape[:-1], -1)

    def _values(self) -> Tensor:
        raw = self.raw()
        if self._packed:
            return raw
        if self.kind in PLAIN:
            return raw.view(PLAIN[self.kind])
        if self.kind in BLOCK_TYPES:
            return dequantize_blocks(raw, BLOCK_TYPES[self.kind])
        gguf = gguf_package()
        return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(self._place.number)))


@dataclass(frozen=True)
class GGUFFile:
    """An open file."""

    path: Path
    fields: dict[str, Any]  # the metadata
    config: dict[str, Any]  # what config.json would say
    tensors: dict[str, GGUFTensor]  # by transformers' names; packed ones by those of their blocks


def open_gguf(path: Path) -> GGUFFile:
    """Read the header of a file. Raises TersorError where it is damaged, or holds what tersor does not read."""
    fields, places = read_header(path)
    if fields.get("split.count", 0) not in (0, 1):
        raise TersorError(
            f"{path} is one of {fields['split.count']!r} parts; merge them with llama.cpp's llama-gguf-split"
        )
    data, divisors = np.memmap(path, mode="r"), None
    if FREQUENCIES in places:
        if places[FREQUENCIES].kind not in PLAIN:
            raise TersorError(
                f"{path}: {FREQUENCIES} is of the type {places[FREQUENCIES].kind}; expected plain numbers"
            )
        divisors = GGUFTensor(data, places.pop(FREQUENCIES), packed=False, heads=None)[...]
    try:
        config = config_of(fields, places, divisors)
    except (TersorError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise TersorError(f"{path}: {said}") from None
    check_config(path, config, tensors=len(places), size=path.stat().st_size)
    tensors = _named(path, data, places, config)
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


def _named(path: Path, data: Any, places: dict[str, Place], config: dict[str, Any]) -> dict[str, GGUFTensor]:
    permuted = ARCHITECTURES[config["architectures"][0]].permuted
    found: dict[str, GGUFTensor] = {}
    for short, place in places.items():
        name = name_from_file(short) or short  # an unknown name is reported when the model is built
        heads = heads_permuted(name, config["num_attention_heads"], config["num_key_value_heads"]) if permuted else None
        if heads is not None and place.shape[0] % (2 * heads):
            raise TersorError(f"{path}: {short} has {place.shape[0]} rows, which {heads} heads do not share")
        kind = place.kind
        if kind not in PLAIN and kind not in BLOCK_TYPES and not _dequantizable(place.number):
            raise TersorError(f"{path}: {short} is of the type {kind}, which tersor does not read")
        dense = GGUFTensor(data, place, packed=False, heads=heads)
        linear = name.endswith(".weight") and name not in _NOT_LINEAR and len(place.shape) == 2
        if linear and kind in BLOCK_TYPES and (kind != "Q4_1" or on_grid(dense.raw(), BLOCK_TYPES[kind])):
            stem = name.removesuffix(".weight")
            found[f"{stem}.{BLOCK_TYPES[kind].suffix}"] = GGUFTensor(data, place, packed=True, heads=heads)
        else:
            found[name] = dense
    return found


def _dequantizable(number: int) -> bool:
    """Whether the `gguf` package can dequantize this type: tried on a block of zeros."""
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType(number)
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
