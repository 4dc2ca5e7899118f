"""Round to nearest: every weight to the closest level of its group's grid. The baseline that other methods have to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tersor.formats.grid import Bits, ClipSearch
from tersor.formats.layout import Layout, UniformGrids
from tersor.layers.linear_map import weight_matrix
from tersor.methods.block import Block
from tersor.methods.method import BlockMethod, Method, option, register
from tersor.methods.weights.gptq_solver import Solution, solve_rtn
from tersor.methods.weights.uniform import (
    BITS_HELP,
    GROUP_HELP,
    SYM_HELP,
    check_grid,
    is_bits,
    is_group_size,
    width_of,
)


@register
@dataclass(frozen=True)
class RTN(BlockMethod):
    """Quantize to `bits` by rounding each weight to its nearest level; needs no calibration."""

    name: ClassVar[str] = "rtn"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/quantization-ptq",
        "inference/quantization-uniform",
        "inference/quantization-granularity",
        "inference/quantization-binary",
        "practical/quantization",
    )
    layouts: ClassVar[tuple[str, ...]] = ("gptq", "gptq_v2", "compressed-tensors")
    needs_samples: ClassVar[bool] = False

    bits: Bits = option(4, BITS_HELP, check=is_bits, allowed="2, 3, 4, 8 or 'ternary'", word=True)
    group_size: int = option(128, GROUP_HELP, check=is_group_size, allowed="-1 or a positive number")
    sym: bool = option(True, SYM_HELP, flag="--sym/--asym")
    mse: bool = option(False, "search for the clipping range with the least error in each group")

    @classmethod
    def recipes(cls, kind: str) -> Sequence[Sequence[Method]]:
        return [[cls(bits=bits, group_size=group, mse=bits < 8)] for bits in (8, 4) for group in (128, 32, -1)]

    def without_inputs(self) -> RTN:
        return self

    def check_linear(self, name: str, out_features: int, in_features: int, layout: Layout | None) -> None:
        check_grid(name, self.bits, self.group_size, self.sym, out_features, in_features, layout)

    def compress_block(self, block: Block) -> None:
        def solve(name: str) -> tuple[Solution, str]:
            solution = solve_rtn(
                weight_matrix(block.linears[name]).to(block.hessian_dtype),
                bits=self.bits,
                group_size=self.group_size,
                sym=self.sym,
                clip_search=ClipSearch() if self.mse else None,
                stored=block.stored,
            )
            return solution, ""

        block.solve(block.linears, solve, self.group_size, tokens={})

    def quantization(self) -> UniformGrids:
        return UniformGrids(width_of(self.bits), self.group_size, self.sym)
