"""Random numbers that a model draws while it runs, also in eval mode (a mask, a noise): the same in every run of a sample.

Samples run side by side, and their blocks more than once. So each has a state of its own, which is put in the place of the
process's while its code runs; the process's own random numbers go on as if nothing had run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROBE = 0  # the seed of the sample that is compared before and after; those of calibration samples count from 1


@dataclass(frozen=True)
class State:
    """Where the generators stand from which models draw."""

    cpu: Tensor
    gpus: list[Tensor]
    numpy: Any
    python: Any


def state() -> State:
    started = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = torch.cuda.get_rng_state_all() if started else []
    return State(torch.get_rng_state(), gpus, np.random.get_state(), random.getstate())


def restore(found: State) -> None:
    torch.set_rng_state(found.cpu)
    if found.gpus:
        torch.cuda.set_rng_state_all(found.gpus)
    np.random.set_state(found.numpy)
    random.setstate(found.python)


@contextmanager
def drawing(start: State | int) -> Iterator[None]:
    """What runs here draws from this state or seed on."""
    before = state()
    try:
        if isinstance(start, State):
            restore(start)
        else:
            torch.manual_seed(start)
            np.random.seed(start)
            random.seed(start)
        yield
    finally:
        restore(before)
