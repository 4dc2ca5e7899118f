"""GPTQ: one-shot weight quantization with second-order information (Frantar et al., ICLR 2023, arXiv 2210.17323).

Layer by layer, columns are rounded one after another. The columns that remain make up for the error of each, weighted by the
inverse Hessian of the layer's inputs. `gptq_solver.py` has the mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.grid import ClipSearch, Stored
from tersor.formats.layout import Layout, UniformGrids
from tersor.layers.experts import ExpertMap
from tersor.layers.linear_map import weight_matrix
from tersor.methods.block import Block, Statistics
from tersor.methods.method import Method, option, register
from tersor.methods.weights.asymmetric import asymmetric_target
from tersor.methods.weights.factors import Factors
from tersor.methods.weights.gptq_solver import Factor, Solution, factorize_outputs, solve_factorized
from tersor.methods.weights.output_factor import OutputFactor
from tersor.methods.weights.rtn import RTN
from tersor.methods.weights.uniform import OnGrids, width_of

# On texts of another kind than the one that calibrates, 2,048 tokens were worse than rounding in 10 of 12 cells at 4 and 3 bits,
# 8,192 better in 19 of 24 (benchmarks/results/calibration_size.md, on layers 384 and 1,024 wide: wider ones need no less).
TOKENS_THAT_PAY = 8192
OUTPUT_DAMP = (
    1.0  # of H_O, a share of its mean diagonal: it is known from few draws, and its errors are not made up for
)


@register
@dataclass(frozen=True)
class GPTQ(OnGrids):
    """Quantize to `bits` with error compensation from calibration samples."""

    name: ClassVar[str] = "gptq"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/quantization-ptq",
        "inference/quantization-uniform",
        "inference/quantization-granularity",
        "inference/quantization-mixed",
        "inference/quantization-binary",
        "inference/quantization-llm",
        "practical/quantization",
    )

    desc_act: bool = option(False, "solve the columns with the largest activations first")
    static_groups: bool = option(False, "fit all groups beforehand, so that desc_act costs nothing at inference")
    true_sequential: bool = option(
        True, "within a block, let later layers see the inputs that the quantized earlier ones make"
    )
    damp: float = option(0.01, "added to the Hessian's diagonal, as a fraction of its mean", above=0, below=1)
    mse: bool = option(False, "search for the clipping range with the least error in each group")
    weighted: bool = option(False, "the same, with errors counted as the Hessian counts them")
    asymmetric: float = option(
        0.0, "how much of what the layers before it lost each layer makes up for, from 0 to 1 (all)", least=0, most=1
    )
    output_factor: bool = option(
        False, "let errors of a layer's outputs make up for each other, by what they cost the model's predictions"
    )
    refits: int = option(
        0, "how often the steps are fitted to the integers anew, and the integers to the steps", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mse and self.weighted:
            raise TersorError("mse and weighted are two ways to search for the same ranges: choose one")
        if self.refits and self.output_factor:
            raise TersorError("refits works on each row alone, output_factor on all rows together: choose one")

    @property
    def compares(self) -> bool:
        return self.asymmetric > 0

    @property
    def weighs_outputs(self) -> bool:
        return self.output_factor

    @classmethod
    def recipes(cls, kind: str) -> Sequence[Sequence[Method]]:
        best = {"desc_act": True, "static_groups": True, "weighted": True}
        few = [cls(bits=bits, group_size=group, **best) for bits in (4, 3, 2) for group in (128, 32)]
        return [[each] for each in (cls(bits=8), cls(bits=8, group_size=-1), *few)]

    def remark_on(self, tokens: int) -> str | None:
        if self.bits not in (3, 4) or self.weighted or tokens >= TOKENS_THAT_PAY:
            return None
        return (
            f"{tokens:,} calibration tokens are few: at {self.bits} bits, other kinds of text may lose more than by rounding; "
            f"{TOKENS_THAT_PAY:,} tokens or --desc-act --static-groups --weighted help"
        )

    def without_inputs(self) -> RTN:
        """Rounding to nearest on the same grids: an embedding has no inputs, so there is no Hessian."""
        mse = self.mse or self.weighted
        return RTN(
            bits=self.bits, group_size=self.group_size, sym=self.sym, a_bits=self.a_bits, mse=mse
        ).without_inputs()

    def check_linear(self, name: str, out_features: int, in_features: int, layout: Layout | None) -> None:
        super().check_linear(name, out_features, in_features, layout)
        scattered = self.desc_act and not self.static_groups and self.group_size != -1
        if scattered and layout is not None and not layout.scattered_groups:
            raise TersorError(
                f"--desc-act scatters the groups, which {layout.name} no longer has a place for: "
                "add --static-groups, or use --format gptq"
            )

    def compress_block(self, block: Block) -> None:
        self.check_block(block)
        groups = block.order.groups
        for names in groups if self.true_sequential else [[name for group in groups for name in group]]:
            for statistics in block.hessians(names):
                factors = Factors(block.device, damp=self.damp, desc_act=self.desc_act)
                block.solve(partial(self._solve, block, statistics, factors), statistics)

    def _solve(
        self, block: Block, statistics: Mapping[str, Statistics], factors: Factors, name: str
    ) -> tuple[Solution, str]:
        factor, informed = factors.of(statistics[name].hessian)
        weight, deviation = weight_matrix(block.linears[name]), statistics[name].deviation
        notes = []
        if self.compares and deviation is not None:
            weight = asymmetric_target(weight, deviation, factor, self.asymmetric)
        elif self.compares and statistics[name].tokens:
            notes.append("not asymmetric: the original's experts see other tokens")
        output = None
        if self.output_factor and name in block.outputs:
            output = factorize_outputs(block.outputs[name].to(factor.R), damp=OUTPUT_DAMP)
        elif self.output_factor:
            stacked = isinstance(block.linears[name], ExpertMap)
            notes.append(f"no output factor: {'experts are not watched' if stacked else 'no gradient reached it'}")
        solution = self.solution(weight, factor, block.stored, output)
        if statistics[name].tokens == 0:
            instead = "solved with the mean of its layer's experts" if informed else "rounded to nearest"
            notes.append(f"no calibration token reached it: {instead}")
        if solution.damp != self.damp:
            notes.append(f"damping raised to {solution.damp:g}")
        if solution.in_float64:
            notes.append("factorized in float64")
        return solution, "; ".join(notes)

    def solution(
        self, weight: Tensor, factor: Factor, stored: Stored | None, output: OutputFactor | None = None
    ) -> Solution:
        """Solve a weight [out, in]. factor: of its inputs' Hessian. stored: what the file keeps of a grid. output: of H_O."""
        solved = solve_factorized(
            weight,
            factor,
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            static_groups=self.static_groups,
            clip_search=ClipSearch(norm=2.0) if self.weighted else ClipSearch() if self.mse else None,
            weighted=self.weighted,
            refits=self.refits,
            stored=stored,
            output=output,
        )
        return replace(solved, a_bits=self.a_bits)

    def quantization(self) -> UniformGrids:
        return UniformGrids(
            bits=width_of(self.bits),
            group_size=self.group_size,
            sym=self.sym,
            desc_act=self.desc_act,
            static_groups=self.static_groups,
            true_sequential=self.true_sequential,
            damp=self.damp,
            a_bits=self.a_bits,
        )
