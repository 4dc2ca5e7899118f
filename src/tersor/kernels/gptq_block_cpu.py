"""The columns of one block of GPTQ on a CPU in one compiled call (`gptq_block_cpu.cpp`).

The results are those of gptq_solver.solve_columns bit for bit, in a fraction of its time. It needs a C++ compiler. gptq_block.py
does the same on GPUs.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tersor.formats.grid import Bits, levels_of
from tersor.kernels import quantized_matmul_cpu as cpu

SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = (
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
)  # the last two: else GCC does not vectorize rounding
_WORTH_THREADS = 2**20  # multiply-adds; for fewer, waking threads costs more than they save


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = cpu.best_build(SOURCE, _FLAGS)
    if found is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        found.tersor_gptq_block.argtypes = [
            *[pointer] * 4,
            *[integer] * 2,
            ctypes.c_float,
            *[pointer] * 3,
            ctypes.c_int,
        ]
        found.tersor_gptq_block.restype = None
    return found


def takes(W: Tensor) -> bool:
    """Whether `solve_block` takes a block: float32 on a CPU, and a compiler is there."""
    return W.device.type == "cpu" and W.dtype == torch.float32 and W.numel() > 0 and _library() is not None


def solve_block(W: Tensor, U: Tensor, scale: Tensor, zero: Tensor, bits: Bits, errors: Tensor) -> tuple[Tensor, Tensor]:
    """As gptq_solver.solve_columns without a pruner: codes, uint8, and levels, both [rows, width]; adds to errors [rows]."""
    compiled = _library()
    assert compiled is not None
    rows, width = W.shape
    if U.shape != (width, width) or scale.shape != W.shape or zero.shape != W.shape or errors.shape != (rows,):
        raise ValueError(f"no block of W {list(W.shape)}, U {list(U.shape)}, scale {list(scale.shape)}")
    w, scale, zero, U = (each.contiguous() for each in (W.t(), scale.t(), zero.t(), U))
    codes, levels = torch.empty(width, rows, dtype=torch.uint8), torch.empty(width, rows)
    added = errors.contiguous()
    threads = torch.get_num_threads() if rows * width * width // 2 >= _WORTH_THREADS else 1
    compiled.tersor_gptq_block(
        w.data_ptr(), U.data_ptr(), scale.data_ptr(), zero.data_ptr(), width, rows,
        0 if bits == "ternary" else levels_of(bits) - 1,
        codes.data_ptr(), levels.data_ptr(), added.data_ptr(), threads,
    )  # fmt: skip
    if added is not errors:
        errors.copy_(added)
    return codes.t(), levels.t()
