"""Associative recall and induction heads: the answer is in the sequence, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from tersor.data.recall import make_induction, make_recall
from tersor.errors import TersorError


def test_the_value_of_the_asked_key_is_the_answer() -> None:
    ids, answers = make_recall(200, length=20, keys=10, seed=1)
    assert ids.shape == (200, 21)
    for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        pairs = list(zip(row[0:-1:2], row[1:-1:2], strict=True))
        assert all(key < 10 <= value < 20 for key, value in pairs)
        assert len(dict(pairs)) == len(set(pairs))  # a key has one value
        assert dict(pairs)[row[-1]] == answer


def test_a_key_has_other_values_in_other_sequences() -> None:
    ids, answers = make_recall(2000, seed=2)
    values = answers[ids[:, -1] == 3]
    assert values.unique().tolist() == list(range(10, 20))


def test_the_token_behind_the_special_one_is_the_answer() -> None:
    ids, answers = make_induction(500, length=30, vocabulary=20, seed=3)
    assert ((ids == 19).sum(1) == 2).all()
    assert (ids[:, -1] == 19).all()
    first = (ids == 19).int().argmax(1)
    assert torch.equal(ids[torch.arange(500), first + 1], answers)
    assert answers.unique().tolist() == list(range(19))
    assert first.min() == 0
    assert first.max() == 27


@pytest.mark.parametrize("make", [make_recall, make_induction])
def test_a_seed_draws_the_same_again(make: object) -> None:
    assert callable(make)
    assert torch.equal(make(9, seed=5)[0], make(9, seed=5)[0])
    assert not torch.equal(make(9, seed=5)[0], make(9, seed=6)[0])


def test_refuses_what_cannot_be_drawn() -> None:
    with pytest.raises(TersorError, match="an even length, not 5, 3 and 7"):
        make_recall(5, length=7, keys=3)
    with pytest.raises(TersorError, match="not 5, 2, 20"):
        make_induction(5, length=2)
