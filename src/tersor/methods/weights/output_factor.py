"""The output factor: errors that cost the model's predictions most are made up for by other outputs of the same layer.

GPTQ counts the errors E = W - Q of a layer's rows alike, and rows do not know of each other. Here they count as the model's
predictions feel them, to second order (a Kronecker-factored Fisher matrix):

    minimise tr(H_O E H_I Eᵀ) = ‖R_Oᵀ E R_I‖²        H_I = R_I R_Iᵀ [columns, columns],  H_O = R_O R_Oᵀ [rows, rows]

with R_I and R_O upper triangular. Row r of R_Oᵀ E, divided by R_O[r, r], is E_r + Σ_{s<r} L[s, r] E_s, where L = R_O with each
column divided by its diagonal. So once the rows before it are solved, row r is GPTQ's own problem with another weight:

    W'_r = W_r + Σ_{s<r} L[s, r] E_s

Number (r, j) needs the errors of the rows before r at columns up to j. GPTQ goes block of columns by block of columns, as ever:
D = W' - Q in its formula. Within a block of columns, blocks of rows follow one another, and within such a tile all numbers with
the same r + j are solved at once, because none of them needs another. A tile of 128 x 128 takes 255 such waves. The rows with
the largest diagonal of H_O come first. Where H_O is diagonal, L is 0 beside its diagonal, and the result is GPTQ's, bit for bit.

The objective is that of YAQA (arXiv 2505.22988), and this order of rounding is Babai's nearest plane for it, as in BaKron. No
code was read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.formats.grid import Bits, dequantize, quantize

ROWS = 128  # of a tile


@dataclass(frozen=True)
class OutputFactor:
    """What the solver needs of H_O. Rows are in the order of solving."""

    order: Tensor  # [rows]
    L: Tensor  # [rows, rows], upper triangular, with ones on the diagonal
    weights: Tensor  # [rows], R_O's squared diagonal over its mean: what an error of the row costs


def solve_rows(
    W: Tensor, now: Tensor, U: Tensor, scale: Tensor, zero: Tensor, bits: Bits, errors: Tensor, output: OutputFactor
) -> tuple[Tensor, Tensor, Tensor]:
    """One block of columns. W: their weights; now: the same as the columns before left them [rows, width]. scale, zero likewise.

    Returns codes, levels, and W' - W [rows, width]; adds to errors [rows].
    """
    codes, levels, shift, E = (torch.empty_like(W) for _ in range(4))
    for first in range(0, len(W), ROWS):
        tile = slice(first, first + ROWS)
        shift[tile] = output.L[:first, tile].t() @ E[:first] if first else 0
        L = output.L[tile, tile]
        codes[tile], levels[tile], more, lost = solve_tile(
            W[tile], now[tile] + shift[tile], U, scale[tile], zero[tile], bits, L
        )
        shift[tile] += more
        E[tile] = W[tile] - levels[tile]
        errors[tile] += lost * output.weights[tile]
    return codes.to(torch.uint8), levels, shift


def solve_tile(
    W: Tensor, now: Tensor, U: Tensor, scale: Tensor, zero: Tensor, bits: Bits, L: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, levels, what the tile's own rows add to W' [rows, width], and each row's loss [rows]. L [rows, rows].

    Wave k holds the numbers (r, j) with r + j = k, one a row. Arrays of waves are [waves, rows]; places without a number hold 0.
    """
    rows, width = W.shape
    waves, beside = rows + width - 1, rows - 1

    def in_waves(x: Tensor, fill: float = 0.0) -> Tensor:
        found = x.new_full((waves, rows), fill)
        _by_row(found, rows, width).copy_(x)
        return found

    w, weights, scales, zeros = in_waves(now), in_waves(W), in_waves(scale, 1.0), in_waves(zero)
    diagonal = in_waves(U.diagonal().expand(rows, width), 1.0)
    codes, levels, shift = (torch.zeros_like(w) for _ in range(3))
    # Column j has the index rows - 1 + width - 1 - j below. So what the rows of a wave need lies together.
    later = W.new_zeros(width, width + 2 * beside)  # U[j, j + d] at [d, index of j]
    for d in range(width):
        later[d, beside + d : beside + width] = U.diagonal(d).flip(0)
    E = W.new_zeros(width + 2 * beside, rows)  # of row s at [index of j, s]
    earlier = L.t().tril(-1).contiguous()  # L[s, r] at [r, s]
    lost = W.new_zeros(rows)
    for k in range(waves):
        first = beside + width - 1 - k
        mine = E[first : first + rows]
        torch.sum(mine * earlier, 1, out=shift[k])
        value = w[k] + shift[k]
        codes[k] = quantize(value, scales[k], zeros[k], bits)
        levels[k] = dequantize(codes[k], scales[k], zeros[k], bits)
        error = (value - levels[k]) / diagonal[k]
        lost += error.square() / 2
        mine.diagonal().copy_(weights[k] - levels[k])
        end = min(k + width, waves)
        w[k + 1 : end] -= later[1 : end - k, first : first + rows] * error
    codes, levels, shift = (_by_row(each, rows, width).contiguous() for each in (codes, levels, shift))
    return codes, levels, shift, lost


def _by_row(x: Tensor, rows: int, width: int) -> Tensor:
    """A view [rows, width] of an array of waves."""
    return x.as_strided((rows, width), (rows + 1, rows))
