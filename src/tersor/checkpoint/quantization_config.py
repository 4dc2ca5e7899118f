"""What a checkpoint says of its quantization (`quantization_config` in config.json), read and written for every layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tersor.errors import TersorError
from tersor.formats.layouts import LAYOUTS
from tersor.untrusted import matches, read_json

LAYER_KEYS = ("bits", "group_size", "sym", "desc_act")  # what may differ from layer to layer
CONFIG_FILES = ("quantize_config.json", "quant_config.json")  # older writers keep it beside config.json


@dataclass(frozen=True)
class QuantizationConfig:
    """layout: "gptq", "gptq_v2", "compressed-tensors", "awq" or "gguf". overrides: what is different for layers whose published
    name matches a regular expression, the first that matches winning."""

    layout: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool = False
    whole_word_zeros: bool = False
    overrides: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def for_layer(self, name: str) -> QuantizationConfig:
        changes = next((changes for pattern, changes in self.overrides if matches(pattern, name)), None)
        return self if changes is None else replace(self, **changes)


def read_config(directory: Path, config: Mapping[str, Any]) -> QuantizationConfig | None:
    """The checkpoint's quantization, or None where it has none. Raises TersorError where tersor cannot read it."""
    try:
        found = config.get("quantization_config")
        if found is None:
            for name in CONFIG_FILES:
                if (directory / name).is_file():
                    found = read_json(directory / name)
                    break
        if not found:
            return None
        parsed = parse_config(found)
        _check(parsed)
        return parsed
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise TersorError(f"{directory}: its quantization config cannot be read: {reason}") from None


def _check(config: QuantizationConfig) -> None:
    """Raise ValueError where a number is none that any layout has."""
    for where, each in (("", config.__dict__), *((f" of {name}", changes) for name, changes in config.overrides)):
        bits, group_size = each.get("bits", config.bits), each.get("group_size", config.group_size)
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ValueError(f"bits{where} is {bits!r}; 1 to 8 are read")
        whole = isinstance(group_size, int) and not isinstance(group_size, bool)
        if not whole or not (group_size == -1 or 1 <= group_size < 2**31):
            raise ValueError(f"group_size{where} is {group_size!r}; a positive number or -1 is expected")
        for flag in ("sym", "desc_act"):
            if not isinstance(each.get(flag, False), bool):
                raise ValueError(f"{flag}{where} is {each[flag]!r}; true or false is expected")


def parse_config(found: Mapping[str, Any]) -> QuantizationConfig:
    """A `quantization_config`. Raises TersorError where tersor cannot read what it describes."""
    method = found.get("quant_method") or found.get("method") or "gptq"
    if method == "compressed-tensors":
        return _read_compressed(found)
    if method == "awq":
        if found.get("version", "gemm") != "gemm" or found.get("bits", 4) != 4:
            raise TersorError(
                f"AWQ version {found.get('version')!r} at {found.get('bits')} bits: only 4-bit gemm is read"
            )
        return QuantizationConfig("awq", 4, int(found.get("group_size", 128)), sym=not found.get("zero_point", True))
    if method == "gguf":  # what `gguf_read` says of a file: the tensors themselves have the rest
        return QuantizationConfig("gguf", int(found["bits"]), int(found["group_size"]), sym=True)
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
        overrides=tuple(
            (pattern.removeprefix("+:"), {key: changes[key] for key in LAYER_KEYS if key in changes})
            for pattern, changes in (found.get("dynamic") or {}).items()
            if not pattern.startswith("-:")
        ),
    )


def _read_compressed(found: Mapping[str, Any]) -> QuantizationConfig:
    groups = found.get("config_groups") or {}
    kinds = {group.get("format") or found.get("format") for group in groups.values()}
    if kinds != {"pack-quantized"}:
        raise TersorError(f"compressed-tensors format {sorted(map(str, kinds))}: only pack-quantized is read")
    weights = [group["weights"] for group in groups.values()]
    named = [
        (target, group["weights"])
        for group in groups.values()
        for target in group.get("targets") or ()
        if target.startswith("re:")
    ]
    if any(group.get("input_activations") for group in groups.values()):
        raise TersorError("compressed-tensors checkpoint with quantized activations: only weights are read")
    first = weights[0]
    return QuantizationConfig(
        layout="compressed-tensors",
        bits=int(first["num_bits"]),
        group_size=int(first.get("group_size") or -1),
        sym=bool(first.get("symmetric", True)),
        desc_act=first.get("actorder") == "group",
        overrides=tuple(
            (
                target.removeprefix("re:"),
                {
                    "bits": int(each["num_bits"]),
                    "group_size": int(each.get("group_size") or -1),
                    "sym": bool(each.get("symmetric", True)),
                },
            )
            for target, each in named
        ),
    )


def make_config(
    layout: str,
    options: Mapping[str, Any],
    *,
    overrides: Mapping[str, Mapping[str, Any]],
    ignored: Sequence[str],
    head: bool,
    embeddings: bool,
    version: str,
) -> dict[str, Any]:
    """The `quantization_config` that readers of this layout expect.

    options: `Method.quantization()`. overrides: the same for layers (published names) that differ. ignored: the linear layers
    left as they were. head, embeddings: whether the output head and the token embedding are quantized.
    """
    if layout == "compressed-tensors":
        # By its class, as llm-compressor's examples do, for readers to which its name is not known; others are in `ignored`.
        groups = {"group_0": _compressed_group(["Linear", *(["Embedding"] if embeddings else [])], options)}
        for n, (changed, names) in enumerate(_together(overrides), 1):
            groups[f"group_{n}"] = _compressed_group([f"re:^{re.escape(name)}$" for name in names], changed)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(ignored),
            "kv_cache_scheme": None,
            "version": "0.15.0",
            # transformers 5.24 fails on an embedding that it keeps packed, when it initializes what was not read
            **({"dequantize": True} if embeddings else {}),
        }
    if layout not in LAYOUTS:
        raise TersorError(f"unknown format {layout!r}; known: {', '.join(LAYOUTS)}")
    config = {
        "quant_method": "gptq",
        "bits": options["bits"],
        "group_size": options["group_size"],
        "desc_act": options["desc_act"],
        "sym": options["sym"],
        "checkpoint_format": layout,
        "lm_head": head,
        "true_sequential": options["true_sequential"],
        "static_groups": options["static_groups"],
        "damp_percent": options["damp"],
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"tersor:{version}"]},
    }
    dynamic = {f"+:^{re.escape(name)}$": {k: changed[k] for k in LAYER_KEYS} for name, changed in overrides.items()}
    return {**config, "dynamic": dynamic} if dynamic else config


def _compressed_group(targets: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    group_size = options["group_size"]
    actorder = None if not options["desc_act"] else ("static" if options["static_groups"] else "group")
    return {
        "targets": targets,
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": options["bits"],
            "type": "int",
            "symmetric": options["sym"],
            "strategy": "channel" if group_size == -1 else "group",
            "group_size": None if group_size == -1 else group_size,
            "actorder": actorder,
            "dynamic": False,
            "observer": "minmax",
        },
    }


def _together(overrides: Mapping[str, Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Layers with the same options, in one group each."""
    found: list[tuple[Mapping[str, Any], list[str]]] = []
    for name, changed in overrides.items():
        mates = next((names for options, names in found if options == changed), None)
        if mates is None:
            found.append((changed, [name]))
        else:
            mates.append(name)
    return found
