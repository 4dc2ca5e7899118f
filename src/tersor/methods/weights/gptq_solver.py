"""GPTQ for one weight matrix: quantize column after column, letting the columns that remain make up for the error.

minimise ‖W X - Q X‖² over Q on a per-row grid, given H = 2/N · X Xᵀ (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ", ICLR 2023,
algorithm 1). Rows are independent, so everything below is vectorized over them. W, Q [rows, columns]; H [columns, columns].

The paper works with U, the upper Cholesky factor of the inverse, H⁻¹ = Uᵀ U, and every solved block changes all columns that
remain. Here H is not inverted. With R upper triangular and H = R Rᵀ (a Cholesky factorization from the last row up), U = R⁻¹. A
block B of columns is brought up to date when its turn comes, from the errors D = W - Q of all columns S before it:

    W_B ← W_B + D_S R_SB R_BB⁻¹

This value of W_B minimises ‖D R‖ over the columns that remain. Within the block the paper's own steps follow, with U_BB =
R_BB⁻¹. So a layer costs one factorization beside its matmuls, and fewer digits are lost than by inverting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.grid import Bits, ClipSearch, Grid, Stored, as_stored, dequantize, fit_grid, quantize
from tersor.formats.quantized_weight import QuantizedWeight, natural_groups
from tersor.kernels import gptq_block, gptq_cpu
from tersor.methods.weights.output_factor import OutputFactor, solve_rows
from tersor.methods.weights.refit import column_weights, refit_scales
from tersor.methods.weights.sparsity import Pruner, zeros_in

BLOCK_SIZE = 128  # columns that are brought up to date at once
DAMPING_STEPS = (1, 10, 100, 1000)  # multiples of `damp` that are tried in turn where H is not positive definite


@dataclass(frozen=True)
class Solution:
    """A solved weight."""

    codes: Tensor  # [rows, columns]
    scales: Tensor  # [rows, groups]
    zeros: Tensor  # [rows, groups]
    g_idx: Tensor  # [columns], the group of every original column
    bits: Bits
    group_size: int  # columns that share a grid; -1: all
    # Σ (w - q)² / (2 U_ii²) with w as it was at its turn. This equals ½ Σ_rows dᵀ (H + damp·I) d with d = W - Q.
    error: float
    damp: float  # the fraction of the mean diagonal that was added to the diagonal in the end
    in_float64: bool = False  # whether H could be factorized only in this precision
    condition: float | None = None  # as in `Factor`; None where no H was factorized
    sparsity: float | None = None  # the share of zeros; None where the method does not prune
    a_bits: int | None = None  # to which the layer will round its inputs; None: it will not

    @property
    def width(self) -> int:
        """Bits of a code in a file."""
        return 2 if self.bits == "ternary" else self.bits

    def dequantize(self) -> Tensor:
        """The weight that a reader of the packed result gets back, [rows, columns]."""
        return dequantize(self.codes, self.scales[:, self.g_idx], self.zeros[:, self.g_idx], self.bits)

    def pack(self, stored: Stored | None) -> QuantizedWeight | None:
        """The packed weight. Symmetric ternary levels -s, 0, s become the 2-bit codes 1, 2, 3, with the zero point of all
        symmetric grids. None for ternary levels of two magnitudes, which no file format holds."""
        if self.bits == "ternary" and not torch.equal(self.scales, -self.zeros):
            return None
        scales = self.scales if stored is None else self.scales.to(stored.scale_dtype)
        codes, zeros, bits = self.codes, self.zeros, self.bits
        if bits == "ternary":
            codes, zeros, bits = codes + 1, torch.full_like(zeros, 2), 2
        weight = QuantizedWeight.from_codes(
            codes, scales.t(), zeros.t(), bits=bits, group_size=self.group_size, g_idx=self.g_idx
        )
        return replace(weight, a_bits=self.a_bits)


@dataclass(frozen=True)
class Factor:
    """What the solutions of all maps with one Hessian share."""

    dead: Tensor  # [columns], inputs that were always zero
    order: Tensor  # [columns], the columns in the order of solving
    R: Tensor  # [columns, columns], upper triangular: H + damp · mean(diag H) · I = R Rᵀ, rows and columns in that order
    damp: float
    in_float64: bool  # whether it took float64 to find R

    @property
    def condition(self) -> float:
        """A lower bound of the damped Hessian's condition number: (max r_ii / min r_ii)²."""
        diagonal = self.R.diagonal()
        return float((diagonal.max() / diagonal.min()).double().square())


def factorize(hessian: Tensor, *, damp: float = 0.01, desc_act: bool = False) -> Factor:
    """Damp and factorize H, which is not changed. Raises TersorError where H cannot be made positive definite."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal = torch.where(dead, torch.ones_like(diagonal), diagonal)
    order = torch.argsort(diagonal, descending=True) if desc_act else torch.arange(len(diagonal), device=hessian.device)
    last_first = order.flip(0)
    mean = diagonal.mean()
    for factor in DAMPING_STEPS:
        for dtype in (hessian.dtype, torch.float64):
            damped = hessian[last_first][:, last_first].to(dtype)
            damped.diagonal().copy_(diagonal[last_first]).add_(mean.to(dtype), alpha=factor * damp)
            lower, info = torch.linalg.cholesky_ex(damped)
            del damped
            if int(info) == 0 and bool(torch.isfinite(lower).all()):
                in_float64 = dtype != hessian.dtype
                return Factor(dead, order, lower.flip(0, 1).to(hessian.dtype), factor * damp, in_float64)
    raise TersorError(
        f"the Hessian cannot be factorized even with damping {DAMPING_STEPS[-1] * damp:g}; "
        f"use more calibration samples or a damping above {damp:g}"
    )


def factorize_outputs(hessian: Tensor, *, damp: float = 0.01) -> OutputFactor:
    """Damp and factorize H_O [rows, rows], which is not changed. Its scale does not matter. Raises as `factorize` does."""
    H = hessian / hessian.diagonal().mean()
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    R = factorize(H[order][:, order], damp=damp).R
    diagonal = R.diagonal()
    weights = diagonal.square()
    return OutputFactor(order, R / diagonal, weights / weights.mean())


def solve_gptq(
    weight: Tensor, hessian: Tensor, *, bits: Bits, damp: float = 0.01, desc_act: bool = False, **how: Any
) -> Solution:
    """Solve one layer in the Hessian's dtype and on its device. Neither argument is changed. how: as in `solve_factorized`.

    Raises TersorError where H cannot be made positive definite.
    """
    return solve_factorized(weight, factorize(hessian, damp=damp, desc_act=desc_act), bits=bits, **how)


def solve_factorized(
    weight: Tensor,
    factor: Factor,
    *,
    bits: Bits,
    group_size: int = -1,
    sym: bool = False,
    static_groups: bool = False,
    clip_search: ClipSearch | None = None,
    weighted: bool = False,
    refits: int = 0,
    block_size: int = BLOCK_SIZE,
    stored: Stored | None = None,
    grid: Grid | None = None,
    pruner: Pruner | None = None,
    output: OutputFactor | None = None,
) -> Solution:
    """As `solve_gptq`, for one of several layers that share their Hessian.

    weighted: the search for ranges weighs a column's errors by the Hessian. refits: how often steps are fitted to the integers
    again, and integers to the steps. grid: of the rows, where it is not to be fitted here (with group_size=-1). pruner: chooses
    weights that become zero (with the columns in their own order). output: what errors of the outputs cost together.
    """
    R, order = factor.R, factor.order
    W = weight.detach().to(R.device, R.dtype, copy=True)
    if output is not None:
        W = W[output.order]
    columns = W.shape[1]
    size = columns if group_size == -1 else group_size
    if weighted:
        W.masked_fill_(factor.dead, 0)  # so that they do not decide a range
    weights = column_weights(R, order).masked_fill(factor.dead, 0) if weighted else None

    def fit(x: Tensor, where: Tensor | slice) -> Grid:
        """where: the columns of x, in their own order."""
        known = None if weights is None else weights[where]
        best = gptq_cpu.best_grids if clip_search is not None and clip_search.norm == 2 and gptq_cpu.takes(x) else None
        return fit_grid(x, bits, sym=sym, clip_search=clip_search, stored=stored, weights=known, best=best)

    whole = (
        (grid or fit(W, slice(None))) if group_size == -1 else None
    )  # before dead columns are zeroed, as in the reference
    W.masked_fill_(factor.dead, 0)
    groups = natural_groups(columns, group_size, W.device)  # the group of every column, in the order of solving
    scales = W.new_empty(len(W), -(-columns // size))
    zeros = torch.empty_like(scales)
    if whole is not None:
        scales, zeros = whole.scale.contiguous(), whole.zero.contiguous()
    elif static_groups:
        for group in range(scales.shape[1]):
            inside = slice(group * size, (group + 1) * size)
            _store(scales, zeros, group, fit(W[:, inside], inside))
        groups = groups[order]
    in_kernel = pruner is None and output is None and gptq_block.has_kernel(W, block_size)
    fit_in_loop = whole is None and not static_groups
    fit_in_kernel = fit_in_loop and in_kernel and clip_search is None and gptq_block.can_fit(size, block_size, stored)
    grids = gptq_block.Grids(bits, sym, stored, size) if fit_in_kernel else gptq_block.Grids(bits)
    inverses = inverse_diagonal_blocks(R, block_size)
    ordered = W[:, order]
    codes, errors = _solve(
        ordered, R, inverses, scales, zeros, groups, grids, in_kernel,
        fit=(lambda x, first: fit(x, order[first : first + size])) if fit_in_loop and not fit_in_kernel else None, size=size,
        pruner=pruner, output=output,
    )  # fmt: skip
    for _ in range(refits):
        newer = _refitted(ordered, codes, scales, zeros, groups, R, bits, stored)
        new_zeros = -newer if bits == "ternary" else zeros
        found, less = _solve(ordered, R, inverses, newer, new_zeros, groups, gptq_block.Grids(bits), in_kernel)
        better = (less < errors)[:, None]
        codes, scales = torch.where(better, found, codes), torch.where(better, newer, scales)
        zeros, errors = torch.where(better, new_zeros, zeros), torch.minimum(less, errors)
    if output is not None:
        own_order = torch.argsort(output.order)
        codes, scales, zeros = codes[own_order], scales[own_order], zeros[own_order]
    inverse_order = torch.argsort(order)
    solution = Solution(
        codes=codes[:, inverse_order],
        scales=scales,
        zeros=zeros,
        g_idx=groups[inverse_order],
        bits=bits,
        group_size=group_size,
        error=float(errors.sum()),
        damp=factor.damp,
        in_float64=factor.in_float64,
        condition=factor.condition,
    )
    return solution if pruner is None else replace(solution, sparsity=zeros_in(solution.dequantize()))


def _solve(
    W: Tensor,
    R: Tensor,
    inverses: list[Tensor],
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    grids: gptq_block.Grids,
    in_kernel: bool,
    *,
    fit: Callable[[Tensor, int], Grid] | None = None,
    size: int = 0,
    pruner: Pruner | None = None,
    output: OutputFactor | None = None,
) -> tuple[Tensor, Tensor]:
    """The integers [rows, columns] and each row's loss. W: its columns in the order of solving. inverses: of R's diagonal blocks.

    fit(columns, first): fits the grid of the group that begins at a column, at its turn, and puts it into scales and zeros. None:
    these are given, or the kernel fits them.
    """
    columns, block_size = W.shape[1], len(inverses[0])
    D = torch.empty_like(W)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    errors = W.new_zeros(len(W))
    groups32 = groups.int()
    for n, start in enumerate(range(0, columns, block_size)):
        end = min(start + block_size, columns)
        block, width = slice(start, end), end - start
        # groups that begin in this block
        starting = () if fit is None else range(-(-start // size) * size, end, size)
        reach = max(end, min(starting[-1] + size, columns)) if starting else end
        upto = slice(start, reach)
        U = inverses[n] if reach == end else _inverse(R[upto, upto])
        now = torch.addmm(W[:, upto], D[:, :start] @ R[:start, upto], U) if start else W[:, upto]
        for first in starting:
            # A group is fitted to W as the blocks before this one left it, before this block's own columns change it. The
            # reference does the same. So every grid of the block is known before its columns are solved.
            assert fit is not None
            _store(scales, zeros, first // size, fit(now[:, first - start : first - start + size], first))
        now, U = now[:, :width], U[:width, :width]
        if in_kernel:
            gptq_block.solve_block(
                now, U, W[:, block], scales, zeros, groups32[block], codes[:, block], D[:, block], errors, grids
            )
        else:
            scale, zero, mine = scales[:, groups[block]], zeros[:, groups[block]], W[:, block]
            if output is not None:
                codes[:, block], levels, shift = solve_rows(mine, now, U, scale, zero, grids.bits, errors, output)
                D[:, block] = mine + shift - levels
                continue
            if pruner is None and gptq_cpu.takes(now):
                codes[:, block], levels = gptq_cpu.solve_block(now, U, scale, zero, grids.bits, errors)
            else:
                codes[:, block], levels = solve_block(now, U, scale, zero, grids.bits, errors, pruner, first=start)
            D[:, block] = mine - levels
    return codes, errors


def _refitted(
    W: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    R: Tensor,
    bits: Bits,
    stored: Stored | None,
) -> Tensor:
    """Steps that fit the integers best, in the precision of the file. All columns are in the order of solving."""
    middle = 1 if bits == "ternary" else zeros[:, groups]
    return as_stored(refit_scales(W, codes.to(W.dtype) - middle, scales, groups, R), stored)


def solve_block(
    W: Tensor,
    U: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: Bits,
    errors: Tensor,
    pruner: Pruner | None = None,
    *,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """The columns of one block, one after another; all grids are known. kernels/gptq_block.py does the same on a GPU, and
    kernels/gptq_cpu.py on a CPU.

    W, scale, zero [rows, width], U [width, width]. Returns codes and levels [rows, width]; adds to errors [rows].
    pruner: chooses weights that become zero before they are rounded; first: the number of the block's first column.
    """
    # One column after another is read and written, so columns are laid out as rows.
    w, scale, zero = (each.t().clone(memory_format=torch.contiguous_format) for each in (W, scale, zero))
    codes, levels = torch.empty_like(w), torch.empty_like(w)
    gone = torch.zeros_like(w, dtype=torch.bool)
    for i in range(len(w)):
        if pruner is not None and i % pruner.step(len(w)) == 0:
            group = slice(i, i + pruner.step(len(w)))
            gone[group] = pruner.removed(w[group].t().square() / U.diagonal()[group].square(), first + i).t()
        codes[i] = quantize(w[i].masked_fill(gone[i], 0) if pruner else w[i], scale[i], zero[i], bits)
        levels[i] = dequantize(codes[i], scale[i], zero[i], bits)
        error = (w[i] - levels[i]) / U[i, i]
        errors += error.square() / 2
        w[i:] -= torch.outer(U[i, i:], error)
    return codes.t().to(torch.uint8), levels.t()


def _inverse(R: Tensor) -> Tensor:
    """The inverse of upper triangular matrices [..., n, n]."""
    identity = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device).expand(R.shape)
    inverse: Tensor = torch.linalg.solve_triangular(R, identity, upper=True)
    return inverse.contiguous()  # torch.linalg returns columns that lie together


def inverse_diagonal_blocks(R: Tensor, size: int) -> list[Tensor]:
    """The inverses of R's blocks of `size` along its diagonal; the last may be smaller."""
    blocks = [R[start : start + size, start : start + size] for start in range(0, len(R), size)]
    whole = [block for block in blocks if len(block) == size]
    found = list(_inverse(torch.stack(whole))) if whole else []
    return [*found, *(_inverse(block) for block in blocks[len(whole) :])]


def solve_rtn(
    weight: Tensor,
    *,
    bits: Bits,
    group_size: int = -1,
    sym: bool = False,
    clip_search: ClipSearch | None = None,
    stored: Stored | None = None,
) -> Solution:
    """Round to nearest on the same grids: the baseline that every method has to beat. The error is ½ ‖W - Q‖²."""
    W = weight.detach()
    columns = W.shape[1]
    size = columns if group_size == -1 else group_size
    grids = [
        fit_grid(W[:, first : first + size], bits, sym=sym, clip_search=clip_search, stored=stored)
        for first in range(0, columns, size)
    ]
    scales, zeros = torch.cat([g.scale for g in grids], 1), torch.cat([g.zero for g in grids], 1)
    groups = natural_groups(columns, group_size, W.device)
    codes = quantize(W, scales[:, groups], zeros[:, groups], bits)
    solution = Solution(codes.to(torch.uint8), scales, zeros, groups, bits, group_size, error=0.0, damp=0.0)
    return replace(solution, error=float((W - solution.dequantize()).square().sum() / 2))


def _store(scales: Tensor, zeros: Tensor, group: int, grid: Grid) -> None:
    scales[:, group], zeros[:, group] = grid.scale[:, 0], grid.zero[:, 0]
