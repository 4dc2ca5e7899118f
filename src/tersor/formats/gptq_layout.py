"""GPTQ's layout on disk, in its two versions, which store zero points differently.

W is [out, in], G groups, packed_size as in `packing.py`:

| tensor | shape | dtype | content |
| --- | --- | --- | --- |
| qweight | [packed_size(in), out] | int32 | codes, packed along the input |
| qzeros | [G, packed_size(out)] | int32 | zero points (v2) or zero points minus one (v1), packed along the output |
| scales | [G, out] | float16 / bfloat16 | |
| g_idx | [in] | int32 | group of each input |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.layout import (
    BITS,
    LAYER_KEYS,
    Description,
    Header,
    Layout,
    QuantizationConfig,
    UniformGrids,
    check_dtypes,
    check_shape,
    checked_groups,
    checked_weight,
    expect,
    expect_matrix,
    group_size_that_fits,
    groups_of,
    require,
)
from tersor.formats.packing import WORD, WORD_BYTES, pack, packed_size, unpack
from tersor.formats.quantized_weight import QuantizedWeight

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
DTYPES = {
    "qweight": ("I32",),
    "qzeros": ("I32",),
    "scales": ("F16", "BF16", "F32", "F64"),
    "g_idx": ("I32", "I64"),
}


def _write(weight: QuantizedWeight, sym: bool, *, v2: bool) -> dict[str, Tensor]:
    zeros = weight.zeros if v2 else (weight.zeros.to(torch.int64) - 1) % 2**weight.bits
    return {
        "qweight": weight.qweight,
        "qzeros": pack(zeros, weight.bits, dim=1),
        "scales": weight.scales,
        "g_idx": weight.groups().to(torch.int32),
    }


def _sizes(rows: int, columns: int, grids: UniformGrids, steps: torch.dtype) -> dict[str, int]:
    groups = grids.groups(columns)
    return {
        "qweight": WORD_BYTES * packed_size(columns, grids.bits) * rows,
        "qzeros": WORD_BYTES * packed_size(rows, grids.bits) * groups,
        "scales": steps.itemsize * groups * rows,
        "g_idx": WORD_BYTES * columns,
    }


def read(name: str, tensors: Mapping[str, Tensor], in_features: int, config: QuantizationConfig) -> QuantizedWeight:
    """Read one layer. Where the config's bits, group size or version disagree with the tensors, the tensors win. Symmetric zero
    points show the version: all are one constant, which v2 stores as 2^(bits-1) and v1 as one less.

    config.whole_word_zeros: the writer subtracted a constant from whole words of v1 zero points (GPTQModel at 2, 4 and 8 bits),
    so a zero point of 0 borrowed from its neighbour. Raises TersorError naming the tensor that does not fit.
    """
    require(name, tensors, ("qweight", "qzeros", "scales"))
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    expect_matrix(f"{name}.qweight", qweight)
    expect_matrix(f"{name}.scales", scales)
    out_features = qweight.shape[1]
    bits = _bits_that_fit(f"{name}.qweight", qweight.shape[0], in_features, config.bits)
    groups = scales.shape[0]
    expect(f"{name}.scales", scales, (groups, out_features))
    expect(f"{name}.qzeros", qzeros, (groups, packed_size(out_features, bits)))
    g_idx = tensors.get("g_idx")
    if g_idx is not None:
        expect(f"{name}.g_idx", g_idx, (in_features,))
        g_idx = checked_groups(f"{name}.g_idx", g_idx, groups)
    group_size = group_size_that_fits(f"{name}.scales", groups, in_features, config.group_size, g_idx)

    stored, v2 = unpack(qzeros, bits, out_features, dim=1), config.layout == GPTQ_V2.name
    if config.sym and bool((stored == stored[0, 0]).all()):
        v2 = {2 ** (bits - 1): True, 2 ** (bits - 1) - 1: False}.get(int(stored[0, 0]), v2)
    if v2:
        zeros = stored
    elif config.whole_word_zeros and bits != 3:
        one = sum(1 << (bits * k) for k in range(WORD // bits))
        words = (qzeros.to(torch.int64) + one) & 0xFFFFFFFF
        zeros = unpack(words, bits, out_features, dim=1)
    else:
        zeros = (stored + 1) & (2**bits - 1)
    return checked_weight(f"{name}.scales", qweight, scales, zeros, g_idx, bits, group_size, in_features)


def _bits_that_fit(name: str, words: int, in_features: int, claimed: int) -> int:
    for bits in (claimed, *BITS):
        if words == packed_size(in_features, bits):
            return bits
    raise TersorError(f"{name} has {words} rows, which hold {in_features} inputs at none of {BITS} bits")


def _check(name: str, headers: Mapping[str, Header], in_features: int, config: QuantizationConfig) -> None:
    check_dtypes(name, headers, DTYPES)
    if "qweight" not in headers:
        return
    if config.bits not in BITS:
        raise TersorError(
            f"{name}: the config says {config.bits} bits; GPTQ layers have one of {', '.join(map(str, BITS))}"
        )
    shape = headers["qweight"][1]
    rows = shape[-1] if shape else 0
    groups = groups_of(in_features, config.group_size)
    for suffix, expected in (
        ("qweight", (packed_size(in_features, config.bits), rows)),
        ("qzeros", (groups, packed_size(rows, config.bits))),
        ("scales", (groups, rows)),
        ("g_idx", (in_features,)),
    ):
        check_shape(name, suffix, headers, [expected], in_features, config)


def _parse(found: Mapping[str, Any]) -> QuantizationConfig:
    layout = found.get("checkpoint_format") or found.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise TersorError(f"GPTQ checkpoint format {layout!r} is not one of gptq, gptq_v2")
    quantizers = (found.get("meta") or {}).get("quantizer") or []
    quantizers = [quantizers] if isinstance(quantizers, str) else quantizers
    return QuantizationConfig(
        layout=layout,
        bits=int(found["bits"]),
        group_size=int(found.get("group_size", -1)),
        sym=bool(found.get("sym", True)),
        desc_act=bool(found.get("desc_act", False)),
        whole_word_zeros=any(name.startswith("gptqmodel") for name in quantizers),
        overrides=tuple(
            (f"re:{pattern.removeprefix('+:')}", {key: changes[key] for key in LAYER_KEYS if key in changes})
            for pattern, changes in (found.get("dynamic") or {}).items()
            if not pattern.startswith("-:")
        ),
    )


def _config(described: Description, *, layout: str) -> dict[str, Any]:
    grids = described.grids
    left: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in described.ignored_in_blocks}
    changed = {f"+:^{re.escape(name)}$": each.of_layer() for name, each in described.overrides.items()}
    dynamic: dict[str, Any] = {**left, **changed}
    return {
        "quant_method": "gptq",
        "bits": grids.bits,
        "group_size": grids.group_size,
        "desc_act": grids.desc_act,
        "sym": grids.sym,
        "checkpoint_format": layout,
        "lm_head": described.head,
        "true_sequential": grids.true_sequential,
        "static_groups": grids.static_groups,
        "damp_percent": grids.damp,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"tersor:{described.version}"]},
        **({"dynamic": dynamic} if dynamic else {}),
        **({"modules_in_block_to_quantize": [list(described.in_block)]} if left else {}),
    }


def _layout(name: str, *, min_zero: int) -> Layout:
    return Layout(
        name,
        SUFFIXES,
        "gptq",
        read=read,
        check=_check,
        parse=_parse,
        write=partial(_write, v2=name == "gptq_v2"),
        sizes=_sizes,
        config=partial(_config, layout=name),
        config_beside="quantize_config.json",
        scale_dtype=torch.float16,
        min_zero=min_zero,
        word_columns=WORD,
        word_rows=WORD,
        embeddings=False,
    )


# v1 stores z - 1: a zero point of 0 wraps around, and its writers and readers disagree on how.
GPTQ_V1 = _layout("gptq", min_zero=1)
GPTQ_V2 = _layout("gptq_v2", min_zero=0)
