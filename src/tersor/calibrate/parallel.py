"""Several processes on one calibration job: who has which samples, and one set of statistics out of everybody's.

Built on torch.distributed. Every process runs the same code and knows itself by its rank; where no process group was started,
there is one process, of rank 0, and everything here does nothing. A process that waits for another that has ended gets a
LostProcessError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from tersor.calibrate.hessian import Hessian
from tersor.errors import TersorError

T = TypeVar("T")


class LostProcessError(TersorError):
    """Another process of the job is gone."""


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes, prints and verifies."""
    return rank() == 0


def share(samples: Sequence[T]) -> list[T]:
    """The samples of this process: sample i belongs to rank i mod processes."""
    return list(samples[rank() :: processes()])


def sample_number(n: int) -> int:
    """The number among all samples of the n-th of this process."""
    return n * processes() + rank()


def agree(value: T) -> T:
    """The first process's value, for all."""
    if processes() == 1:
        return value
    box = [value]
    with _together():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def once(work: Callable[[], T]) -> T:
    """What `work` gives on the first process, for all; so is the TersorError that it raises."""
    if processes() == 1:
        return work()
    result: tuple[T | None, TersorError | None] = (None, None)
    if is_first():
        try:
            result = (work(), None)
        except TersorError as error:
            result = (None, error)
    value, failure = agree(result)
    if failure is not None:
        raise failure
    return cast(T, value)


def gather(value: T) -> list[T]:
    """Every process's value, by rank."""
    if processes() == 1:
        return [value]
    box = [value] * processes()
    with _together():
        dist.all_gather_object(box, value)
    return box


def send(tensor: Tensor, source: int) -> None:
    """Fill `tensor` on every process with what it holds on rank `source`."""
    with _together():
        dist.broadcast(tensor, src=source)


def combine(hessians: Mapping[str, Hessian], device: torch.device) -> dict[str, Hessian]:
    """The Hessians over all samples from those over each process's share; the totals that it is given are summed in place.

    Linear maps whose inputs are one tensor share one Hessian, which is summed once. One that no sample of a process reached
    counts as zeros there. Adding in another order changes nothing: see `hessian.py`.
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
        # Two maps share where they do so on every process that reached them.
        key = (len(own.total), *(each[n][0] for each in everyone))
        if key not in combined:
            whole = Hessian(0, dtype=own.dtype)
            whole.total = own.total.to(device, copy=id(own) in taken)
            whole.samples, whole.tokens = sum(each[n][1] for each in everyone), sum(each[n][2] for each in everyone)
            whole.weight = sum(each[n][3] for each in everyone)
            taken.add(id(own))
            if whole.tokens:
                with _together():
                    dist.all_reduce(whole.total)
                if any(each[n][4] for each in everyone):
                    part = torch.zeros_like(whole.total) if own.deviation is None else own.deviation
                    whole.deviation = part.to(device, copy=True)
                    with _together():
                        dist.all_reduce(whole.deviation)
            combined[key] = whole
        result[name] = combined[key]
    return result


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what all backends raise where a connection is lost or a peer does not come
        raise LostProcessError(
            f"another process of this job has ended ({str(error).splitlines()[0]}); "
            "finished blocks are kept, and the same command goes on from there"
        ) from error
