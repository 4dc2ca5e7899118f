"""Convolution with kernels as long as the sequence, by FFT in O(L log L).

    y_l = sum_{j <= l} k_j x_{l-j}          and, with a kernel backwards:  + sum_{j > l} b_{j-l-1} x_j

The FFT length is the sum of both lengths, so that nothing wraps around, and the transform is in float32 at least.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from tersor.kernels.fft_conv import causal_taps, fft_conv


def long_convolution(x: Tensor, kernel: Tensor, *, backward_kernel: Tensor | None = None) -> Tensor:
    """x (..., L), kernel (..., Lk), their leading axes broadcast; the result has x's length and dtype.

    backward_kernel: of the same shape. Its tap 0 meets the next position: the present one belongs to the forward kernel.
    """
    length, total = x.shape[-1], x.shape[-1] + kernel.shape[-1]
    if backward_kernel is not None:
        kernel = F.pad(kernel, (0, length)) + F.pad(backward_kernel.flip(-1), (length, 0))
    spectrum = torch.fft.rfft(wide(x), n=total) * torch.fft.rfft(wide(kernel), n=total)
    y: Tensor = torch.fft.irfft(spectrum, n=total)
    return y[..., :length].to(x.dtype)


def convolve_overlapped(x: Tensor, kernel: Tensor, piece: int) -> Tensor:
    """x (b, h, L) of any length with a short causal kernel (h, Lk), with FFTs of pieces only: each piece begins with the last
    Lk - 1 positions of the one before it."""
    length, past = x.shape[-1], kernel.shape[-1] - 1
    fresh = piece - past
    count = -(-length // fresh)
    pieces = F.pad(x, (past, count * fresh - length)).unfold(-1, piece, fresh)  # (b, h, P, piece)
    taps = causal_taps(F.pad(kernel, (0, piece - kernel.shape[-1])))
    y = fft_conv(rearrange(pieces, "b h p l -> (b p) h l"), taps)[..., past:]
    return rearrange(y, "(b p) h l -> b h (p l)", p=count)[..., :length]


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
