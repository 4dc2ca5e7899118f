"""compressed-tensors `pack-quantized` and `int-quantized`, the layouts of llm-compressor.

W is [out, in], G groups, packed_size as in `packing.py`:

| tensor | shape | dtype | content |
| --- | --- | --- | --- |
| weight_packed | [out, packed_size(in)] | int32 | codes, packed along the input |
| weight_scale | [out, G] | model dtype | |
| weight_shape | [2] | int64 | out, in |
| weight_zero_point | [packed_size(out), G] | int32 | asymmetric only, packed along the output |
| weight_g_idx | [in] | int32 | act-order with dynamic groups only |

`int-quantized` is written where inputs are rounded too: `input_activations` of the group says to what, and the codes are int8
[out, in], counted from zero, under the name `weight`, beside `weight_scale`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.layout import (
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

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight")
DTYPES = {
    "weight_packed": ("I32",),
    "weight": ("I8",),
    "weight_scale": ("F16", "BF16", "F32", "F64"),
    "weight_g_idx": ("I32", "I64"),
    "weight_shape": ("I32", "I64"),
    "weight_zero_point": ("I32", "I8", "U8", "I64"),
}


# `input_activations`: how a layer rounds its inputs, the one way that is known here
INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def _write(weight: QuantizedWeight, sym: bool) -> dict[str, Tensor]:
    if weight.a_bits is not None:
        codes = weight.codes().to(torch.int16) - 2 ** (weight.bits - 1)
        return {"weight": codes.to(torch.int8).contiguous(), "weight_scale": weight.scales.t().contiguous()}
    tensors = {
        "weight_packed": weight.qweight.t().contiguous(),  # q + 2^(bits-1) of the signed q is our unsigned code
        "weight_scale": weight.scales.t().contiguous(),
        "weight_shape": torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64),
    }
    if not sym:
        tensors["weight_zero_point"] = pack(weight.zeros.t(), weight.bits, dim=0)
    if weight.g_idx is not None:
        tensors["weight_g_idx"] = weight.g_idx
    return tensors


def _sizes(rows: int, columns: int, grids: UniformGrids, steps: torch.dtype) -> dict[str, int]:
    groups = grids.groups(columns)
    if grids.a_bits is not None:
        return {"weight": rows * columns, "weight_scale": steps.itemsize * groups * rows}
    found = {
        "weight_packed": WORD_BYTES * packed_size(columns, grids.bits) * rows,
        "weight_scale": steps.itemsize * groups * rows,
        "weight_shape": 2 * torch.int64.itemsize,
    }
    if not grids.sym:
        found["weight_zero_point"] = WORD_BYTES * packed_size(rows, grids.bits) * groups
    if grids.desc_act and not grids.static_groups and grids.group_size != -1:
        found["weight_g_idx"] = WORD_BYTES * columns
    return found


def read(name: str, tensors: Mapping[str, Tensor], in_features: int, config: QuantizationConfig) -> QuantizedWeight:
    """Read one layer; 3 bits in both packings (dense, and ten values a word), 8 bits also as they are."""
    bits = config.bits
    integers = "weight" if "weight" in tensors and "weight_packed" not in tensors else "weight_packed"
    require(name, tensors, (integers, "weight_scale"))
    packed, scales = tensors[integers], tensors["weight_scale"]
    expect_matrix(f"{name}.{integers}", packed)
    scales = scales.view(-1, 1) if scales.dim() == 1 else scales
    expect_matrix(f"{name}.weight_scale", scales)
    out_features = packed.shape[0]
    if "weight_shape" in tensors:
        shape = tensors["weight_shape"].tolist()
        if shape != [out_features, in_features]:
            raise TersorError(f"{name}.weight_shape says {shape}; the layer is [{out_features}, {in_features}]")
    dense, sparse = packed_size(in_features, bits), -(-in_features // (WORD // bits))
    if integers == "weight":
        expect(f"{name}.weight", packed, (out_features, in_features))
        qweight = pack((packed.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8).t(), bits, dim=0)
    elif packed.shape[1] == dense:
        qweight = packed.t().contiguous()
    elif packed.shape[1] == sparse:
        qweight = pack(_unpack_whole_values(packed, bits, in_features), bits, dim=1).t().contiguous()
    else:
        raise TersorError(f"{name}.weight_packed has {packed.shape[1]} words a row; {bits} bits need {dense}")
    groups = scales.shape[1]
    expect(f"{name}.weight_scale", scales, (out_features, groups))
    stored_zeros = tensors.get("weight_zero_point")
    if stored_zeros is None:
        zeros = torch.full((groups, out_features), 2 ** (bits - 1), dtype=torch.uint8)
    elif stored_zeros.shape == (packed_size(out_features, bits), groups):
        zeros = unpack(stored_zeros, bits, out_features, dim=0).t()
    elif stored_zeros.shape == (out_features, groups):  # not packed: signed integers
        zeros = (stored_zeros.to(torch.int64).t() + 2 ** (bits - 1)).to(torch.uint8)
    else:
        rows = packed_size(out_features, bits)
        raise TersorError(f"{name}.weight_zero_point is {tuple(stored_zeros.shape)}; expected {(rows, groups)}")
    g_idx = tensors.get("weight_g_idx")
    if g_idx is not None:
        expect(f"{name}.weight_g_idx", g_idx, (in_features,))
        g_idx = checked_groups(f"{name}.weight_g_idx", g_idx, groups)
    group_size = group_size_that_fits(f"{name}.weight_scale", groups, in_features, config.group_size, g_idx)
    weight = checked_weight(f"{name}.weight_scale", qweight, scales.t(), zeros, g_idx, bits, group_size, in_features)
    return replace(weight, a_bits=config.a_bits)


def _unpack_whole_values(words: Tensor, bits: int, count: int) -> Tensor:
    """The older packing of 3, 5, 6 and 7 bits: only whole values in a word, its top bits empty."""
    stream = words.to(torch.int64) & 0xFFFFFFFF
    values = torch.stack([(stream >> (bits * k)) & (2**bits - 1) for k in range(WORD // bits)], dim=-1)
    return values.flatten(-2)[..., :count].to(torch.uint8)


def _check(name: str, headers: Mapping[str, Header], in_features: int, config: QuantizationConfig) -> None:
    check_dtypes(name, headers, DTYPES)
    integers = next((each for each in ("weight_packed", "weight") if each in headers), None)
    if integers is None:
        return
    if integers == "weight" and config.bits != 8:
        raise TersorError(f"{name}.weight holds 8-bit integers; the config says {config.bits} bits")
    shape, groups = headers[integers][1], groups_of(in_features, config.group_size)
    rows = shape[0] if shape else 0
    words = {packed_size(in_features, config.bits), -(-in_features // (WORD // config.bits))}
    for suffix, allowed in (
        ("weight_packed", [(rows, count) for count in sorted(words)]),
        ("weight", [(rows, in_features)]),
        ("weight_scale", [(rows, groups), *([(rows,)] if groups == 1 else [])]),
        ("weight_shape", [(2,)]),
        ("weight_g_idx", [(in_features,)]),
    ):
        check_shape(name, suffix, headers, allowed, in_features, config)


def _parse(found: Mapping[str, Any]) -> QuantizationConfig:
    """Groups come in any order; where two name one target, the later one holds. Of several regular expressions that match, the
    first in alphabetical order wins, as in the compressed-tensors package."""
    groups = list((found.get("config_groups") or {}).values())
    kinds = {group.get("format") or found.get("format") for group in groups}
    if not kinds or not kinds <= {"pack-quantized", "int-quantized"}:
        raise TersorError(
            f"compressed-tensors format {sorted(map(str, kinds))}: only pack-quantized and int-quantized are read"
        )
    targets = {
        target: _options_of(group) for group in groups if group.get("weights") for target in group.get("targets") or ()
    }
    # A layer that is packed although no target names it is read like most layers.
    usual = targets.get("Linear") or _options_of(groups[0])
    return QuantizationConfig(
        layout="compressed-tensors", overrides=tuple(sorted(targets.items(), key=lambda each: each[0])), **usual
    )


def _options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options in `LAYER_KEYS`, and to what inputs are rounded, from a group of layers."""
    weights, inputs = group["weights"], group.get("input_activations")
    wrong = (
        [f"{key} {inputs.get(key)!r}" for key, value in INPUTS.items() if inputs.get(key) != value] if inputs else []
    )
    if wrong:
        raise TersorError(
            f"compressed-tensors checkpoint whose inputs are rounded with {', '.join(wrong)}: 8-bit integers, symmetric, "
            "token by token at run time are read"
        )
    a_bits = None if not inputs else int(inputs["num_bits"])
    options = {
        "bits": int(weights["num_bits"]),
        "group_size": int(weights.get("group_size") or -1),
        "sym": bool(weights.get("symmetric", True)),
        "desc_act": weights.get("actorder") == "group",
        "a_bits": a_bits,
    }
    if a_bits is not None and (options["bits"], options["group_size"], options["sym"]) != (8, -1, True):
        raise TersorError(
            f"compressed-tensors checkpoint with rounded inputs and weights of {options['bits']} bits in groups of "
            f"{options['group_size']}: weights of 8 bits, symmetric, with one step a row are read beside rounded inputs"
        )
    return options


def _config(described: Description) -> dict[str, Any]:
    # By its class, as llm-compressor's examples do, for readers that do not know its name; other embeddings are in `ignored`.
    groups = {"group_0": _group(["Linear", *(["Embedding"] if described.embeddings else [])], described.grids)}
    for n, (changed, names) in enumerate(_together(described.overrides), 1):
        groups[f"group_{n}"] = _group([f"re:^{re.escape(name)}$" for name in names], changed)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(described.ignored),
        "kv_cache_scheme": None,
        "version": "0.15.0",
        # transformers 5.24 fails on an embedding that it keeps packed, when it initializes what was not read
        **({"dequantize": True} if described.embeddings else {}),
    }


def _group(targets: Sequence[str], grids: UniformGrids) -> dict[str, Any]:
    actorder = None if not grids.desc_act else ("static" if grids.static_groups else "group")
    return {
        "targets": targets,
        "format": "pack-quantized" if grids.a_bits is None else "int-quantized",
        "input_activations": None if grids.a_bits is None else dict(INPUTS),
        "output_activations": None,
        "weights": {
            "num_bits": grids.bits,
            "type": "int",
            "symmetric": grids.sym,
            "strategy": "channel" if grids.group_size == -1 else "group",
            "group_size": None if grids.group_size == -1 else grids.group_size,
            "actorder": actorder,
            "dynamic": False,
            "observer": "minmax",
        },
    }


def _together(overrides: Mapping[str, UniformGrids]) -> list[tuple[UniformGrids, list[str]]]:
    """Layers with the same grids, in one group each."""
    found: dict[UniformGrids, list[str]] = {}
    for name, changed in overrides.items():
        found.setdefault(changed, []).append(name)
    return list(found.items())


COMPRESSED_TENSORS = Layout(
    "compressed-tensors",
    SUFFIXES,
    "compressed-tensors",
    read=read,
    check=_check,
    parse=_parse,
    write=_write,
    sizes=_sizes,
    config=_config,
    conv1d=False,
    scattered_groups=False,
    expert_stacks=False,
)
