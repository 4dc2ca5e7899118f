"""What all methods with grids of 2 to 8 bits share: the options of a grid, and their check against a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tersor.errors import TersorError
from tersor.formats.grid import Bits
from tersor.formats.layout import BITS, Layout
from tersor.formats.packing import WORD
from tersor.methods.block import Block
from tersor.methods.method import BlockMethod, option


def bits_option(default: Bits | None, help: str = "{}") -> Any:
    """help: of the option, around what values there are."""

    def check(value: Any) -> bool:
        if value is None or value == "ternary":
            return value == "ternary" or default is None
        return isinstance(value, int) and not isinstance(value, bool) and value in BITS

    left_out = "; left out, nothing is quantized" if default is None else ""
    allowed = f"2, 3, 4, 8 or 'ternary'{left_out}"
    return option(default, help.format("2, 3, 4, 8 or ternary"), check=check, allowed=allowed, word=True)


def group_size_option(default: int, help: str = "{}") -> Any:
    def check(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and (value == -1 or value > 0)

    told = help.format("input columns that share a step and a zero point; -1 for one group a row")
    return option(default, told, check=check, allowed="-1 or a positive number")


def sym_option(help: str = "{}") -> Any:
    return option(True, help.format("levels symmetric around zero, or with a fitted zero point"), flag="--sym/--asym")


@dataclass(frozen=True)
class OnGrids(BlockMethod):
    """A method that rounds every weight to a grid."""

    bits: Bits = bits_option(4)
    group_size: int = group_size_option(128)
    sym: bool = sym_option()
    a_bits: int | None = option(
        None,
        "bits to which layers round their inputs, token by token at run time: 8, with --bits 8 --group-size -1; left out, "
        "they do not",
        check=lambda value: value in (None, 8) and not isinstance(value, bool),
        allowed="8; left out, inputs are not rounded",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a_bits is not None and (self.bits, self.group_size, self.sym) != (8, -1, True):
            found = f"bits {self.bits}, group_size {self.group_size}, {'symmetric' if self.sym else 'asymmetric'}"
            raise TersorError(
                f"a_bits {self.a_bits} goes with weights of 8 bits, symmetric, with one step a row, not with {found}: "
                "--bits 8 --group-size -1 --sym"
            )

    @property
    def layouts(self) -> tuple[str, ...]:
        return ("compressed-tensors",) if self.a_bits is not None else ("gptq", "gptq_v2", "compressed-tensors")

    def check_block(self, block: Block) -> None:
        """Raise TersorError where a layer cannot round its inputs."""
        for name, found in block.linears.items():
            if self.a_bits is not None and not (
                isinstance(found, nn.Linear) and type(found).forward is nn.Linear.forward
            ):
                raise TersorError(
                    f"{name} is a {type(found).__name__}, and only nn.Linear rounds its inputs: --exclude '{name}'"
                )

    def check_linear(self, name: str, out_features: int, in_features: int, layout: Layout | None) -> None:
        check_grid(name, self.bits, self.group_size, self.sym, out_features, in_features, layout)


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
