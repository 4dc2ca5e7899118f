"""SparseGPT for one weight matrix: remove weights column after column, letting the columns that remain make up for it.

minimise ‖W X - Ŵ X‖² over the weights that stay, given H = 2/N · X Xᵀ (Frantar, Alistarh: "SparseGPT", ICML 2023, algorithm
1). W, Ŵ [rows, columns]; H [columns, columns]. The mathematics is GPTQ's (`gptq_solver.py`). A weight that goes gets the
level zero; one that stays is rounded, or keeps its value where nothing is rounded. With U the upper Cholesky factor of H⁻¹,
removing w_ij costs w_ij² / U_jj² when column j has its turn. U_jj² is the j-th diagonal entry of the inverse of H over the
columns from j on. The cheapest weights go: of a block of columns over all rows, chosen at its first column; or of every group
of a pattern n:m, chosen at the group's first column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.formats.grid import Bits, Stored
from tersor.methods.solution import AnySolution, dense_solution
from tersor.methods.weights.gptq_solver import (
    BLOCK_SIZE,
    Factor,
    inverse_diagonal_blocks,
    solve_factorized,
)
from tersor.methods.weights.sparsity import Pruner, zeros_in


def solve_sparse(
    weight: Tensor,
    factor: Factor,
    pruner: Pruner,
    *,
    bits: Bits | None = None,
    group_size: int = -1,
    sym: bool = False,
    block_size: int = BLOCK_SIZE,
    stored: Stored | None = None,
) -> AnySolution:
    """Solve one layer in the Hessian's dtype, its columns in their own order. bits: round what stays to grids, as
    `solve_factorized` does, in the same pass; None leaves it in plain numbers. The weight is not changed.

    error: Σ (w - ŵ)² / (2 U_jj²) with w as it was when its turn came, which equals ½ Σ_rows dᵀ (H + damp·I) d with d = W - Ŵ.
    """
    if bits is not None:
        return solve_factorized(
            weight,
            factor,
            bits=bits,
            group_size=group_size,
            sym=sym,
            block_size=block_size,
            stored=stored,
            pruner=pruner if pruner.sparsity else None,
        )
    R = factor.R
    W = weight.detach().to(R.device, R.dtype, copy=True).masked_fill_(factor.dead, 0)
    found, D, errors = torch.empty_like(W), torch.empty_like(W), W.new_zeros(len(W))
    for n, U in enumerate(inverse_diagonal_blocks(R, block_size)):
        start = n * block_size
        block = slice(start, start + len(U))
        now = torch.addmm(W[:, block], D[:, :start] @ R[:start, block], U) if start else W[:, block]
        found[:, block] = prune_block(now, U, pruner, errors, first=start)
        D[:, block] = W[:, block] - found[:, block]
    return dense_solution(found, stored, error=float(errors.sum()), damp=factor.damp, sparsity=zeros_in(found))


def prune_block(W: Tensor, U: Tensor, pruner: Pruner, errors: Tensor, *, first: int) -> Tensor:
    """The columns of one block [rows, width] after pruning. Adds to errors [rows]. first: the number of the block's first
    column."""
    w = W.t().clone(memory_format=torch.contiguous_format)  # columns as rows, since one after another is read
    costs = U.diagonal().square()
    kept = torch.empty_like(w)
    gone = torch.zeros_like(w, dtype=torch.bool)
    step = pruner.step(len(w))
    for i in range(len(w)):
        if i % step == 0:
            group = slice(i, i + step)
            gone[group] = pruner.removed(w[group].t().square() / costs[group], first + i).t()
        kept[i] = w[i].masked_fill(gone[i], 0)
        error = (w[i] - kept[i]) / U[i, i]
        errors += error.square() / 2
        w[i:] -= torch.outer(U[i, i:], error)
    return kept.t()
