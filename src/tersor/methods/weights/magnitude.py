"""Pruning by magnitude: the smallest weights of each layer become zero. The baseline that other methods have to beat.

    tersor compress magnitude demo --sparsity 0.3 --out demo-sparse

It needs no samples. Unstructured: from all weights of a layer together; in the pattern n:m, from every m consecutive inputs.

Proven: the pattern and the count are exact; what stays is untouched. Measured: benchmarks/results/sparsity.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersor.formats.grid import Stored
from tersor.formats.layout import Layout
from tersor.layers.linear_map import weight_matrix
from tersor.methods.block import Block
from tersor.methods.method import BlockMethod, check_options, option, register
from tersor.methods.solution import DenseSolution, dense_solution
from tersor.methods.weights.sparsity import (
    HALF,
    PATTERN_HELP,
    PATTERNS,
    SPARSITY_HELP,
    UNSTRUCTURED,
    Pruner,
    check_pattern,
    check_removes,
    check_width,
    is_sparsity,
    zeros_in,
)


@register
@dataclass(frozen=True)
class Magnitude(BlockMethod):
    """Remove the smallest weights of each layer; needs no calibration."""

    name: ClassVar[str] = "magnitude"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/pruning-unstructured",
        "inference/pruning-semi",
        "practical/pruning",
    )
    layouts: ClassVar[tuple[str, ...]] = ("safetensors",)
    needs_samples: ClassVar[bool] = False

    sparsity: float = option(HALF, SPARSITY_HELP, check=is_sparsity, allowed="above 0, below 1")
    pattern: str = option(
        UNSTRUCTURED, PATTERN_HELP, check=lambda v: v in PATTERNS, allowed=" or ".join(map(repr, PATTERNS))
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_removes(self.sparsity)
        check_pattern(self.sparsity, self.pattern)

    def check_linear(self, name: str, out_features: int, in_features: int, layout: Layout | None) -> None:
        check_width(name, in_features, self.pattern)

    def compress_block(self, block: Block) -> None:
        def solve(name: str) -> tuple[DenseSolution, str]:
            pruner = Pruner(self.sparsity, self.pattern)
            return prune(weight_matrix(block.linears[name]), pruner, block.stored), ""

        block.solve(block.linears, solve, -1, tokens={})


def prune(weight: Tensor, pruner: Pruner, stored: Stored | None) -> DenseSolution:
    """weight [rows, columns]. error: ½ ‖W - Ŵ‖²."""
    W = weight.detach()
    gone = pruner.removed(W.float().abs())
    kept = W.masked_fill(gone, 0)
    error = float(W.float().masked_fill(~gone, 0).square().sum() / 2)
    return dense_solution(kept, stored, error=error, sparsity=zeros_in(kept))
