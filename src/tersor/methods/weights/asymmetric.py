"""Asymmetric calibration: the weights whose outputs on the compressed model's inputs come closest to the original's.

GPTQ solves a layer so that it gives on the inputs x that the compressed layers before it make what the original weights give on
these same inputs. What those layers lost stays lost. Here the target is what the original gives on its own inputs x₀:

    min ‖W X₀ - Q X‖² + λ ‖W - Q‖²         λ = damp · mean(diag H), as GPTQ damps
    = min tr (Q - W*) (H + λ I) (Q - W*)ᵀ + const
    W* = W + W D (H + λ I)⁻¹               H = 2/N · X Xᵀ,  D = 2/N · (X₀ - X) Xᵀ

so GPTQ's own solver, given W* for W, finds the integers: with the same factor, the same damping, and grids fitted to W*. Where
the inputs are equal, D is 0 and the result GPTQ's, bit for bit. A part of the correction, `W + share · W D (H + λ I)⁻¹`, aims at
what the original gives on inputs between both: all of it can follow the calibration samples too closely.

The objective is that of GPTAQ (arXiv 2504.02692), Qronos (arXiv 2505.11695) and their kin. GPTAQ lets only columns that come
later make up for a column's deviation; here all do, which is the least of the objective before anything is rounded. No code was
read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.methods.weights.gptq_solver import Factor


def asymmetric_target(weight: Tensor, deviation: Tensor, factor: Factor, share: float) -> Tensor:
    """W + share · W D (R Rᵀ)⁻¹ [rows, columns]; deviation: D [columns, columns]."""
    W = weight.detach().to(factor.R.device, factor.R.dtype)
    missing = (W @ deviation.to(W.device, W.dtype))[:, factor.order]
    half = torch.linalg.solve_triangular(factor.R.t(), missing, upper=False, left=False)  # M R⁻ᵀ
    change = torch.empty_like(W)
    change[:, factor.order] = torch.linalg.solve_triangular(factor.R, half, upper=True, left=False)
    return W + share * change
