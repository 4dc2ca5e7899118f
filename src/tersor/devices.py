"""The device and the dtype that a user names, and the memory that is held on a device."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from tersor.errors import TersorError

DType = str | torch.dtype  # "auto", a name such as "float32", or the dtype itself


def name_of_dtype(dtype: DType) -> str:
    """ "float32" for torch.float32; a name as it is."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def pick_device(device: str) -> torch.device:
    """auto: the GPU where there is one. Raises TersorError where this machine cannot run on the device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise TersorError(f"{device!r} is no device; use auto, cpu, cuda or cuda:N") from None
    if picked.type not in ("cpu", "cuda"):
        raise TersorError(f"device {device!r} is none that tersor runs on; use auto, cpu, cuda or cuda:N")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise TersorError(f"device {device}: this machine has no usable CUDA GPU")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise TersorError(f"device {device}: this machine has {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return picked


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the GPU's allocator held, or the most that this process had resident. On Linux that is VmHWM: a
    spawned process inherits its parent's `ru_maxrss`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    told = proc_kilobytes("self/status", "VmHWM")
    if told is not None:
        return 1024 * told
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def memory_now(device: torch.device) -> int:
    """Bytes: what the GPU's allocator holds, or what this process has resident; its peak where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return peak_memory(device)


def memory_total(device: torch.device) -> int | None:
    """Bytes that the GPU or this machine has; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, AttributeError, OSError):
        return None


def proc_kilobytes(file: str, name: str) -> int | None:
    """The number of a line `NAME: ... kB` in a file of /proc, as Linux has them; None where there is none."""
    try:
        lines = Path("/proc", file).read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration, ValueError):
        return None
