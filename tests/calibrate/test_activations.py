"""Activations that wait elsewhere come back as they were, whatever becomes of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tersor.calibrate.activations import PLACES, SMALLEST, Activations


@pytest.mark.parametrize("place", PLACES)
def test_come_back_as_they_were(place: str) -> None:
    store = Activations(place)
    large, small = torch.randn(2, SMALLEST), torch.randn(3)
    values = {"large": (large, small), "whole": torch.arange(2 * SMALLEST)}
    expected = [large.clone(), small.clone()]
    for _ in range(2):
        store.put(values)
        store.put(values)
        assert (large.numel() == 0) is (place == "disk")
        store.get(values)
        assert torch.equal(large, expected[0])
        assert torch.equal(small, expected[1])
    store.close()


def test_one_that_is_never_fetched_is_not_mistaken_for_another() -> None:
    """A new tensor often gets the identity of one that has just ended."""
    store = Activations("disk")

    def wait_forever(seed: int) -> int:
        lost = torch.full((SMALLEST,), float(seed))
        store.put(lost)
        return id(lost)

    lost = {wait_forever(seed) for seed in range(20)}
    kept: list[Tensor] = [torch.full((SMALLEST,), 100.0 + n) for n in range(50)]
    assert lost & {id(each) for each in kept}
    store.put(kept)
    store.get(kept)
    assert all(torch.equal(each, torch.full((SMALLEST,), 100.0 + n)) for n, each in enumerate(kept))
    assert store._folder is not None
    assert not list(Path(store._folder.name).iterdir())
    store.close()
