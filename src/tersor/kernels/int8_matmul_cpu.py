"""The product of 8-bit activations and 8-bit weights on a CPU: the packed weight, and the call of `int8_matmul_cpu.cpp`, which
describes both. The results equal `int8_matmul.reference` bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tersor.kernels import cpp
from tersor.kernels import quantized_matmul_cpu as cpu

SOURCE = Path(__file__).with_suffix(".cpp")
PANEL = 16  # outputs side by side in memory
GROUP = 32  # outputs are filled up to a multiple of it
_WORTH_THREADS = 2**21  # multiply-adds; for fewer, waking threads costs more than they save
_TYPES = {torch.float32: 0, torch.bfloat16: 1}

FLAGS = {  # best first
    "avx512_vnni": (*cpu.FLAGS["avx512"], "-mavx512vnni"),
    **{name: cpu.FLAGS[name] for name in ("avx512", "avx2", "portable")},
}


class Call(ctypes.Structure):
    """`Call` of the .cpp file."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("type", ctypes.c_int),
        ("threads", ctypes.c_int),
    )


def supported() -> list[str]:
    """The implementations that this processor can run, best first, even without a compiler."""
    found = [name for name in cpu.supported() if name in FLAGS]
    vnni = "avx512" in found and torch.cpu.get_capabilities().get("avx512_vnni", False)
    return ["avx512_vnni", *found] if vnni else found


@functools.cache
def library(implementation: str) -> ctypes.CDLL:
    """The compiled kernel for one instruction set. Raises cpp.CompileError."""
    compiled = cpp.load(SOURCE, FLAGS[implementation])
    compiled.tersor_int8_matmul.argtypes = [ctypes.POINTER(Call)]
    return compiled


@functools.cache
def choose() -> str | None:
    """The best implementation that this processor runs and the compiler builds, or None."""
    for name in supported():
        try:
            library(name)
        except (cpp.CompileError, OSError):
            continue
        return name
    return None


def pack(codes: Tensor) -> Tensor:
    """int8 [out, in] as the kernel reads it: int8 [panels, pairs of inputs, 16, 2], padded with zeros."""
    rows, columns = codes.shape
    full = torch.nn.functional.pad(codes, (0, columns % 2, 0, -rows % GROUP))
    return full.view(-1, PANEL, full.shape[1] // 2, 2).transpose(1, 2).contiguous()


def unpack(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Inverse of `pack`: int8 [out, in]."""
    return packed.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features, :in_features].contiguous()


def matmul(x: Tensor, packed: Tensor, scales: Tensor, implementation: str) -> Tensor:
    """x [..., in] float32 or bfloat16 -> y [..., out] in x's dtype. packed: from `pack`; scales: float32 [out], contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    y = x.new_empty((*x.shape[:-1], len(scales)))
    small = rows.numel() * len(scales) < _WORTH_THREADS
    call = Call(
        x=rows.data_ptr(),
        x_stride=rows.stride(0),
        y=y.data_ptr(),
        rows=rows.shape[0],
        inputs=rows.shape[1],
        outputs=len(scales),
        packed=packed.data_ptr(),
        scales=scales.data_ptr(),
        type=_TYPES[x.dtype],
        threads=1 if small else torch.get_num_threads(),
    )
    if library(implementation).tersor_int8_matmul(call) != 0:
        raise MemoryError(f"no memory for a product of {rows.shape[0]} rows")
    return y
