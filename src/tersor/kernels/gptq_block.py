"""GPTQ's loop over the columns of one block as one CUDA kernel (`gptq_block.cu`), where a loop in Python launches hundreds."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tersor.kernels import nvrtc

WIDTH = 128  # columns at most
_ROWS = 32  # of a thread block, four threads each


def has_kernel(W: Tensor) -> bool:
    """Whether a block of W [rows, width] can be solved here: float32, on an NVIDIA GPU."""
    return W.is_cuda and W.dtype == torch.float32 and W.shape[1] <= WIDTH and torch.version.hip is None


def solve_block(
    W: Tensor, U: Tensor, scale: Tensor, zero: Tensor, *, ternary: bool, levels: int
) -> tuple[Tensor, Tensor]:
    """Codes, uint8, and errors (w - q) / U_ii, float32, both [rows, width].

    W, scale, zero [rows, width], U [width, width] upper triangular, all float32. levels: of a grid that is not ternary.
    """
    W, U = (each if each.stride(-1) == 1 else each.contiguous() for each in (W, U))
    scale, zero = scale.contiguous(), zero.contiguous()
    rows, width = W.shape
    codes = torch.empty(rows, width, dtype=torch.uint8, device=W.device)
    errors = torch.empty(rows, width, device=W.device)
    if rows == 0:
        return codes, errors
    pointers = (ctypes.c_void_p(each.data_ptr()) for each in (W, U, scale, zero, codes, errors))
    strides = (ctypes.c_longlong(each.stride(0)) for each in (W, U))
    sizes = (ctypes.c_int(number) for number in (rows, width, levels, int(ternary)))
    with torch.cuda.device(W.device):
        kernel = _kernel(W.device.index)
        kernel.launch(blocks=-(-rows // _ROWS), threads=4 * _ROWS, arguments=[*pointers, *strides, *sizes], early=False)
    return codes, errors


@functools.cache
def _kernel(device: int) -> nvrtc.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    source = Path(__file__).with_suffix(".cu").read_text()
    cubin = nvrtc.compile_source(source, f"sm_{major}{minor}")
    return nvrtc.Kernel(cubin, "gptq_block", shared_bytes=4 * WIDTH * WIDTH)
