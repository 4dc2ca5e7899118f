"""GPTQ for one weight matrix: quantize column after column, letting the columns that remain make up for the error.

minimise ‖W X - Q X‖² over Q on a per-row grid, given H = 2/N · X Xᵀ (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ", ICLR 2023,
algorithm 1). Rows are independent, so everything below is vectorized over them. W, Q [rows, columns]; H [columns, columns];
U is the upper Cholesky factor of the inverse, H⁻¹ = Uᵀ U.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.grid import Bits, ClipSearch, Grid, Stored, dequantize, fit_grid, quantize
from tersor.formats.quantized_weight import QuantizedWeight, natural_groups

DAMPING_STEPS = (1, 10, 100, 1000)  # multiples of `damp` that are tried in turn where H is not positive definite


@dataclass(frozen=True)
class Solution:
    """codes [rows, columns]; scales, zeros [rows, groups]; g_idx [columns], the group of every original column.

    error: Σ (w - q)² / (2 U_ii²), which equals ½ Σ_rows dᵀ (H + damp·I) d with d = W - Q.
    damp: the fraction of the mean diagonal that was added to it in the end. in_float64: whether H could be inverted in this
    precision only.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: Bits
    error: float
    damp: float
    in_float64: bool = False

    def dequantize(self) -> Tensor:
        """The weight that a reader of the packed result gets back, [rows, columns]."""
        return dequantize(self.codes, self.scales[:, self.g_idx], self.zeros[:, self.g_idx], self.bits)

    def pack(self, group_size: int, stored: Stored | None) -> QuantizedWeight:
        """The packed weight. Symmetric ternary levels -s, 0, s are 2-bit codes 1, 2, 3: the zero point of all symmetric grids."""
        scales = self.scales if stored is None else self.scales.to(stored.scale_dtype)
        codes, zeros, bits = self.codes, self.zeros, self.bits
        if bits == "ternary":
            codes, zeros, bits = codes + 1, torch.full_like(zeros, 2), 2
        return QuantizedWeight.from_codes(
            codes, scales.t(), zeros.t(), bits=bits, group_size=group_size, g_idx=self.g_idx
        )


def solve_gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: Bits,
    group_size: int = -1,
    sym: bool = False,
    desc_act: bool = False,
    static_groups: bool = False,
    clip_search: ClipSearch | None = None,
    damp: float = 0.01,
    block_size: int = 128,
    stored: Stored | None = None,
    grid: Grid | None = None,
) -> Solution:
    """Solve one layer in the Hessian's dtype and on its device. Neither argument is changed.

    grid: the rows' grids, where they are not to be fitted here (with group_size=-1).

    Raises TersorError where H cannot be made positive definite.
    """
    W, H = weight.detach().to(hessian.device, hessian.dtype, copy=True), hessian.clone()
    rows, columns = W.shape
    size = columns if group_size == -1 else group_size

    def fit(x: Tensor) -> Grid:
        return fit_grid(x, bits, sym=sym, clip_search=clip_search, stored=stored)

    whole = (grid or fit(W)) if group_size == -1 else None  # before dead columns are zeroed, as in the reference
    diagonal = H.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    W[:, dead] = 0

    groups = natural_groups(columns, group_size).to(W.device)  # of every column, in the order of solving once permuted
    scales = W.new_empty(rows, -(-columns // size))
    zeros = torch.empty_like(scales)
    if whole is not None:
        scales, zeros = whole.scale, whole.zero
    elif static_groups:
        for group in range(scales.shape[1]):
            _store(scales, zeros, group, fit(W[:, group * size : (group + 1) * size]))
    fit_in_loop = whole is None and not static_groups

    order = torch.argsort(diagonal, descending=True) if desc_act else torch.arange(columns, device=W.device)
    inverse_order = torch.argsort(order)
    if desc_act:
        W, H = W[:, order], H[order][:, order]
        if static_groups:
            groups = groups[order]
    U, damp, in_float64 = inverse_cholesky(H, damp)

    codes = torch.empty_like(W)
    error = W.new_zeros(())
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        if fit_in_loop:
            # A group is fitted on W, which has the corrections of earlier blocks but not those of this block's own columns.
            # That is how the reference does it, and it makes every grid of the block known before its columns are solved.
            for first in range(-(-start // size) * size, end, size):
                _store(scales, zeros, first // size, fit(W[:, first : first + size]))
        block = slice(start, end)
        scale, zero = scales[:, groups[block]], zeros[:, groups[block]]
        codes[:, block], scaled_errors = solve_block(W[:, block], U[block, block], scale, zero, bits)
        error += scaled_errors.square().sum() / 2
        W[:, end:] -= scaled_errors @ U[block, end:]

    return Solution(
        codes=codes[:, inverse_order].to(torch.uint8),
        scales=scales,
        zeros=zeros,
        g_idx=groups[inverse_order],
        bits=bits,
        error=float(error),
        damp=damp,
        in_float64=in_float64,
    )


def solve_block(W: Tensor, U: Tensor, scale: Tensor, zero: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """The columns of one block, one after another; all grids are known. The loop that a fused kernel can replace.

    W, scale, zero [rows, width], U [width, width]. Returns codes and errors (w - q) / U_ii, both [rows, width].
    """
    W = W.clone()
    codes, scaled_errors = torch.empty_like(W), torch.empty_like(W)
    for i in range(W.shape[1]):
        w = W[:, i]
        codes[:, i] = quantize(w, scale[:, i], zero[:, i], bits)
        scaled_errors[:, i] = (w - dequantize(codes[:, i], scale[:, i], zero[:, i], bits)) / U[i, i]
        W[:, i:] -= torch.outer(scaled_errors[:, i], U[i, i:])
    return codes, scaled_errors


def inverse_cholesky(H: Tensor, damp: float) -> tuple[Tensor, float, bool]:
    """U upper triangular with (H + damp · mean(diag H) · I)⁻¹ = Uᵀ U, the damping that it took, and whether it took float64.

    With R upper triangular and H = R Rᵀ (a Cholesky factorization from the last row up), U = R⁻¹: one factorization and one
    triangular inverse where the textbook inverts and factorizes again, and fewer digits lost.
    """
    mean = H.diagonal().mean()
    for factor in DAMPING_STEPS:
        for dtype in (H.dtype, torch.float64):
            damped = H.to(dtype, copy=True)
            damped.diagonal().add_(mean.to(dtype), alpha=factor * damp)
            lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if int(info) == 0:
                identity = torch.eye(H.shape[0], dtype=dtype, device=H.device)
                U = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).to(H.dtype)
                if bool(torch.isfinite(U).all()):
                    return U, factor * damp, dtype != H.dtype
    raise TersorError(
        f"the Hessian cannot be inverted even with damping {DAMPING_STEPS[-1] * damp:g}; "
        f"use more calibration samples or a damping above {damp:g}"
    )


def solve_rtn(
    weight: Tensor,
    *,
    bits: Bits,
    group_size: int = -1,
    sym: bool = False,
    clip_search: ClipSearch | None = None,
    stored: Stored | None = None,
) -> Solution:
    """Round to nearest on the same grids: the yardstick that every method has to beat. Error is ½ ‖W - Q‖²."""
    W = weight.detach()
    columns = W.shape[1]
    size = columns if group_size == -1 else group_size
    grids = [
        fit_grid(W[:, first : first + size], bits, sym=sym, clip_search=clip_search, stored=stored)
        for first in range(0, columns, size)
    ]
    scales, zeros = torch.cat([g.scale for g in grids], 1), torch.cat([g.zero for g in grids], 1)
    groups = natural_groups(columns, group_size).to(W.device)
    codes = quantize(W, scales[:, groups], zeros[:, groups], bits)
    solution = Solution(codes.to(torch.uint8), scales, zeros, groups, bits, 0.0, 0.0)
    return Solution(
        **{**solution.__dict__, "error": float((W - solution.dequantize()).square().sum() / 2)},
    )


def _store(scales: Tensor, zeros: Tensor, group: int, grid: Grid) -> None:
    scales[:, group], zeros[:, group] = grid.scale[:, 0], grid.zero[:, 0]
