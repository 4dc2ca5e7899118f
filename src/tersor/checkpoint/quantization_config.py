"""What a checkpoint says of its quantization (`quantization_config` in config.json), read and written for every layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.errors import TersorError
from tersor.formats.layouts import LAYOUTS

CONFIG_FILES = ("quantize_config.json", "quant_config.json")  # older writers keep it beside config.json


@dataclass(frozen=True)
class QuantizationConfig:
    """layout: "gptq", "gptq_v2", "compressed-tensors" or "awq". overrides: per-module bits and group size (GPTQ's `dynamic`)."""

    layout: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool = False
    whole_word_zeros: bool = False


def read_config(directory: Path, config: Mapping[str, Any]) -> QuantizationConfig | None:
    """The checkpoint's quantization, or None where it has none. Raises TersorError where tersor cannot read it."""
    found = config.get("quantization_config")
    if found is None:
        for name in CONFIG_FILES:
            if (directory / name).is_file():
                found = json.loads((directory / name).read_text(encoding="utf-8"))
                break
    if not found:
        return None
    method = found.get("quant_method") or found.get("method") or "gptq"
    if method == "compressed-tensors":
        return _read_compressed(found)
    if method == "awq":
        if found.get("version", "gemm") != "gemm" or found.get("bits", 4) != 4:
            raise TersorError(
                f"AWQ version {found.get('version')!r} at {found.get('bits')} bits: only 4-bit gemm is read"
            )
        return QuantizationConfig("awq", 4, int(found.get("group_size", 128)), sym=not found.get("zero_point", True))
    if method != "gptq":
        raise TersorError(f"quantization method {method!r} is not one of gptq, compressed-tensors, awq")
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
    )


def _read_compressed(found: Mapping[str, Any]) -> QuantizationConfig:
    groups = found.get("config_groups") or {}
    kinds = {group.get("format") or found.get("format") for group in groups.values()}
    if kinds != {"pack-quantized"}:
        raise TersorError(f"compressed-tensors format {sorted(map(str, kinds))}: only pack-quantized is read")
    weights = [group["weights"] for group in groups.values()]
    if any(group.get("input_activations") for group in groups.values()):
        raise TersorError("compressed-tensors checkpoint with quantized activations: only weights are read")
    first = weights[0]
    return QuantizationConfig(
        layout="compressed-tensors",
        bits=int(first["num_bits"]),
        group_size=int(first.get("group_size") or -1),
        sym=bool(first.get("symmetric", True)),
        desc_act=first.get("actorder") == "group",
    )


def make_config(
    layout: str,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    static_groups: bool,
    true_sequential: bool,
    damp: float,
    ignored: list[str],
    version: str,
) -> dict[str, Any]:
    """The `quantization_config` that readers of this layout expect; `ignored` are the linear layers left as they were."""
    if layout == "compressed-tensors":
        actorder = None if not desc_act else ("static" if static_groups else "group")
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "format": "pack-quantized",
                    "input_activations": None,
                    "output_activations": None,
                    "weights": {
                        "num_bits": bits,
                        "type": "int",
                        "symmetric": sym,
                        "strategy": "channel" if group_size == -1 else "group",
                        "group_size": None if group_size == -1 else group_size,
                        "actorder": actorder,
                        "dynamic": False,
                        "observer": "minmax",
                    },
                }
            },
            "ignore": ignored,
            "kv_cache_scheme": None,
            "version": "0.15.0",
        }
    if layout not in LAYOUTS:
        raise TersorError(f"unknown format {layout!r}; known: {', '.join(LAYOUTS)}")
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": sym,
        "checkpoint_format": layout,
        "lm_head": False,
        "true_sequential": true_sequential,
        "static_groups": static_groups,
        "damp_percent": damp,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"tersor:{version}"]},
    }
