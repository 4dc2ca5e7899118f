"""A function in a process of its own."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tersor.apart import EndedError, NoTimeError, apart
from tersor.errors import TersorError


def _refuse(parent: int) -> None:
    raise TersorError(f"not in {parent}: {os.getpid() != parent}, with {torch.get_num_threads()} threads")


def test_its_reason_is_told() -> None:
    with pytest.raises(TersorError, match=f"not in {os.getpid()}: True, with {torch.get_num_threads()} threads"):
        apart(_refuse, os.getpid())


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(EndedError, match="status 3"):
        apart(os._exit, 3)


def test_it_ends_at_the_deadline() -> None:
    with pytest.raises(NoTimeError):
        apart(time.sleep, 600, deadline=time.monotonic() + 0.1)
