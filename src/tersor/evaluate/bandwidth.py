"""How many bytes a second this machine's memory moves: what bounds a model that makes one token at a time."""

from __future__ import annotations

import time

import torch

MEGABYTES, TURNS = 256, 5


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, when a tensor that no cache holds is copied with torch's threads; the best of TURNS."""
    source = torch.ones(MEGABYTES * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(TURNS + 1):  # the first fetches the pages
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best
