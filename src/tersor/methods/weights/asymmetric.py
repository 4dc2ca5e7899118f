"""Asymmetric calibration: weights whose outputs, on the compressed model's inputs, come closest to the original's outputs.

GPTQ compares a solved layer with the original weights on the same inputs x, which come from the compressed layers before it.
What those layers lost stays lost. Here the target is the original layer's output on its own inputs x₀:

    min ‖W X₀ - Q X‖² + λ ‖W - Q‖²         λ = damp · mean(diag H), as GPTQ damps
    = min tr (Q - W*) (H + λ I) (Q - W*)ᵀ + const
    W* = W + W D (H + λ I)⁻¹               H = 2/N · X Xᵀ,  D = 2/N · (X₀ - X) Xᵀ

So GPTQ's own solver finds the integers when it is given W* for W: with the same factor, the same damping, and grids fitted to
W*. Where the inputs are equal, D is 0 and the result is GPTQ's, bit for bit. The full correction can follow the calibration
samples too closely. A share of it, `W + share · W D (H + λ I)⁻¹`, aims at the original's outputs on inputs between both.

GPTAQ (arXiv 2504.02692), Qronos (arXiv 2505.11695) and similar methods have the same objective. In GPTAQ only later columns
make up for a column's deviation. Here all do, which is the minimum of the objective before rounding. No code was read.
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
