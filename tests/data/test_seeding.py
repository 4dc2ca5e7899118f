from __future__ import annotations

import torch

from tersor.data.seeding import mixed_seed


def test_every_number_counts_for_torch() -> None:
    seeds = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 0, 0)]
    draws = {torch.rand((), generator=torch.Generator().manual_seed(mixed_seed(*numbers))).item() for numbers in seeds}
    assert len(draws) == len(seeds)
