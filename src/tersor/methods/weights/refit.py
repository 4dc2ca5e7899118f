"""Better grids for GPTQ, from the Hessian: how much each column counts, and which steps fit the chosen integers best.

`column_weights`: the cost of one unit of squared error in a column at its turn, when all later columns can still make up for
it. It is R_jj² = 1 / (H⁻¹)_jj over the columns from j on (H = R Rᵀ, upper triangular). GPTQ's own loss is ½ Σ_j e_j² R_jj² with
the rounding errors e_j, so a search with these weights finds the range that minimizes it.

`refit_scales`: with the integers L = codes - zero fixed, ‖(W - s L) X‖² is quadratic in a row's steps s, one per group:

    A_gg' = L_g H_gg' L_g'ᵀ,   b_g = L_g (H Wᵀ)_g,   (A + ridge) s = b + ridge · s_old

It is solved for all rows at once. The solver then finds integers for the new steps, and keeps the better solution of each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUMBERS = 1 << 26  # projected integers in memory at once
RIDGE = 1e-4  # of the mean diagonal of A; it keeps the step of a group whose integers are all 0


def column_weights(R: Tensor, order: Tensor) -> Tensor:
    """[columns], in the columns' own order."""
    weights = torch.empty_like(R.diagonal())
    weights[order] = R.diagonal().square()
    return weights


def refit_scales(W: Tensor, L: Tensor, scales: Tensor, groups_of: Tensor, R: Tensor) -> Tensor:
    """Steps [rows, groups] that fit the integers L [rows, columns] best, all positive. W [rows, columns] is the original weight,
    H = R Rᵀ, groups_of [columns] each column's group; all in one order of the columns."""
    groups = scales.shape[1]
    by_group = torch.argsort(groups_of, stable=True)
    half = R[by_group]  # H = half halfᵀ, in the order of the groups
    parts = torch.split(half, torch.bincount(groups_of, minlength=groups).tolist())
    at_once = max(1, NUMBERS // (groups * W.shape[1]))
    rows = (range(first, min(first + at_once, len(W))) for first in range(0, len(W), at_once))
    W, L = W[:, by_group], L[:, by_group]
    return torch.cat(
        [_refit(W[r.start : r.stop], L[r.start : r.stop], scales[r.start : r.stop], parts, half) for r in rows]
    )


def _refit(W: Tensor, L: Tensor, scales: Tensor, parts: tuple[Tensor, ...], half: Tensor) -> Tensor:
    """The same for some rows. half: H = half halfᵀ. parts: its rows, group by group."""
    sizes = [len(part) for part in parts]
    projected = torch.stack([mine @ part for mine, part in zip(torch.split(L, sizes, 1), parts, strict=True)], 1)
    target = (W @ half)[:, :, None]  # [rows, columns, 1]
    A = projected @ projected.transpose(1, 2)  # [rows, groups, groups]
    b = projected @ target
    ridge = RIDGE * A.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(A.dtype).tiny)
    A.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    found = torch.linalg.solve(A, b + ridge[:, None, None] * scales[:, :, None])[:, :, 0]
    return torch.where((found > 0) & torch.isfinite(found), found, scales)
