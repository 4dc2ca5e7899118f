"""Wanda: pruning by weights and activations (Sun, Liu, Bair, Kolter, ICLR 2024, arXiv 2306.11695).

What it is for: a quick way to remove weights; the others stay as they are. `sparsegpt` changes the others, and mostly loses
less at high sparsity.

    tersor compress wanda demo --sparsity 0.5 --out demo-sparse

A weight's score is |W_ij| · ‖X_j‖₂, with the norm of its input over all tokens of the samples. In every row, that is for every
output, the lowest go; in the pattern n:m, those of every m consecutive inputs.

Origin: locuslab/wanda (MIT), not copied. As there, all layers of a block are scored on their inputs in the original block.
There is one exception: experts whose statistics do not fit into memory together take turns, and a later turn sees the layers
that were pruned before.

Proven: the pattern and the count of every row are exact; what stays is untouched; saved results load in transformers. Measured:
benchmarks/results/sparsity.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from tersor.formats.grid import Stored
from tersor.layers.linear_map import weight_matrix
from tersor.methods.block import Block, Statistics
from tersor.methods.method import register
from tersor.methods.solution import DenseSolution, dense_solution
from tersor.methods.weights.sparsity import UNSTRUCTURED, Pruner, Pruning, lowest, zeros_in


@register
@dataclass(frozen=True)
class Wanda(Pruning):
    """Remove the weights with the least product of size and input norm, row by row; the others stay as they are."""

    name: ClassVar[str] = "wanda"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/pruning-unstructured",
        "inference/pruning-semi",
        "inference/pruning-post-training",
        "practical/pruning",
    )

    def compress_block(self, block: Block) -> None:
        names = [name for group in block.order.groups for name in group]
        for statistics in block.hessians(names):
            block.solve(partial(self._solve, block, statistics), statistics)

    def _solve(self, block: Block, statistics: Mapping[str, Statistics], name: str) -> tuple[DenseSolution, str]:
        H = statistics[name].hessian
        solution = prune(weight_matrix(block.linears[name]), H, self.pruner, block.stored)
        unseen = "no calibration token reached it: pruned by magnitude" if not bool(H.any()) else ""
        return solution, unseen


def prune(weight: Tensor, hessian: Tensor, pruner: Pruner, stored: Stored | None) -> DenseSolution:
    """weight [rows, columns]; hessian [columns, columns], whose diagonal is ‖X_j‖₂² times a constant. error: ½ Σ_rows dᵀ H d
    with d the weights that go."""
    H = hessian.to(weight.device)
    W = weight.detach().to(H.dtype)
    norms = H.diagonal().sqrt() if bool(H.any()) else H.new_ones(len(H))
    scores = W.abs() * norms
    if pruner.pattern == UNSTRUCTURED:
        gone = lowest(scores, round(pruner.sparsity * W.shape[1]))
    else:
        gone = pruner.removed(scores)
    D = W.masked_fill(~gone, 0)
    kept = W.masked_fill(gone, 0)
    return dense_solution(kept, stored, error=float(((D @ H) * D).sum() / 2), sparsity=zeros_in(kept))
