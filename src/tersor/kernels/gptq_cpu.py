"""The loops of GPTQ on a CPU in compiled code (`gptq_cpu.cpp`), which needs a C++ compiler.

`solve_block` gives what gptq_solver.solve_block does bit for bit (gptq_block.py is its form for GPUs); `best_grids` chooses
among the candidates of grid.fit_grid, whose errors it sums up in an order of its own.
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
        found.tersor_best_grid.argtypes = [pointer, *[integer] * 3, *[pointer] * 2, integer, pointer, ctypes.c_float]
        found.tersor_best_grid.argtypes += [pointer, ctypes.c_int]
        found.tersor_best_grid.restype = None
    return found


def takes(W: Tensor) -> bool:
    """Whether numbers of this kind are taken: float32 on a CPU, and a compiler is there."""
    return W.device.type == "cpu" and W.dtype == torch.float32 and W.numel() > 0 and _library() is not None


def solve_block(W: Tensor, U: Tensor, scale: Tensor, zero: Tensor, bits: Bits, errors: Tensor) -> tuple[Tensor, Tensor]:
    """As gptq_solver.solve_block without a pruner: codes, uint8, and levels, both [rows, width]; adds to errors [rows]."""
    compiled = _library()
    assert compiled is not None
    rows, width = W.shape
    if U.shape != (width, width) or scale.shape != W.shape or zero.shape != W.shape or errors.shape != (rows,):
        raise ValueError(f"no block of W {list(W.shape)}, U {list(U.shape)}, scale {list(scale.shape)}")
    w, scale, zero, U = (each.contiguous() for each in (W.t(), scale.t(), zero.t(), U))
    codes, levels = torch.empty(width, rows, dtype=torch.uint8), torch.empty(width, rows)
    added = errors.contiguous()
    compiled.tersor_gptq_block(
        w.data_ptr(), U.data_ptr(), scale.data_ptr(), zero.data_ptr(), width, rows, _largest(bits),
        codes.data_ptr(), levels.data_ptr(), added.data_ptr(), _threads(rows * width * width // 2),
    )  # fmt: skip
    if added is not errors:
        errors.copy_(added)
    return codes.t(), levels.t()


def best_grids(x: Tensor, scale: Tensor, zero: Tensor, bits: Bits, weights: Tensor | None) -> Tensor:
    """Which candidate [rows, 1], int64, has the least squared error for each row of x [rows, columns]; of equal ones, the first.

    scale, zero [rows, candidates]. weights [columns]: the cost of an error in each column; None: all cost the same.
    """
    compiled = _library()
    assert compiled is not None
    (rows, columns), count = x.shape, scale.shape[1]
    if (
        scale.shape != (rows, count)
        or zero.shape != scale.shape
        or (weights is not None and weights.shape != (columns,))
    ):
        raise ValueError(f"no search for x {list(x.shape)}, scale {list(scale.shape)}, zero {list(zero.shape)}")
    x = x if x.stride(1) == 1 else x.contiguous()
    costs = torch.ones(columns) if weights is None else weights.float().contiguous()
    scale, zero = scale.contiguous(), zero.contiguous()
    best = torch.empty(rows, 1, dtype=torch.int64)
    compiled.tersor_best_grid(
        x.data_ptr(), x.stride(0), rows, columns, scale.data_ptr(), zero.data_ptr(), count, costs.data_ptr(),
        _largest(bits), best.data_ptr(), _threads(rows * columns * count),
    )  # fmt: skip
    return best


def _largest(bits: Bits) -> int:
    """The largest code, as the compiled code takes it."""
    return 0 if bits == "ternary" else levels_of(bits) - 1


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _WORTH_THREADS else 1
