"""What a packed matmul's launch hands to `work_list.cuh`: how the work is cut, and the memory through which blocks add up."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

PARTIALS, COUNTERS = 2 * 256 * 128, 64  # a multiprocessor: sums of the tiles that its blocks share, teams of threads


class Shape(ctypes.Structure):
    """`Shape` of work_list.cuh."""

    _fields_ = [
        (name, ctypes.c_uint32)
        for name in ("rows", "outputs", "inputs", "row_tiles", "weight_blocks", "k_tiles", "k_stages", "run_tiles")
    ]


@functools.cache
def processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums of the tiles that blocks share (two a block at most), and the counters of those who have arrived.

    There is one per device, because launches on one stream follow each other. Do not run the kernels on two streams of a device
    at once.
    """
    partials = torch.empty(processors(device) * PARTIALS, dtype=torch.float32, device=device)
    return partials, torch.zeros(processors(device) * COUNTERS, dtype=torch.int32, device=device)
