"""GPTQ's loop over the columns of one block as one CUDA kernel (`gptq_block.cu`); a loop in Python launches hundreds."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tersor.formats.grid import Bits, Stored, levels_of
from tersor.kernels import nvrtc

WIDTH = 128  # columns at most
_ROWS = 32  # of a thread block, four threads each
_STORED = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}


@dataclass(frozen=True)
class Grids:
    """What kind of grids the rows have. All but `bits` are for groups whose grids the kernel fits."""

    bits: Bits
    sym: bool = False
    stored: Stored | None = None
    group_size: int = 0  # 0: all grids are given


def has_kernel(W: Tensor, block_size: int) -> bool:
    """Whether W [rows, columns] can be solved here in blocks of that many columns: float32, on an NVIDIA GPU."""
    return W.is_cuda and W.dtype == torch.float32 and block_size <= WIDTH and torch.version.hip is None


def can_fit(group_size: int, block_size: int, stored: Stored | None) -> bool:
    """Whether the kernel can fit the grids of such groups, from a row's smallest and largest number."""
    fits = stored is None or stored.scale_dtype in _STORED
    return fits and group_size % 4 == 0 and block_size % group_size == 0 and WIDTH % group_size == 0


def solve_block(
    now: Tensor,
    U: Tensor,
    W: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    codes: Tensor,
    D: Tensor,
    errors: Tensor,
    grids: Grids,
) -> None:
    """Fill codes, D = W - Q, and the scales and zeros of groups that the kernel fits; add to errors.

    now, W, D float32 and codes uint8, all [rows, width], W as it was and `now` with the errors of the blocks before. U
    [width, width] upper triangular, scales, zeros [rows, all groups], errors [rows], float32. groups int32 [width].
    """
    rows, width = now.shape
    if rows == 0:
        return
    tensors = (now, U, W, scales, zeros, groups, codes, D, errors)
    for each in tensors:
        assert each.stride(-1) == 1 or each.shape[-1] == 1
    assert scales.stride(0) == zeros.stride(0) == scales.shape[1] or rows == 1
    pointers = (ctypes.c_void_p(each.data_ptr()) for each in tensors)
    strides = (ctypes.c_longlong(each.stride(0)) for each in (now, U, W, codes, D))
    sizes = (ctypes.c_int(number) for number in (rows, width, scales.shape[1]))
    with torch.cuda.device(W.device):
        kernel = _kernel(grids, W.device.index)
        kernel.launch(blocks=-(-rows // _ROWS), threads=4 * _ROWS, arguments=[*pointers, *strides, *sizes], early=False)


def source_of(grids: Grids) -> str:
    constants = {
        "LEVELS": levels_of(grids.bits),
        "TERNARY": int(grids.bits == "ternary"),
        "SYM": int(grids.sym),
        "GROUP": grids.group_size,
        "STORED": 0 if grids.stored is None else _STORED[grids.stored.scale_dtype],
        "MIN_ZERO": 0 if grids.stored is None else grids.stored.min_zero,
    }
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    return defines + Path(__file__).with_suffix(".cu").read_text()


@functools.cache
def _kernel(grids: Grids, device: int) -> nvrtc.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    cubin = nvrtc.compile_source(source_of(grids), f"sm_{major}{minor}")
    return nvrtc.Kernel(cubin, "gptq_block", shared_bytes=4 * WIDTH * WIDTH)
