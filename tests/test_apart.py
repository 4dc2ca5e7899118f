"""A function in a process of its own."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tersor.apart import EndedError, NoTimeError, apart
from tersor.errors import TersorError


def _facts(tensor: torch.Tensor) -> tuple[int, int, float]:
    return os.getpid(), torch.get_num_threads(), float(tensor.sum())


def _refuse(what: str) -> None:
    raise TersorError(f"{what} is refused")


def test_it_answers_from_another_process_with_as_many_threads() -> None:
    process, threads, total = apart(_facts, torch.ones(3))
    assert process != os.getpid()
    assert threads == torch.get_num_threads()
    assert total == 3


def test_its_reason_is_told() -> None:
    with pytest.raises(TersorError, match="this is refused"):
        apart(_refuse, "this")


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(EndedError, match="status 3"):
        apart(os._exit, 3)


def test_it_ends_at_the_deadline() -> None:
    with pytest.raises(NoTimeError):
        apart(time.sleep, 600, deadline=time.monotonic() + 0.1)
