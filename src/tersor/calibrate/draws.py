"""Random numbers that a model draws while it runs, also in eval mode (a mask, a noise): the same in every run of a sample.

Samples run side by side, and each block runs more than once. So each sample has random states of its own. They replace the
process's while the sample's code runs; afterwards the process's own go on as if nothing had run.
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

PROBE = 0  # the seed of the probe; calibration samples have 1, 2, ...


@dataclass(frozen=True)
class State:
    """The states of all generators that models draw from."""

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
    """The code in this context draws random numbers from this state or seed on."""
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
