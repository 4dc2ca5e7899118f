"""The gated convolution of fft_conv.py on GPUs: a program holds the transform of two sequences and multiplies by small DFTs.

A real convolution of u + i v is that of u, plus i times that of v: two sequences of the batch travel as one complex one. With
N = R S, position n = n1 S + n2 and frequency k = k1 + R k2, the DFT of the matrix Z[n1, n2] is two matrix products

    X[k1, k2] = sum_n2 ( W_N^(k1 n2) sum_n1 W_R^(k1 n1) Z[n1, n2] ) W_S^(n2 k2)         W_M = exp(-2 pi i / M)

for tensor cores, and its inverse the same two backwards, conjugated. The spectrum stays in the order (k1, k2), which is that of
the taps' spectrum, so that nothing is permuted. The lower half of Z is padding: it is never loaded, multiplied or stored.

Products are in TF32, finer than the 16 bits of the data. The taps' spectrum comes from torch.fft: h sequences instead of b h.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

SHAPES = {1024: (32, 32), 2048: (32, 64), 4096: (64, 64)}  # N: R, S


def convolve(u: Tensor, taps: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, *, reverse: bool) -> Tensor:
    """As the op `tersor::fft_conv`."""
    u, gate_in, gate_out = u.contiguous(), _contiguous(gate_in), _contiguous(gate_out)
    (batch, channels, length), N = u.shape, taps.shape[1]
    R, S = SHAPES[N]
    spectrum = torch.fft.fft(taps.float(), dim=1) / N
    spectrum = spectrum.conj() if reverse else spectrum
    spectrum = torch.view_as_real(spectrum.view(channels, S, R).mT.resolve_conj().contiguous())  # [h, R, S, 2]: k1, k2
    y = torch.empty_like(u)
    _convolve[(channels, triton.cdiv(batch, 2))](
        u, gate_in, gate_out, spectrum, *_tables(R, S, u.device), y, batch, channels, length,
        HAS_IN=gate_in is not None, HAS_OUT=gate_out is not None, **_options(R, S),
    )  # fmt: skip
    return y


def correlate(u: Tensor, gate_in: Tensor | None, grad: Tensor, gate_out: Tensor | None, N: int) -> Tensor:
    """As the op `tersor::fft_conv_taps`: [h, N] float32."""
    u, gate_in, gate_out, grad = u.contiguous(), _contiguous(gate_in), _contiguous(gate_out), grad.contiguous()
    batch, channels, length = u.shape
    R, S = SHAPES[N]
    parts = min(triton.cdiv(batch, 2), max(1, 512 // channels))  # programs that share a channel's batch
    out = torch.empty(parts, channels, N, dtype=torch.float32, device=u.device)
    _correlate[(channels, parts)](
        u, gate_in, grad, gate_out, *_tables(R, S, u.device), out, batch, channels, length,
        HAS_IN=gate_in is not None, HAS_OUT=gate_out is not None, **_options(R, S),
    )  # fmt: skip
    return out.sum(0)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _options(R: int, S: int) -> dict[str, int]:
    return {"R": R, "S": S, "num_warps": 8 if R * S > 2048 else 4}


@functools.lru_cache(maxsize=16)
def _tables(R: int, S: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The DFT of R [2, R, R], that of S [2, S, S] and the factors between them [2, R, S]; real parts, then imaginary ones."""

    def powers(rows: int, columns: int, order: int) -> Tensor:
        exponent = torch.arange(rows)[:, None] * torch.arange(columns) % order
        angle = -2 * torch.pi * exponent.double() / order
        return torch.stack((angle.cos(), angle.sin())).float().to(device)

    return powers(R, R, R), powers(S, S, S), powers(R, S, R * S)


@triton.jit  # type: ignore[untyped-decorator]
def _load(
    pointer: tl.tensor,  # [b, h, L]
    gate_pointer: tl.tensor,
    sequence: tl.tensor,
    batch: tl.tensor,
    channels: tl.tensor,
    channel: tl.tensor,
    length: tl.tensor,
    R: tl.constexpr,
    S: tl.constexpr,
    GATED: tl.constexpr,
) -> tl.tensor:
    """A gated sequence as [R / 2, S], float32; 0 behind its end and behind the batch's."""
    HALF: tl.constexpr = R // 2
    place = tl.arange(0, HALF)[:, None] * S + tl.arange(0, S)[None, :]
    start = (tl.cast(sequence, tl.int64) * channels + channel) * length
    there = (place < length) & (sequence < batch)
    z = tl.load(pointer + start + place, mask=there, other=0.0).to(tl.float32)
    if GATED:
        z *= tl.load(gate_pointer + start + place, mask=there, other=0.0).to(tl.float32)
    return z


@triton.jit  # type: ignore[untyped-decorator]
def _transform(
    re: tl.tensor,
    im: tl.tensor,
    R_pointer: tl.tensor,
    S_pointer: tl.tensor,
    T_pointer: tl.tensor,
    R: tl.constexpr,
    S: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """[R / 2, S] -> its spectrum [R, S]."""
    HALF: tl.constexpr = R // 2
    r, half, s = tl.arange(0, R), tl.arange(0, HALF), tl.arange(0, S)
    place = r[:, None] * R + half[None, :]
    W_re, W_im = tl.load(R_pointer + place), tl.load(R_pointer + R * R + place)
    a_re = tl.dot(W_re, re) - tl.dot(W_im, im)
    a_im = tl.dot(W_re, im) + tl.dot(W_im, re)
    place = r[:, None] * S + s[None, :]
    T_re, T_im = tl.load(T_pointer + place), tl.load(T_pointer + R * S + place)
    b_re, b_im = a_re * T_re - a_im * T_im, a_re * T_im + a_im * T_re
    place = s[:, None] * S + s[None, :]
    V_re, V_im = tl.load(S_pointer + place), tl.load(S_pointer + S * S + place)
    y_re = tl.dot(b_re, V_re) - tl.dot(b_im, V_im)
    y_im = tl.dot(b_re, V_im) + tl.dot(b_im, V_re)
    return y_re, y_im


@triton.jit  # type: ignore[untyped-decorator]
def _twisted_back(
    re: tl.tensor,
    im: tl.tensor,
    S_pointer: tl.tensor,
    T_pointer: tl.tensor,
    R: tl.constexpr,
    S: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A spectrum [R, S] up to the last of the inverse's products."""
    r, s = tl.arange(0, R), tl.arange(0, S)
    place = s[:, None] * S + s[None, :]
    V_re, V_im = tl.load(S_pointer + place), tl.load(S_pointer + S * S + place)
    b_re = tl.dot(re, V_re) + tl.dot(im, V_im)
    b_im = tl.dot(im, V_re) - tl.dot(re, V_im)
    place = r[:, None] * S + s[None, :]
    T_re, T_im = tl.load(T_pointer + place), tl.load(T_pointer + R * S + place)
    return b_re * T_re + b_im * T_im, b_im * T_re - b_re * T_im


@triton.jit  # type: ignore[untyped-decorator]
def _convolve(
    u_pointer: tl.tensor,  # [b, h, L], as the gates and y
    in_pointer: tl.tensor,
    out_pointer: tl.tensor,
    spectrum_pointer: tl.tensor,  # [h, R, S, 2], over N
    R_pointer: tl.tensor,  # [2, R, R]
    S_pointer: tl.tensor,  # [2, S, S]
    T_pointer: tl.tensor,  # [2, R, S]
    y_pointer: tl.tensor,
    batch: tl.tensor,
    channels: tl.tensor,
    length: tl.tensor,
    HAS_IN: tl.constexpr,
    HAS_OUT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
) -> None:
    channel, pair = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = R // 2
    r, half, s = tl.arange(0, R), tl.arange(0, HALF), tl.arange(0, S)
    re = _load(u_pointer, in_pointer, 2 * pair, batch, channels, channel, length, R, S, HAS_IN)
    im = _load(u_pointer, in_pointer, 2 * pair + 1, batch, channels, channel, length, R, S, HAS_IN)
    re, im = _transform(re, im, R_pointer, S_pointer, T_pointer, R, S)

    place = channel.to(tl.int64) * 2 * R * S + 2 * (r[:, None] * S + s[None, :])
    K_re, K_im = tl.load(spectrum_pointer + place), tl.load(spectrum_pointer + place + 1)
    re, im = re * K_re - im * K_im, re * K_im + im * K_re

    re, im = _twisted_back(re, im, S_pointer, T_pointer, R, S)
    place = half[:, None] * R + r[None, :]  # only the rows that are kept
    W_re, W_im = tl.load(R_pointer + place), tl.load(R_pointer + R * R + place)
    z_re = tl.dot(W_re, re) + tl.dot(W_im, im)
    z_im = tl.dot(W_re, im) - tl.dot(W_im, re)

    place = half[:, None] * S + s[None, :]
    start = (2 * pair.to(tl.int64) * channels + channel) * length
    there = place < length
    second = there & (2 * pair + 1 < batch)
    step = channels.to(tl.int64) * length
    if HAS_OUT:
        z_re *= tl.load(out_pointer + start + place, mask=there, other=0.0).to(tl.float32)
        z_im *= tl.load(out_pointer + start + step + place, mask=second, other=0.0).to(tl.float32)
    tl.store(y_pointer + start + place, z_re, mask=there)
    tl.store(y_pointer + start + step + place, z_im, mask=second)


@triton.jit  # type: ignore[untyped-decorator]
def _correlate(
    u_pointer: tl.tensor,  # [b, h, L], as its gate, grad and its gate
    in_pointer: tl.tensor,
    grad_pointer: tl.tensor,
    out_pointer: tl.tensor,
    R_pointer: tl.tensor,
    S_pointer: tl.tensor,
    T_pointer: tl.tensor,
    dtaps_pointer: tl.tensor,  # [parts, h, N]
    batch: tl.tensor,
    channels: tl.tensor,
    length: tl.tensor,
    HAS_IN: tl.constexpr,
    HAS_OUT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
) -> None:
    """conj(FFT(u + i v)) FFT(g + i h) is the sum of both correlations' spectra, plus i times what is no real sequence's."""
    channel, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    r, s = tl.arange(0, R), tl.arange(0, S)
    sum_re = tl.zeros((R, S), tl.float32)
    sum_im = tl.zeros((R, S), tl.float32)
    for pair in range(part, (batch + 1) // 2, parts):
        re = _load(u_pointer, in_pointer, 2 * pair, batch, channels, channel, length, R, S, HAS_IN)
        im = _load(u_pointer, in_pointer, 2 * pair + 1, batch, channels, channel, length, R, S, HAS_IN)
        u_re, u_im = _transform(re, im, R_pointer, S_pointer, T_pointer, R, S)
        re = _load(grad_pointer, out_pointer, 2 * pair, batch, channels, channel, length, R, S, HAS_OUT)
        im = _load(grad_pointer, out_pointer, 2 * pair + 1, batch, channels, channel, length, R, S, HAS_OUT)
        g_re, g_im = _transform(re, im, R_pointer, S_pointer, T_pointer, R, S)
        sum_re += u_re * g_re + u_im * g_im
        sum_im += u_re * g_im - u_im * g_re
    re, im = _twisted_back(sum_re, sum_im, S_pointer, T_pointer, R, S)
    place = r[:, None] * R + r[None, :]
    W_re, W_im = tl.load(R_pointer + place), tl.load(R_pointer + R * R + place)
    dtaps = tl.dot(W_re, re) + tl.dot(W_im, im)
    place = r[:, None] * S + s[None, :]
    start = (part * channels + channel).to(tl.int64) * R * S
    tl.store(dtaps_pointer + start + place, dtaps / (R * S))
