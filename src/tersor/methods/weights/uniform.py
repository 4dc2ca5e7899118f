"""What all methods with grids of 2 to 8 bits share: the help texts and checks of bits and groups."""

from __future__ import annotations

from typing import Any

from tersor.errors import TersorError
from tersor.formats.grid import Bits
from tersor.formats.layout import BITS, Layout
from tersor.formats.packing import WORD

BITS_HELP = "2, 3, 4, 8 or ternary"
GROUP_HELP = "input columns that share a step and a zero point; -1 for one group a row"
SYM_HELP = "levels symmetric around zero, or with a fitted zero point"


def is_bits(value: Any) -> bool:
    return value == "ternary" or (isinstance(value, int) and not isinstance(value, bool) and value in BITS)


def is_group_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (value == -1 or value > 0)


def width_of(bits: Bits) -> int:
    """Bits that one code takes in a file."""
    return 2 if bits == "ternary" else bits


def check_grid(
    name: str, bits: Bits, group_size: int, sym: bool, out_features: int, in_features: int, layout: Layout | None
) -> None:
    """Raise TersorError where groups do not fit a layer's shape, or the file format cannot hold the layer."""
    if group_size > 0 and in_features % group_size:
        fitting = [size for size in (16, 32, 64, 128, 256, 512, 1024) if in_features % size == 0]
        sizes = ", ".join(map(str, [*fitting, -1]))
        raise TersorError(
            f"group size {group_size} does not divide the {in_features} inputs of {name}; these would: {sizes}"
        )
    if layout is None:
        return
    if bits == "ternary" and not sym:
        raise TersorError("ternary levels of two magnitudes (--asym) fit no file format; use --sym")
    if found := layout.misfit(out_features, in_features):
        raise TersorError(
            f"{name} has {found}; format {layout.name} stores whole words of {WORD}: "
            f"use --format compressed-tensors, which pads, or --exclude '{name}'"
        )
