"""Round to nearest: every weight to the closest level of its group's grid. The baseline that other methods have to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tersor.errors import TersorError
from tersor.formats.grid import ClipSearch
from tersor.formats.layout import UniformGrids
from tersor.layers.linear_map import weight_matrix
from tersor.methods.block import Block
from tersor.methods.method import Method, option, register
from tersor.methods.weights.gptq_solver import Solution, solve_rtn
from tersor.methods.weights.uniform import OnGrids, width_of


@register
@dataclass(frozen=True)
class RTN(OnGrids):
    """Quantize to `bits` by rounding each weight to its nearest level; needs no calibration."""

    name: ClassVar[str] = "rtn"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/quantization-ptq",
        "inference/quantization-uniform",
        "inference/quantization-granularity",
        "inference/quantization-binary",
        "practical/quantization",
    )
    needs_samples: ClassVar[bool] = False

    mse: bool = option(False, "search for the clipping range with the least error in each group")

    @classmethod
    def recipes(cls, kind: str) -> Sequence[Sequence[Method]]:
        return [[cls(bits=bits, group_size=group, mse=bits < 8)] for bits in (8, 4) for group in (128, 32, -1)]

    def without_inputs(self) -> RTN:
        if self.a_bits is not None:
            raise TersorError(f"a_bits {self.a_bits} does not go with --embeddings: a table has no inputs to round")
        return self

    def compress_block(self, block: Block) -> None:
        self.check_block(block)

        def solve(name: str) -> tuple[Solution, str]:
            solution = solve_rtn(
                weight_matrix(block.linears[name]).to(block.hessian_dtype),
                bits=self.bits,
                group_size=self.group_size,
                sym=self.sym,
                clip_search=ClipSearch() if self.mse else None,
                stored=block.stored,
            )
            return replace(solution, a_bits=self.a_bits), ""

        block.solve(solve)

    def quantization(self) -> UniformGrids:
        return UniformGrids(width_of(self.bits), self.group_size, self.sym, a_bits=self.a_bits)
