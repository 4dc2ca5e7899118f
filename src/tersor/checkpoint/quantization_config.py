"""What a checkpoint says of its quantization (`quantization_config` in config.json), in whichever format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tersor.errors import TersorError
from tersor.formats.layout import QuantizationConfig
from tersor.formats.layouts import READ
from tersor.untrusted import read_json

CONFIG_FILES = ("quantize_config.json", "quant_config.json")  # older writers keep it beside config.json


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
    """Raise ValueError where a number occurs in no layout."""
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
    by_itself = "awq" if "w_bit" in found else "gptq"  # for files that name no method: AutoAWQ's are told by their keys
    method = str(found.get("quant_method") or found.get("method") or by_itself).lower()
    for layout in READ.values():
        if layout.method == method:
            return layout.parse(found)
    raise TersorError(f"quantization method {method!r} is not one of gptq, compressed-tensors, awq")
