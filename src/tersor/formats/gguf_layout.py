"""GGUF's blocks as a layout of layers. It only reads: `checkpoint/gguf_write.py` writes whole files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.gguf_blocks import BLOCK_TYPES, GGUF_SUFFIXES, unpack_blocks
from tersor.formats.layout import Header, Layout, QuantizationConfig
from tersor.formats.quantized_weight import QuantizedWeight


def read(name: str, tensors: Mapping[str, Tensor], in_features: int, config: QuantizationConfig) -> QuantizedWeight:
    for kind in BLOCK_TYPES.values():
        if kind.suffix in tensors:
            return unpack_blocks(name, tensors[kind.suffix], kind, in_features)
    raise TersorError(f"the file lacks the blocks of {name}")


def _check(name: str, headers: Mapping[str, Header], in_features: int, config: QuantizationConfig) -> None:
    """Nothing to check: `gguf_read` took names and sizes of these tensors from the file's own header."""


def _parse(found: Mapping[str, Any]) -> QuantizationConfig:
    """The config that `gguf_read` makes of a file; the tensors say the rest."""
    return QuantizationConfig("gguf", int(found["bits"]), int(found["group_size"]), sym=True)


GGUF = Layout("gguf", GGUF_SUFFIXES, "gguf", read=read, check=_check, parse=_parse)
