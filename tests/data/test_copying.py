"""Copying: the answers are the symbols of the sequence, in their order."""

from __future__ import annotations

import pytest
import torch

from tersor.data.copying import make_copying
from tersor.errors import TersorError


@pytest.mark.parametrize("selective", [False, True])
def test_the_symbols_in_order_are_the_answers(selective: bool) -> None:
    ids, answers = make_copying(200, length=12, symbols=5, kinds=6, selective=selective, seed=1)
    assert ids.shape == (200, 17)
    assert (ids[:, 12:] == 7).all()
    for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        assert [token for token in row if token < 6] == answer


def test_copied_symbols_come_first_and_selected_ones_anywhere() -> None:
    plain, _ = make_copying(300, length=12, symbols=5, seed=2)
    chosen, _ = make_copying(300, length=12, symbols=5, selective=True, seed=2)
    assert (plain[:, :5] < 8).all()
    assert (plain[:, 5:12] == 8).all()
    assert ((chosen[:, :12] < 8).any(0)).all()


def test_a_seed_draws_the_same_again() -> None:
    assert torch.equal(make_copying(9, selective=True, seed=5)[0], make_copying(9, selective=True, seed=5)[0])
    assert not torch.equal(make_copying(9, seed=5)[1], make_copying(9, seed=6)[1])


def test_refuses_more_symbols_than_places() -> None:
    with pytest.raises(TersorError, match="not 3, 8, 5 and 4"):
        make_copying(3, length=4, symbols=5)
