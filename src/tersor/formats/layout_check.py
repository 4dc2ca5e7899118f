"""Whether the tensors of a packed layer are what the checkpoint's config says: from their headers, before any is read.

A reader that looks at the tensors alone gives numbers for almost anything: 8-bit words read as 4 bits are valid codes. So bits,
group size, shapes and dtypes must agree with the config when a file is opened.
"""

from __future__ import annotations

from collections.abc import Mapping

from tersor.errors import TersorError
from tersor.formats.layouts import BITS
from tersor.formats.packing import WORD, packed_size

Header = tuple[str, tuple[int, ...]]  # dtype, as safetensors calls it, and shape
_WORDS, _STEPS, _INDEX = ("I32",), ("F16", "BF16", "F32", "F64"), ("I32", "I64")
_KINDS = {
    "qweight": _WORDS,
    "weight_packed": _WORDS,
    "qzeros": _WORDS,
    "scales": _STEPS,
    "weight_scale": _STEPS,
    "g_idx": _INDEX,
    "weight_g_idx": _INDEX,
    "weight_shape": _INDEX,
    "weight_zero_point": ("I32", "I8", "U8", "I64"),
}


def check_headers(
    name: str, headers: Mapping[str, Header], in_features: int, *, layout: str, bits: int, group_size: int
) -> None:
    """headers: those of one layer's tensors by suffix. Raises TersorError naming the tensor that does not fit."""
    for suffix, (dtype, _) in headers.items():
        if suffix in _KINDS and dtype not in _KINDS[suffix]:
            raise TersorError(f"{name}.{suffix} is of the dtype {dtype}; {' or '.join(_KINDS[suffix])} is expected")
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    shapes = {suffix: shape for suffix, (_, shape) in headers.items()}
    claimed = f"{in_features} inputs at {bits} bits in groups of {group_size}"
    if "weight_packed" in shapes:
        rows = shapes["weight_packed"][0] if shapes["weight_packed"] else 0
        words = {packed_size(in_features, bits), -(-in_features // (WORD // bits))}
        _expect(name, "weight_packed", shapes, [(rows, count) for count in sorted(words)], claimed)
        _expect(name, "weight_scale", shapes, [(rows, groups), *([(rows,)] if groups == 1 else [])], claimed)
        _expect(name, "weight_shape", shapes, [(2,)], claimed)
        _expect(name, "weight_g_idx", shapes, [(in_features,)], claimed)
    elif "qweight" in shapes and layout == "awq":
        columns = shapes["qweight"][-1] if shapes["qweight"] else 0
        _expect(name, "qweight", shapes, [(in_features, columns)], claimed)
        _expect(name, "qzeros", shapes, [(groups, columns)], claimed)
        _expect(name, "scales", shapes, [(groups, 8 * columns)], claimed)
    elif "qweight" in shapes:
        if bits not in BITS:
            raise TersorError(
                f"{name}: the config says {bits} bits; GPTQ layers have one of {', '.join(map(str, BITS))}"
            )
        columns = shapes["qweight"][-1] if shapes["qweight"] else 0
        _expect(name, "qweight", shapes, [(packed_size(in_features, bits), columns)], claimed)
        _expect(name, "qzeros", shapes, [(groups, packed_size(columns, bits))], claimed)
        _expect(name, "scales", shapes, [(groups, columns)], claimed)
        _expect(name, "g_idx", shapes, [(in_features,)], claimed)


def _expect(
    name: str, suffix: str, shapes: Mapping[str, tuple[int, ...]], allowed: list[tuple[int, ...]], claimed: str
) -> None:
    if suffix in shapes and shapes[suffix] not in allowed:
        raise TersorError(
            f"{name}.{suffix} is {shapes[suffix]}; {claimed}, as the config says, need {' or '.join(map(str, allowed))}"
        )
