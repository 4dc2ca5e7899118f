"""SparseGPT: one-shot pruning with second-order information (Frantar, Alistarh, ICML 2023, arXiv 2301.00774).

What it is for: it removes half of the weights of a large language model at little loss, without training; if asked in the
pattern 2:4, which GPUs multiply faster. With `bits` it also quantizes the weights that stay, in the same pass, so that pruning
and rounding make up for each other's errors.

    tersor compress sparsegpt demo --sparsity 0.5 --out demo-sparse
    tersor compress sparsegpt demo --pattern 2:4 --bits 4 --out demo-2:4-4bit

It uses GPTQ's statistics and solver, layer by layer. In blocks of 128 columns, the weights with the least w² / U_jj² go, and
the columns that remain make up for each (`sparse_solver.py`). Without bits the result is the model's own checkpoint with zeros
in it. It takes as much disk (compressed-tensors 0.20 no longer reads sparse files), and engines gain only where they know the
pattern. With bits it is a quantized checkpoint like any other; a zero is stored exactly.

Origin: IST-DASLab/sparsegpt (Apache-2.0), not copied. There, one weight more than asked goes in each block, the quantizer is
fitted to the whole row, and all layers of a block are pruned on the original block's inputs (except with its option
`true_sequential`). Here the count is exact, `group_size` is GPTQ's, and later layers of a block see the outputs of pruned ones.

Proven: the pattern and the count are exact; the update of one removed weight is the optimal one; with sparsity 0 the result is
GPTQ's bit for bit; saved results load in transformers. Measured: benchmarks/results/sparsity.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from tersor.errors import TersorError
from tersor.formats.grid import Bits
from tersor.formats.layout import Layout, UniformGrids
from tersor.layers.linear_map import weight_matrix
from tersor.methods.block import Block, Statistics
from tersor.methods.method import option, register
from tersor.methods.solution import AnySolution
from tersor.methods.weights.factors import Factors
from tersor.methods.weights.sparse_solver import solve_sparse
from tersor.methods.weights.sparsity import HALF, SPARSITY_HELP, Pruning, is_sparsity
from tersor.methods.weights.uniform import bits_option, check_grid, group_size_option, sym_option, width_of

GROUP_SIZE = 128


@register
@dataclass(frozen=True)
class SparseGPT(Pruning):
    """Remove weights with error compensation, and quantize what stays where `bits` is given."""

    name: ClassVar[str] = "sparsegpt"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/pruning-unstructured",
        "inference/pruning-semi",
        "inference/pruning-post-training",
        "practical/pruning",
        "inference/quantization-ptq",
    )

    sparsity: float = option(HALF, SPARSITY_HELP, check=is_sparsity, allowed="0 or more, below 1")
    bits: Bits | None = bits_option(None, "{}: quantize what stays, too")
    group_size: int = group_size_option(GROUP_SIZE, "with bits: {}")
    sym: bool = sym_option("with bits: {}")
    damp: float = option(0.01, "added to the Hessian's diagonal, as a fraction of its mean", above=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is None and self.sparsity == 0:
            raise TersorError("sparsity=0 without bits changes nothing: give one of them")
        if self.bits is None and (self.group_size != GROUP_SIZE or not self.sym):
            given = f"group_size={self.group_size}" if self.group_size != GROUP_SIZE else "sym=False"
            raise TersorError(f"{given} does nothing without bits: give bits, or leave it out")

    @property
    def layouts(self) -> tuple[str, ...]:
        return ("safetensors",) if self.bits is None else ("gptq", "gptq_v2", "compressed-tensors")

    def check_linear(self, name: str, out_features: int, in_features: int, layout: Layout | None) -> None:
        super().check_linear(name, out_features, in_features, layout)
        if self.bits is not None:
            check_grid(name, self.bits, self.group_size, self.sym, out_features, in_features, layout)

    def compress_block(self, block: Block) -> None:
        for names in block.order.groups:
            for statistics in block.hessians(names):
                factors = Factors(block.device, damp=self.damp)
                block.solve(partial(self._solve, block, statistics, factors), statistics)

    def _solve(
        self, block: Block, statistics: Mapping[str, Statistics], factors: Factors, name: str
    ) -> tuple[AnySolution, str]:
        factor, informed = factors.of(statistics[name].hessian)
        solution = solve_sparse(
            weight_matrix(block.linears[name]),
            factor,
            self.pruner,
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            stored=block.stored,
        )
        notes = []
        if statistics[name].tokens == 0:
            instead = "solved with the mean of its layer's experts" if informed else "pruned by magnitude"
            notes.append(f"no calibration token reached it: {instead}")
        if solution.damp != self.damp:
            notes.append(f"damping raised to {solution.damp:g}")
        return solution, "; ".join(notes)

    def quantization(self) -> UniformGrids | None:
        if self.bits is None:
            return None
        return UniformGrids(width_of(self.bits), self.group_size, self.sym, true_sequential=True, damp=self.damp)
