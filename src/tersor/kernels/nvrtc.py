"""Compiles CUDA C++ on the user's machine by NVRTC, the compiler library that comes with torch, and launches it.

A compiled kernel is kept in the user's cache directory under a hash of its source, target and compiler, so each machine
compiles it once. Everything goes through ctypes: neither nvcc nor the CUDA headers are needed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tersor.files import replacing

CACHE = Path.home() / ".cache" / "tersor" / "kernels"
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_TENSOR_MAP_FLOAT16, _TENSOR_MAP_BFLOAT16 = 6, 9  # CUtensorMapDataType


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "0").split(".")[0]
    for name in (f"libnvrtc.so.{major}", f"nvrtc64_{major}0_0.dll", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"NVRTC for CUDA {torch.version.cuda} not found; it comes with torch as nvidia-cuda-nvrtc")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status == 0:
        return
    message = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(message))
    raise RuntimeError(f"{what}: {(message.value or b'unknown error').decode()} (CUDA driver error {status})")


def compile_source(source: str, arch: str) -> bytes:
    """The cubin of CUDA C++ `source` for `arch` ("sm_90a"), from the cache if it was compiled before.

    For a virtual architecture ("compute_80") it is PTX, which the driver compiles for any GPU of at least this capability.
    """
    nvrtc = _nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    key = hashlib.sha256(f"{arch} {major.value}.{minor.value}\n{source}".encode()).hexdigest()[:32]
    kind = "PTX" if arch.startswith("compute_") else "CUBIN"
    cached = CACHE / f"{key}.{kind.lower()}"
    if cached.exists():
        return cached.read_bytes()

    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    if status != 0:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC {major.value}.{minor.value} could not compile for {arch}:\n{log.value.decode()}")
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    try:  # another process may be doing the same
        CACHE.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as new:
            new.write_bytes(cubin.raw)
    except OSError:
        pass  # without a cache, the next process compiles again: a second
    return cubin.raw


class _LaunchAttribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = [("id", ctypes.c_uint64), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _LaunchConfig(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    ]


class TensorMap(ctypes.Structure):
    """`CUtensorMap`, 128 bytes: describes a row-major matrix of 16-bit floats to Hopper's copy engine."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


def tensor_map(matrix: Tensor, *, box_rows: int) -> TensorMap:
    """The map of `matrix` [rows, columns] in boxes of `box_rows` x 64 columns; shared memory has the 128-byte swizzle."""
    rows, columns = matrix.shape
    memory = ctypes.create_string_buffer(128 + 64)  # the driver wants 64-byte alignment, older Pythons give 16
    result = TensorMap.from_buffer(memory, -ctypes.addressof(memory) % 64)
    kind = _TENSOR_MAP_BFLOAT16 if matrix.dtype == torch.bfloat16 else _TENSOR_MAP_FLOAT16
    size, stride = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * 2)
    box, step = (ctypes.c_uint32 * 2)(64, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    swizzle_128_bytes, promote_to_256_bytes = 3, 3
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.byref(result), kind, 2, ctypes.c_void_p(matrix.data_ptr()), size, stride, box, step,
        0, swizzle_128_bytes, promote_to_256_bytes, 0,
    )  # fmt: skip
    _check(status, f"describing a {rows} x {columns} matrix to the copy engine")
    return result


_Argument = ctypes.c_void_p | ctypes.c_int | ctypes.c_longlong | ctypes.Structure


class Kernel:
    """One kernel, loaded on the current device."""

    def __init__(self, cubin: bytes, name: str, *, shared_bytes: int) -> None:
        driver = _driver()
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        torch.cuda.current_stream().synchronize()  # makes torch's context current
        _check(driver.cuModuleLoadData(ctypes.byref(module), cubin), "loading a compiled kernel")
        _check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), f"finding {name}")
        status = driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
        _check(status, f"{shared_bytes} bytes of shared memory for {name}")
        self._shared_bytes = shared_bytes

    def launch(self, *, blocks: int, threads: int, arguments: Sequence[_Argument], early: bool = True) -> None:
        """On torch's current stream. Arguments as ctypes values, in the order of the kernel's parameters.

        early: the kernel may begin before the one ahead of it in the stream has ended. It must itself wait for that one
        (`griddepcontrol.wait`, from compute capability 9.0 on) before it touches anything that a kernel writes.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        stream = torch.cuda.current_stream().cuda_stream
        attribute = _LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 1)
        config = _LaunchConfig(
            blocks, 1, 1, threads, 1, 1, self._shared_bytes, stream, ctypes.pointer(attribute), int(early)
        )
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None), "launching a kernel")
