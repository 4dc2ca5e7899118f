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
    """layout: "gptq", "gptq_v2", "compressed-tensors", "awq" or "gguf". overrides: what is different for some layers, by target:
    a name, the class of a module, or a regular expression after `re:`."""

    layout: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool = False
    whole_word_zeros: bool = False
    overrides: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def for_layer(self, *names: str, classes: Sequence[str] = ("Linear",)) -> QuantizationConfig:
        """What holds for one layer. names: those that it goes by, as published and as a module; classes: the module's.

        A target that is a name wins over regular expressions, of which the first that matches wins, and these over classes.
        """
        patterns = [(target.removeprefix("re:"), changes) for target, changes in self.overrides if _is_pattern(target)]
        exact = [(target, changes) for target, changes in self.overrides if not _is_pattern(target)]
        found = [changes for target, changes in exact if target in names]
        found += [changes for pattern, changes in patterns if any(matches(pattern, name) for name in names)]
        found += [changes for target, changes in exact if target in classes]
        return replace(self, **found[0]) if found else self


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


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
    by_itself = "awq" if "w_bit" in found else "gptq"  # of files that name no method: AutoAWQ's own has its own words
    method = str(found.get("quant_method") or found.get("method") or by_itself).lower()
    if method == "compressed-tensors":
        return _read_compressed(found)
    if method == "awq":
        return _read_awq(found)
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
            (f"re:{pattern.removeprefix('+:')}", {key: changes[key] for key in LAYER_KEYS if key in changes})
            for pattern, changes in (found.get("dynamic") or {}).items()
            if not pattern.startswith("-:")
        ),
    )


def _read_awq(found: Mapping[str, Any]) -> QuantizationConfig:
    """As transformers writes it (`bits`, `group_size`), or as AutoAWQ does (`w_bit`, `q_group_size`)."""
    version, bits = str(found.get("version") or "gemm"), found.get("bits", found.get("w_bit", 4))
    if version.lower() != "gemm" or bits != 4:
        raise TersorError(f"AWQ version {version!r} at {bits} bits: only 4-bit gemm is read")
    group_size = int(found.get("group_size", found.get("q_group_size", 128)))
    return QuantizationConfig("awq", 4, group_size, sym=not found.get("zero_point", True))


def _read_compressed(found: Mapping[str, Any]) -> QuantizationConfig:
    """Groups stand in any order, and a later one takes a target over from an earlier one. Of several regular expressions that
    match, the first in the order of the alphabet wins, as with the compressed-tensors package."""
    groups = list((found.get("config_groups") or {}).values())
    kinds = {group.get("format") or found.get("format") for group in groups}
    if kinds != {"pack-quantized"}:
        raise TersorError(f"compressed-tensors format {sorted(map(str, kinds))}: only pack-quantized is read")
    if any(group.get("input_activations") for group in groups):
        raise TersorError("compressed-tensors checkpoint with quantized activations: only weights are read")
    targets = {
        target: _options_of(group["weights"])
        for group in groups
        if group.get("weights")
        for target in group.get("targets") or ()
    }
    # What no target names but is packed all the same is taken for what most layers are.
    usual = targets.get("Linear") or _options_of(groups[0]["weights"])
    return QuantizationConfig(
        layout="compressed-tensors", overrides=tuple(sorted(targets.items(), key=lambda each: each[0])), **usual
    )


def _options_of(weights: Mapping[str, Any]) -> dict[str, Any]:
    """LAYER_KEYS of a group's `weights`."""
    return {
        "bits": int(weights["num_bits"]),
        "group_size": int(weights.get("group_size") or -1),
        "sym": bool(weights.get("symmetric", True)),
        "desc_act": weights.get("actorder") == "group",
    }


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
