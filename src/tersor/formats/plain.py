"""Plain numbers under the model's own names: the format of results that need no unpacking, such as pruned weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.dense_weight import DenseWeight
from tersor.formats.layout import Header, Layout, QuantizationConfig, expect, require
from tersor.formats.packed_weight import PackedWeight


def _write(weight: PackedWeight, sym: bool) -> dict[str, Tensor]:
    return {"weight": weight.dequantize().contiguous()}


def read(name: str, tensors: Mapping[str, Tensor], in_features: int, config: QuantizationConfig) -> DenseWeight:
    require(name, tensors, ("weight",))
    matrix = tensors["weight"]
    expect(f"{name}.weight", matrix, (len(matrix), in_features))
    return DenseWeight(matrix)


def _check(name: str, headers: Mapping[str, Header], in_features: int, config: QuantizationConfig) -> None:
    """Nothing to check: the model's own reader looks at names and shapes."""


def _parse(found: Mapping[str, Any]) -> QuantizationConfig:
    raise TersorError("a checkpoint of plain numbers has no quantization config")


# A part of a stack of experts has no name of its own, so readers would not find it and draw it at random.
PLAIN = Layout("safetensors", ("weight",), "", read=read, check=_check, parse=_parse, write=_write, expert_stacks=False)
