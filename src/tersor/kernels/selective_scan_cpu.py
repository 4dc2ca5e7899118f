"""The selective scan on a CPU in one compiled pass (`selective_scan_cpu.cpp`), where there is a compiler."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tersor.kernels import cpp
from tersor.kernels import quantized_matmul_cpu as cpu

SOURCE = Path(__file__).with_suffix(".cpp")
LARGEST_STATE = 256  # numbers a channel
_WORTH_THREADS = 2**16  # channels times numbers times tokens; below, waking threads costs more than they save


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Built for the best instructions that the processor and the compiler have; None where nothing can be built."""
    for name in cpu.supported():
        try:
            found = cpp.load(SOURCE, cpu.FLAGS[name])
        except (cpp.CompileError, OSError):
            continue
        found.tersor_selective_scan.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 5 + [ctypes.c_int]
        found.tersor_selective_scan.restype = None
        return found
    return None


def usable(x: Tensor, A: Tensor) -> bool:
    """Whether `forward` takes tensors like these."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and 0 < A.shape[1] <= LARGEST_STATE and x.numel() > 0
    return fits and _library() is not None


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, chunk_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the last state, and the state before each chunk [chunks, b, d, n], as `selective_scan.chunked` has them; None for
    the chunks where chunk_size is None. All float32."""
    compiled = _library()
    assert compiled is not None
    batch, tokens, channels = x.shape
    n = A.shape[1]
    inputs = [each.contiguous() for each in (x, dt, A, B, C)]
    y, state = torch.empty_like(inputs[0]), initial_state.clone(memory_format=torch.contiguous_format)
    before = None if chunk_size is None else x.new_empty(-(-tokens // chunk_size), batch, channels, n)
    threads = torch.get_num_threads() if x.numel() * n >= _WORTH_THREADS else 1
    pointers = [each.data_ptr() for each in (*inputs, y, state)]
    compiled.tersor_selective_scan(
        *pointers, None if before is None else before.data_ptr(), batch, tokens, channels, n, chunk_size or 1, threads
    )
    return y, state, before
