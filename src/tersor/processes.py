"""The processes that share one piece of work, under torchrun: which of them this is, and how they agree.

Built on torch.distributed. Every process runs the same code and knows itself by its rank; where no process group was started,
there is one process, of rank 0, and everything here does nothing. A process that waits for another that has ended gets a
LostProcessError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from tersor.errors import TersorError

T = TypeVar("T")


class LostProcessError(TersorError):
    """Another process of the job is gone."""


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes, prints and verifies."""
    return rank() == 0


def agree(value: T) -> T:
    """The first process's value, for all."""
    if processes() == 1:
        return value
    box = [value]
    with together():
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
    with together():
        dist.all_gather_object(box, value)
    return box


def send(tensor: Tensor, source: int) -> None:
    """Fill `tensor` on every process with what it holds on rank `source`."""
    with together():
        dist.broadcast(tensor, src=source)


@contextmanager
def together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what all backends raise where a connection is lost or a peer does not come
        raise LostProcessError(
            f"another process of this job has ended ({str(error).splitlines()[0]}); "
            "finished blocks are kept, and the same command goes on from there"
        ) from error
