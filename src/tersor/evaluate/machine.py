"""What this machine offers to tersor, which kernels run on it and how fast, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from tersor.devices import memory_total, pick_device, proc_kilobytes
from tersor.formats.packing import packed_size
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels import cpp
from tersor.kernels import int8_matmul as int8_kernel
from tersor.kernels import quantized_matmul_cpu as cpu_kernel
from tersor.kernels import quantized_matmul_int4 as int4_kernel
from tersor.kernels import tiled_weight as gpu_kernel
from tersor.kernels.quantized_matmul import prepare, quantized_matmul
from tersor.kernels.quantized_matmul_cuda import instruction_of
from tersor.version import __version__

FEATURES = {  # torch's names by those that people know
    "AVX2": ("avx2", "fma3"),
    "AVX-512": ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"),
    "AVX-512 VNNI": ("avx512_vnni",),
    "AVX-512 BF16": ("avx512_bf16",),
    "AMX": ("amx_tile", "amx_bf16"),
}
REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
EXTRAS = {  # extra: its package, and what it is for
    "hub-data": ("datasets", "calibration texts from hub data sets"),
    "images": ("pillow", "images from files"),
    "video": ("av", "MP4 and other films"),
    "audio": ("soundfile", "recordings from files, at any rate"),
    "meshes": ("trimesh", "point clouds and meshes, from files and as files"),
    "compressed-tensors": ("compressed-tensors", "loading compressed-tensors checkpoints with transformers itself"),
    "gguf": ("gguf", "`tersor export` to GGUF, and reading types such as the K types"),
    "graphs": ("torch_geometric", "checkpoints and data of torch_geometric"),
    "control": ("gymnasium", "environments, for policies that learn by acting"),
    "power": ("pandapower", "power flow beside that of `tersor.data.restoration`"),
    "plots": ("matplotlib", "pictures of forecasts, of samples and of what was lost where"),
    "tables": ("pandas", "tables from CSV and Parquet files"),
    "report": ("plotly", "`tersor report`, pages about compressed models"),
    "ray": ("ray", "sweeps on a Ray cluster"),
    "lm-eval": ("lm-eval", "`tersor eval --tasks`: EleutherAI's harness"),
    "tensorboard": ("tensorboard", "`tersor train --tensorboard`"),
    "onnx": ("onnxruntime", "`tersor export --onnx`"),
}
BITS = (4, 8, 3, 2)
SIZE, GROUP = 4096, 128  # what is measured: 4096 x 4096 in groups of 128
ROWS = (1, 64)
_TURNS = {1: 9, 64: 3}
_SECONDS = 0.3  # after which no more turns of a table row begin


@dataclass(frozen=True)
class Kernel:
    """How weights of so many bits are multiplied here."""

    bits: int
    implementation: str  # what multiplies by such a weight
    why_not: str | None  # why no faster one does; None where the fastest runs
    speedup: dict[int, float]  # over F.linear in `Machine.dtype`, by rows of x
    milliseconds: dict[int, float]  # of one product, by rows of x


@dataclass(frozen=True)
class Gpu:
    """A GPU."""

    name: str
    memory: int  # bytes
    capability: str  # NVIDIA's version of the architecture
    kernel: str | None  # the instruction with which the packed kernel multiplies there; None where there is no kernel


@dataclass(frozen=True)
class Machine:
    """What `tersor doctor` shows."""

    system: str
    processor: str
    features: dict[str, bool]
    cores: int
    threads: int
    memory: int | None  # bytes; None where the system does not tell
    memory_available: int | None  # likewise
    compiler: str | None  # None where `compiler_missing` says why
    compiler_missing: str | None
    kernel_cache: str
    kernel_cache_writable: bool
    gpus: list[Gpu]
    versions: dict[str, str | None]  # by package; None where it is not installed
    extras: dict[str, str | None]  # by extra, likewise
    device: str
    dtype: str
    dense: dict[int, float]  # milliseconds of F.linear, by rows of x
    kernels: list[Kernel]


def examine() -> Machine:
    """Look at this machine. Measures for a second or two (longer where layers must be dequantized), and compiles the kernel
    where that was never done."""
    has = torch.cpu.get_capabilities()
    features = {name: all(bool(has.get(part, False)) for part in parts) for name, parts in FEATURES.items()}
    arm = platform.machine().lower() in ("arm64", "aarch64")
    features["NEON"] = arm  # a part of that architecture
    try:
        path, version = cpp.compiler()
        compiler, missing = f"{path}: {version.splitlines()[0]}", None
    except cpp.CompileError as error:
        compiler, missing = None, str(error)
    device = pick_device("auto")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # what `tersor.load` chooses for most models
    dense, kernels = _measure(device, dtype)
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}, Python {platform.python_version()}",
        processor=str(has.get("cpu_name") or platform.processor() or platform.machine()),
        features=features,
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=memory_total(torch.device("cpu")),
        memory_available=memory_available(),
        compiler=compiler,
        compiler_missing=missing,
        kernel_cache=str(cpp.CACHE),
        kernel_cache_writable=_writable(cpp.CACHE),
        gpus=[_gpu(n) for n in range(torch.cuda.device_count())],
        versions={"tersor": __version__, **{name: _version(name) for name in REQUIRED}},
        extras={extra: _version(package) for extra, (package, _) in EXTRAS.items()},
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        dense=dense,
        kernels=kernels,
    )


def advice(machine: Machine) -> list[str]:
    """What is missing, what that costs, and how to get it: a sentence each, the most important first."""
    said = []
    if machine.compiler_missing is not None:
        way = (
            "run tersor in WSL, which has one"
            if machine.system.startswith("Windows")
            else "install g++ or clang++: `apt install g++` on Debian and Ubuntu, `dnf install gcc-c++` on Fedora, "
            "`xcode-select --install` on macOS; tersor finds it by itself"
        )
        said.append(
            f"{machine.compiler_missing}: packed layers on the CPU are dequantized at every call, which makes them slower than "
            "the original (with --dtype bfloat16, symmetric ones of 2 to 4 bits run on torch's int4 operator). To have the "
            f"kernel, {way}"
        )
    elif not machine.features["AVX2"] and not machine.features["NEON"]:
        said.append(
            "the processor has no AVX2: the portable kernel runs, at the speed shown; a newer processor is the only way out"
        )
    if machine.compiler is not None and not machine.kernel_cache_writable:
        said.append(
            f"{machine.kernel_cache} cannot be written: the kernel is compiled anew by every process; make it writable"
        )
    for each in machine.gpus:
        if each.kernel is None:
            said.append(
                f"tersor has no packed kernel for {each.name} (capability {each.capability}; it needs NVIDIA's 8.0 or "
                "newer): packed layers save memory there, but are dequantized at every call"
            )
    if not machine.gpus:
        said.append("torch sees no GPU: everything runs on the CPU")
    missing = [extra for extra, version in machine.extras.items() if version is None]
    if missing:
        said.append(
            f"extras not installed: {', '.join(missing)}; pip install 'tersor[{','.join(missing)}]' adds them all"
        )
    return said


def _measure(device: torch.device, dtype: torch.dtype) -> tuple[dict[int, float], list[Kernel]]:
    for bits in BITS:  # an operator's first call does more than multiply
        tiny = torch.ones(1, GROUP, dtype=dtype, device=device)
        quantized_matmul(tiny, prepare(_random_weight(bits, GROUP, device)))
    weights = {bits: _random_weight(bits, SIZE, device) for bits in BITS}
    prepared = {bits: prepare(weight) for bits, weight in weights.items()}
    dense = torch.empty(SIZE, SIZE, dtype=dtype, device=device).uniform_(-1, 1)
    times: dict[int, dict[int, list[float]]] = {}
    for rows in ROWS:
        x = torch.empty(rows, SIZE, dtype=dtype, device=device).uniform_(-1, 1)
        calls: dict[int, Callable[[], object]] = {0: lambda x=x: F.linear(x, dense)}  # type: ignore[misc]
        for bits, weight in prepared.items():
            calls[bits] = lambda x=x, weight=weight: quantized_matmul(x, weight)  # type: ignore[misc]
        with torch.no_grad():
            times[rows] = _take_turns(calls, _TURNS[rows], device)
    kernels = [
        Kernel(
            bits=bits,
            implementation=_implementation(weight),
            why_not=_why_not(weights[bits]) if isinstance(weight, QuantizedWeight | int4_kernel.Int4Weight) else None,
            speedup={
                rows: statistics.median(d / q for d, q in zip(found[0], found[bits], strict=True))
                for rows, found in times.items()
            },
            milliseconds={rows: 1e3 * statistics.median(found[bits]) for rows, found in times.items()},
        )
        for bits, weight in prepared.items()
    ]
    return {rows: 1e3 * statistics.median(found[0]) for rows, found in times.items()}, kernels


def _random_weight(bits: int, size: int, device: torch.device) -> QuantizedWeight:
    """Symmetric, as GPTQ's default; the time does not depend on the values."""
    words = torch.randint(-(2**31), 2**31, (packed_size(size, bits), size), dtype=torch.int32)
    scales = torch.full((size // GROUP, size), 0.01, dtype=torch.float16)
    zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedWeight(words, scales, zeros, None, bits, GROUP, size).to(device)


def _take_turns(calls: dict[int, Callable[[], object]], turns: int, device: torch.device) -> dict[int, list[float]]:
    """Seconds of every turn, in which all run once, one after another. The first turn fills caches and counts only where
    there is no time for another."""
    seconds: dict[int, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for _ in range(turns + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
        if time.perf_counter() - began > _SECONDS:
            break
    return {name: found[1:] or found for name, found in seconds.items()}


def _implementation(weight: object) -> str:
    if isinstance(weight, cpu_kernel.PanelWeight):
        return f"compiled kernel, {weight.implementation}"
    if isinstance(weight, int8_kernel.Int8Weight):
        return f"products of 8-bit integers, {weight.implementation}"
    if isinstance(weight, gpu_kernel.TiledWeight):
        return f"GPU kernel, {instruction_of(weight.tiles.device)}"
    if isinstance(weight, int4_kernel.Int4Weight):
        return "torch's int4 operator in bfloat16, dequantization in float32"
    return "dequantization, then F.linear"


def _why_not(weight: QuantizedWeight) -> str:
    if weight.qweight.device.type == "cpu":
        return cpu_kernel.why_not(weight) or "unknown"
    return gpu_kernel.why_not(weight) or "the GPU kernel needs an NVIDIA GPU of compute capability 8.0 or newer"


def _gpu(number: int) -> Gpu:
    found = torch.cuda.get_device_properties(number)
    kernel = instruction_of(torch.device("cuda", number))
    return Gpu(found.name, int(found.total_memory), f"{found.major}.{found.minor}", kernel)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory_available() -> int | None:
    """The memory that new work can have without swapping; only Linux tells without a package."""
    told = proc_kilobytes("meminfo", "MemAvailable")
    return None if told is None else 1024 * told


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder that may not exist yet."""
    return os.access(next(each for each in (folder, *folder.parents) if each.exists()), os.W_OK)
