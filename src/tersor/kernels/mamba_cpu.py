"""The selective scan and the causal convolution of Mamba on a CPU, each as one compiled pass (`mamba_cpu.cpp`). They need a C++
compiler. The rest of a mixer is matmuls."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tersor.kernels import quantized_matmul_cpu as cpu

SOURCE = Path(__file__).with_suffix(".cpp")
LARGEST_STATE = 256  # numbers a channel
WIDEST = 16  # inputs that a convolution sees
_FLAGS = ("-fno-trapping-math",)  # without it, GCC does not vectorize a loop with a comparison in it
_WORTH_THREADS = 2**17  # channels * tokens * state numbers; for less work, waking threads costs more than they save


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, built for the best instructions that processor and compiler share; None where it cannot be built."""
    found = cpu.best_build(SOURCE, _FLAGS)
    if found is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        found.tersor_selective_scan.argtypes = [*[pointer] * 8, *[integer] * 5, pointer, pointer, integer]
        found.tersor_selective_scan.argtypes += [ctypes.c_int, ctypes.c_int]
        found.tersor_selective_scan.restype = None
        found.tersor_causal_conv.argtypes = [
            pointer,
            integer,
            *[pointer] * 5,
            *[integer] * 4,
            ctypes.c_int,
            ctypes.c_int,
        ]
        found.tersor_causal_conv.restype = None
        found.tersor_mamba_token.argtypes = [pointer, integer, pointer, pointer, pointer, *[integer] * 5]
        found.tersor_mamba_token.argtypes += [ctypes.c_float, ctypes.c_int]
    return found


def plain(*tensors: Tensor | None) -> bool:
    """Whether the library can be used: float32 tensors on a CPU, no gradients, no tracing, and a compiler is there."""
    given = [each for each in tensors if each is not None]
    if torch.compiler.is_compiling() or any(type(each) not in (Tensor, torch.nn.Parameter) for each in given):
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in given):
        return False
    fits = all(each.device.type == "cpu" and each.dtype == torch.float32 and each.numel() > 0 for each in given)
    return fits and library() is not None


def takes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> bool:
    """Whether `scan` takes tensors of these shapes: it does not broadcast."""
    if x.dim() != 3 or A.dim() != 2 or A.shape[0] != x.shape[2] or not 0 < A.shape[1] <= LARGEST_STATE:
        return False
    (batch, tokens, channels), n = x.shape, A.shape[1]
    inputs = dt.shape == x.shape and B.shape == C.shape == (batch, tokens, n)
    beside = (D is None or D.shape == (channels,)) and (z is None or z.shape == x.shape)
    return inputs and beside and initial_state.shape == (batch, channels, n)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    *,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the last state, and the state before each chunk [chunks, b, d, n], or None without a chunk_size. All float32; shapes and
    meaning as in selective_scan.py."""
    compiled = library()
    assert compiled is not None
    if not takes(x, dt, A, B, C, initial_state, D=D, z=z):
        raise ValueError(f"no scan of x {list(x.shape)}, dt {list(dt.shape)}, A {list(A.shape)}, B {list(B.shape)}")
    batch, tokens, channels = x.shape
    n = A.shape[1]
    inputs = [each.contiguous() for each in (x, dt, A, B, C)]
    y, state = torch.empty_like(inputs[0]), initial_state.clone(memory_format=torch.contiguous_format)
    before = None if chunk_size is None else x.new_empty(-(-tokens // chunk_size), batch, channels, n)
    skip = None if D is None else D.contiguous()
    gate = None if z is None else _rows(z)
    compiled.tersor_selective_scan(
        *(each.data_ptr() for each in (*inputs, y, state)), _pointer(before),
        batch, tokens, channels, n, chunk_size or 1,
        _pointer(skip), _pointer(gate), 0 if gate is None else gate.stride(1), dt_softplus, threads_for(x.numel() * n),
    )  # fmt: skip
    return y, state, before


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, *, silu: bool
) -> tuple[Tensor, Tensor]:
    """y [b, l, channels] of x of that shape, and the last inputs [b, channels, width - 1]. weight [channels, 1, width]. All
    float32."""
    compiled = library()
    assert compiled is not None
    batch, tokens, channels = x.shape
    width = weight.shape[-1]
    if len(weight) != channels or width > WIDEST or (state is not None and state.shape != (batch, channels, width - 1)):
        raise ValueError(f"no convolution of x {list(x.shape)} with weights {list(weight.shape)}")
    rows, kernel = _rows(x), weight.contiguous()
    before = None if state is None else state.contiguous()
    y, after = x.new_empty(batch, tokens, channels), x.new_empty(batch, channels, width - 1)
    compiled.tersor_causal_conv(
        rows.data_ptr(), rows.stride(1), kernel.data_ptr(), _pointer(bias), _pointer(before),
        after.data_ptr(), y.data_ptr(), batch, tokens, channels, width, silu, threads_for(x.numel() * width),
    )  # fmt: skip
    return y, after


def _rows(x: Tensor) -> Tensor:
    """x [b, l, channels] with contiguous channels and no gap between batches."""
    even = x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if even else x.contiguous()


def threads_for(work: int) -> int:
    return torch.get_num_threads() if work >= _WORTH_THREADS else 1


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
