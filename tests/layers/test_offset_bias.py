from __future__ import annotations

import itertools

import pytest
import torch

from tersor.layers.offset_bias import offset_index, resize_table


@pytest.mark.parametrize(("side", "stride"), [(7, 1), (4, 1), (14, 2), (7, 2), (1, 2)])
def test_offsets_are_numbered_by_first_appearance(side: int, stride: int) -> None:
    queries = itertools.product(range(0, side, stride), repeat=2)
    numbers: dict[tuple[int, int], int] = {}
    expected = []
    for (qy, qx), (ky, kx) in itertools.product(queries, itertools.product(range(side), repeat=2)):
        expected.append(numbers.setdefault((abs(qy - ky), abs(qx - kx)), len(numbers)))
    assert offset_index(side, stride).flatten().tolist() == expected
    assert len(numbers) == side * side


def test_a_resized_table_keeps_a_constant_and_its_own_size() -> None:
    table = torch.randn(2, 16)
    assert resize_table(table, 4) is table
    torch.testing.assert_close(resize_table(torch.full((2, 16), 0.5), 7), torch.full((2, 49), 0.5))
