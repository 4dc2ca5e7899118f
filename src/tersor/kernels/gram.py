"""Half of Σ x xᵀ, for 16-bit inputs on a GPU's tensor cores: see gram_triton.py."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


def has_kernel(x: Tensor) -> bool:
    """Whether inputs x can be taken here: 16 bits, on a GPU that multiplies these on tensor cores, with triton installed."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16) or importlib.util.find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(x.device) >= (8, 0)


def add_gram(total: Tensor, x: Tensor) -> None:
    """total += xᵀ x on and below the diagonal; above it, anything. total float64 [columns, columns], x [tokens, columns].

    The sums over up to 2048 tokens are float32.
    """
    from tersor.kernels import gram_triton

    gram_triton.add_gram(total, x)


def mirror(total: Tensor, size: int = 4096) -> None:
    """Copy the part below the diagonal to the part above, `size` columns at a time, so that no second matrix is needed."""
    for start in range(0, len(total), size):
        part = slice(start, start + size)
        total[part, start + size :] = total[start + size :, part].t()
        square = total[part, part]
        square.copy_(square.tril() + square.tril(-1).t())
