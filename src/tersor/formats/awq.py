"""AWQ's "GEMM" layout of 4 bits. It is read, not written.

W is [out, in], G groups; all are packed along the output: qweight int32 [in, out/8], qzeros int32 [G, out/8], scales float16
[G, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.layout import (
    Header,
    Layout,
    QuantizationConfig,
    check_dtypes,
    check_shape,
    checked_weight,
    expect,
    expect_matrix,
    group_size_that_fits,
    groups_of,
    require,
)
from tersor.formats.packing import pack, unpack_awq
from tersor.formats.quantized_weight import QuantizedWeight

SUFFIXES = ("qweight", "qzeros", "scales")
DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32", "F64")}


def read(name: str, tensors: Mapping[str, Tensor], in_features: int, config: QuantizationConfig) -> QuantizedWeight:
    require(name, tensors, SUFFIXES)
    for suffix in SUFFIXES:
        expect_matrix(f"{name}.{suffix}", tensors[suffix])
    codes, zeros = unpack_awq(tensors["qweight"]), unpack_awq(tensors["qzeros"])  # [in, out], [groups, out]
    scales = tensors["scales"]
    expect(f"{name}.qweight", codes, (in_features, scales.shape[1]))
    expect(f"{name}.qzeros", zeros, tuple(scales.shape))
    group_size = group_size_that_fits(f"{name}.scales", scales.shape[0], in_features, config.group_size, None)
    return checked_weight(f"{name}.scales", pack(codes, 4, dim=0), scales, zeros, None, 4, group_size, in_features)


def _check(name: str, headers: Mapping[str, Header], in_features: int, config: QuantizationConfig) -> None:
    check_dtypes(name, headers, DTYPES)
    if "qweight" not in headers:
        return
    shape, groups = headers["qweight"][1], groups_of(in_features, config.group_size)
    columns = shape[-1] if shape else 0
    for suffix, expected in (
        ("qweight", (in_features, columns)),
        ("qzeros", (groups, columns)),
        ("scales", (groups, 8 * columns)),
    ):
        check_shape(name, suffix, headers, [expected], in_features, config)


def _parse(found: Mapping[str, Any]) -> QuantizationConfig:
    """As transformers writes it (`bits`, `group_size`), or as AutoAWQ does (`w_bit`, `q_group_size`)."""
    version, bits = str(found.get("version") or "gemm"), found.get("bits", found.get("w_bit", 4))
    if version.lower() != "gemm" or bits != 4:
        raise TersorError(f"AWQ version {version!r} at {bits} bits: only 4-bit gemm is read")
    group_size = int(found.get("group_size", found.get("q_group_size", 128)))
    return QuantizationConfig("awq", 4, group_size, sym=not found.get("zero_point", True))


AWQ = Layout("awq", SUFFIXES, "awq", read=read, check=_check, parse=_parse)
