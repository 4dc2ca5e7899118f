"""Several processes on one calibration: which samples each has, and one set of statistics made from all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from tersor.calibrate.hessian import Hessian
from tersor.processes import gather, processes, rank, together

T = TypeVar("T")


def share(samples: Sequence[T]) -> list[T]:
    """The samples of this process: sample i belongs to rank i mod processes."""
    return list(samples[rank() :: processes()])


def sample_number(n: int) -> int:
    """The number, among all samples, of the n-th sample of this process."""
    return n * processes() + rank()


def combine(hessians: Mapping[str, Hessian], device: torch.device) -> dict[str, Hessian]:
    """The Hessians over all samples, from each process's own. Sums the given totals in place.

    Linear maps with the same input share one Hessian, which is summed once. Where no sample of a process reached a map, that
    process adds zeros. The order of adding changes nothing: see `hessian.py`.
    """
    if processes() == 1:
        return dict(hessians)
    first = {id(hessian): n for n, hessian in reversed(list(enumerate(hessians.values())))}
    everyone = gather(
        [
            (first[id(h)] if h.tokens else -1, h.samples, h.tokens, h.weight, h.deviation is not None)
            for h in hessians.values()
        ]
    )
    combined: dict[tuple[int, ...], Hessian] = {}
    taken: set[int] = set()
    result: dict[str, Hessian] = {}
    for n, (name, own) in enumerate(hessians.items()):
        # Two maps share one only where they do so on every process that reached them.
        key = (len(own.total), *(each[n][0] for each in everyone))
        if key not in combined:
            whole = Hessian(0, dtype=own.dtype)
            whole.total = own.total.to(device, copy=id(own) in taken)
            whole.samples, whole.tokens = sum(each[n][1] for each in everyone), sum(each[n][2] for each in everyone)
            whole.weight = sum(each[n][3] for each in everyone)
            taken.add(id(own))
            if whole.tokens:
                with together():
                    dist.all_reduce(whole.total)
                if any(each[n][4] for each in everyone):
                    part = torch.zeros_like(whole.total) if own.deviation is None else own.deviation
                    whole.deviation = part.to(device, copy=True)
                    with together():
                        dist.all_reduce(whole.deviation)
            combined[key] = whole
        result[name] = combined[key]
    return result
