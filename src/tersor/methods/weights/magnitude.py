"""Pruning by magnitude: the smallest weights of each layer become zero. The baseline that other methods have to beat.

    tersor compress magnitude demo --sparsity 0.3 --out demo-sparse

It needs no samples. Unstructured, the smallest of all weights of a layer go; in a pattern n:m, those of every m consecutive
inputs.

Proven: the pattern and the count are exact; what stays is untouched. Measured: benchmarks/results/sparsity.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersor.formats.grid import Stored
from tersor.layers.linear_map import weight_matrix
from tersor.methods.block import Block
from tersor.methods.method import register
from tersor.methods.solution import DenseSolution, dense_solution
from tersor.methods.weights.sparsity import Pruner, Pruning, zeros_in


@register
@dataclass(frozen=True)
class Magnitude(Pruning):
    """Remove the smallest weights of each layer; needs no calibration."""

    name: ClassVar[str] = "magnitude"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/pruning-unstructured",
        "inference/pruning-semi",
        "practical/pruning",
    )
    needs_samples: ClassVar[bool] = False

    def compress_block(self, block: Block) -> None:
        def solve(name: str) -> tuple[DenseSolution, str]:
            return prune(weight_matrix(block.linears[name]), self.pruner, block.stored), ""

        block.solve(solve)


def prune(weight: Tensor, pruner: Pruner, stored: Stored | None) -> DenseSolution:
    """weight [rows, columns]. error: ½ ‖W - Ŵ‖²."""
    W = weight.detach()
    gone = pruner.removed(W.float().abs())
    kept = W.masked_fill(gone, 0)
    error = float(W.float().masked_fill(~gone, 0).square().sum() / 2)
    return dense_solution(kept, stored, error=error, sparsity=zeros_in(kept))
