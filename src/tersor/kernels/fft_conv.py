"""Gated circular convolution of many sequences by FFT: H3's FlashConv (Fu et al., ICLR 2023, arXiv 2212.14052, section 4).

    y = g_out * (taps (*) (g_in * u))[:L]           (*): circular of length N, u followed by zeros

u, g_in, g_out [b, h, L]; taps [h, N] real. Tap 0 meets the present position, tap 1 the one before; the last taps meet what
follows: N >= 2 L keeps both apart. A skip D u is D on tap 0. `causal_taps` makes taps of an impulse response. Gates may be left
out. Sums are in float32 (float64 for float64), y has u's dtype.

    du = g_in * corr(g_out * dy),   dg_out = dy * (taps (*) (g_in * u)),   dtaps = sum over b of (g_in * u) corr (g_out * dy)

`corr`, the correlation, is the same convolution with the conjugate of the taps' spectrum. So the backward pass is the forward's
kernel twice and one more for dtaps.

Models call `fft_conv`: the op `tersor::fft_conv`, torch.fft on CPUs; on GPUs Triton (fft_conv_triton.py) for 16-bit u of up to
LONGEST positions, whose transforms stay on the chip, and torch.fft for all else. What is longer can go in pieces, with a state
passed on (`tersor.layers.diagonal_state_space.convolve_in_pieces`). `faster_on_chip` says where the Triton form pays, as
measured on the GPU at hand.

On an H200 (benchmarks/results/flash_conv.md) the Triton form is 1.3 times as fast as torch.fft at 1,024 positions and 0.93 times
at 2,048, with about a third of the memory. 4,096 do not fit into its shared memory. Its products, in TF32, are too coarse
for float32, and were up to three times slower than torch.fft there: neither is offered.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.kernels import choices

SHORTEST, LONGEST = 512, 2048  # positions on the chip: FFTs of 1,024 to 4,096 numbers
ON_CHIP, FFT = "on the chip", "torch.fft"
_SHORT_TYPES = (torch.bfloat16, torch.float16)
_PROBE = (4, 256)  # sequences and channels of what is measured


def fft_length(length: int) -> int:
    """N for sequences of `length`: the next power of two of 2 length, at least that of SHORTEST."""
    return 2 * max(SHORTEST, 1 << (length - 1).bit_length())


def causal_taps(kernel: Tensor, skip: Tensor | None = None) -> Tensor:
    """An impulse response [h, l] and what is added of the input itself, [h], as taps [h, fft_length(l)]."""
    taps = F.pad(kernel, (0, fft_length(kernel.shape[-1]) - kernel.shape[-1]))
    return taps if skip is None else torch.cat((taps[:, :1] + skip[:, None], taps[:, 1:]), 1)


def fft_conv(u: Tensor, taps: Tensor, *, gate_in: Tensor | None = None, gate_out: Tensor | None = None) -> Tensor:
    """y [b, h, L]. Differentiable once in all four."""
    _check(u, taps, gate_in, gate_out)
    y: Tensor = _fft_conv(u, taps, gate_in, gate_out, False)
    return y


def reference(u: Tensor, taps: Tensor, *, gate_in: Tensor | None = None, gate_out: Tensor | None = None) -> Tensor:
    """As `fft_conv`, by torch.fft."""
    return _plain(u, taps, gate_in, gate_out, reverse=False)


def _check(u: Tensor, taps: Tensor, *gates: Tensor | None) -> None:
    if u.dim() != 3 or taps.dim() != 2 or len(taps) != u.shape[1] or taps.shape[1] < 2 * u.shape[2]:
        raise TersorError(
            f"fft_conv takes u [b, h, L] and taps [h, at least 2 L], not {[*u.shape]} and {[*taps.shape]}"
        )
    for gate in gates:
        if gate is not None and gate.shape != u.shape:
            raise TersorError(f"fft_conv's gates have the shape of u, {[*u.shape]}, not {[*gate.shape]}")


def _plain(u: Tensor, taps: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, *, reverse: bool) -> Tensor:
    wide = torch.promote_types(u.dtype, torch.float32)
    spectrum = torch.fft.rfft(taps.to(wide))
    U = torch.fft.rfft(_gated(u.to(wide), gate_in), n=taps.shape[1])
    y: Tensor = torch.fft.irfft(U * (spectrum.conj() if reverse else spectrum), n=taps.shape[1])[..., : u.shape[2]]
    return _gated(y, gate_out).to(u.dtype)


def _plain_correlation(u: Tensor, gate_in: Tensor | None, grad: Tensor, gate_out: Tensor | None, length: int) -> Tensor:
    wide = torch.promote_types(u.dtype, torch.float32)
    U = torch.fft.rfft(_gated(u.to(wide), gate_in), n=length)
    G = torch.fft.rfft(_gated(grad.to(wide), gate_out), n=length)
    dtaps: Tensor = torch.fft.irfft((U.conj() * G).sum(0), n=length)
    return dtaps


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate


def _on_chip(u: Tensor, taps: Tensor) -> bool:
    """Whether the Triton form takes it."""
    N = taps.shape[1]
    return u.dtype in _SHORT_TYPES and 2 * SHORTEST <= N <= 2 * LONGEST and N & (N - 1) == 0


def faster_on_chip(length: int, dtype: torch.dtype, device: torch.device, *, backward: bool) -> bool:
    """Whether the Triton form takes sequences of `length` on this GPU and is faster than torch.fft, measured once and kept.

    backward: forward and backward pass are what is compared, not the forward pass alone.
    """
    if device.type != "cuda" or dtype not in _SHORT_TYPES or length > LONGEST:
        return False
    length = operator.index(length)  # a number, also where torch.compile traces lengths
    step = fft_length(length) // 16  # lengths count as the next multiple
    known: str = _known(-(-length // step) * step, dtype, device, backward)
    return known == ON_CHIP


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _known(length: int, dtype: torch.dtype, device: torch.device, backward: bool) -> str:
    return _measured(length, dtype, device, backward)  # its cache is nothing that torch.compile can trace


@functools.cache
def _measured(length: int, dtype: torch.dtype, device: torch.device, backward: bool) -> str:
    where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    asked = f"fft_conv {where}, {dtype}, {length} positions, {'forward and backward' if backward else 'forward'}"
    known = choices.recall(asked, (ON_CHIP, FFT))
    if known is None:
        found = _microseconds(length, dtype, device, backward)
        choices.keep(asked, found)
        known = min(found, key=lambda name: found[name])
    return known


def _microseconds(length: int, dtype: torch.dtype, device: torch.device, backward: bool) -> dict[str, float]:
    """Of a convolution with both gates."""
    from triton.runtime.errors import OutOfResources

    def passed(convolve: Callable[..., Tensor], N: int) -> None:
        y = convolve(u, taps[:, :N], gate_in=u, gate_out=u)
        if backward:
            torch.autograd.grad(y, (u, taps), u.detach())

    with torch.inference_mode(mode=False), torch.set_grad_enabled(backward):
        u = torch.zeros(*_PROBE, length, dtype=dtype, device=device, requires_grad=backward)
        taps = torch.zeros(_PROBE[1], fft_length(length), device=device, requires_grad=backward)
        on_chip = functools.partial(passed, fft_conv, taps.shape[1])
        by_fft = functools.partial(passed, reference, 2 * length)
        try:
            on_chip()
        except OutOfResources:  # a GPU with less shared memory
            return {ON_CHIP: math.inf, FFT: 0.0}
        return dict(zip((ON_CHIP, FFT), choices.gpu_microseconds([on_chip, by_fft], device), strict=True))


@torch.library.custom_op("tersor::fft_conv", mutates_args=())
def _fft_conv(u: Tensor, taps: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, reverse: bool) -> Tensor:
    return _plain(u, taps, gate_in, gate_out, reverse=reverse).contiguous().clone()


@_fft_conv.register_kernel("cuda")
def _(u: Tensor, taps: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, reverse: bool) -> Tensor:
    if not _on_chip(u, taps):
        return _plain(u, taps, gate_in, gate_out, reverse=reverse).contiguous()
    from tersor.kernels import fft_conv_triton

    return fft_conv_triton.convolve(u, taps, gate_in, gate_out, reverse=reverse)


@_fft_conv.register_fake
def _(u: Tensor, taps: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, reverse: bool) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.custom_op("tersor::fft_conv_taps", mutates_args=())
def _taps_gradient(u: Tensor, gate_in: Tensor | None, grad: Tensor, gate_out: Tensor | None, length: int) -> Tensor:
    return _plain_correlation(u, gate_in, grad, gate_out, length).contiguous()


@_taps_gradient.register_kernel("cuda")
def _(u: Tensor, gate_in: Tensor | None, grad: Tensor, gate_out: Tensor | None, length: int) -> Tensor:
    if not _on_chip(u, u.new_empty(0, length)):
        return _plain_correlation(u, gate_in, grad, gate_out, length).contiguous()
    from tersor.kernels import fft_conv_triton

    return fft_conv_triton.correlate(u, gate_in, grad, gate_out, length)


@_taps_gradient.register_fake
def _(u: Tensor, gate_in: Tensor | None, grad: Tensor, gate_out: Tensor | None, length: int) -> Tensor:
    return u.new_empty(u.shape[1], length, dtype=torch.promote_types(u.dtype, torch.float32))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    u, taps, gate_in, gate_out = ctx.saved_tensors
    grad = grad.contiguous()
    du = dtaps = dgate_in = dgate_out = None
    wanted_u, wanted_taps, wanted_in, wanted_out, _ = ctx.needs_input_grad
    if wanted_u or wanted_in:
        dw = _fft_conv(grad, taps, gate_out, None, not ctx.reverse)
        du = _gated(dw, gate_in)
        dgate_in = dw * u if wanted_in else None
    if wanted_out:
        dgate_out = _fft_conv(u, taps, gate_in, grad, ctx.reverse)
    if wanted_taps:
        first, second = ((u, gate_in), (grad, gate_out)) if not ctx.reverse else ((grad, gate_out), (u, gate_in))
        dtaps = _taps_gradient(*first, *second, taps.shape[1]).to(taps.dtype)
    return du, dtaps, dgate_in, dgate_out, None


_fft_conv.register_autograd(_backward, setup_context=_setup_context)
