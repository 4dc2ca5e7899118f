from __future__ import annotations

import pytest
import torch

from tersor.data.listops import PADDING, VOCABULARY, evaluate, make_listops, parse
from tersor.errors import TersorError

WORDS = {number: token for token, number in VOCABULARY.items()}


def test_samples_are_whole_expressions_with_their_answers_and_no_two_alike() -> None:
    tokens, answers = make_listops(300, min_length=8, max_length=64, seed=1)
    assert tokens.shape == (300, 63)
    for row, answer in zip(tokens, answers, strict=True):
        words = [WORDS[int(token)] for token in row[row != PADDING]]
        assert 8 < len(words) < 64
        assert (row[len(words) :] == PADDING).all()
        assert evaluate(words) == answer
    assert len({tuple(row.tolist()) for row in tokens}) == 300


def test_a_seed_says_which_samples() -> None:
    first, again, other = (make_listops(20, min_length=8, max_length=64, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_answers_are_balanced_as_in_the_published_task() -> None:
    _, answers = make_listops(600, seed=0)
    share = answers.bincount(minlength=10) / len(answers)
    assert 0.12 < share[0] < 0.23  # published 0.174
    assert 0.10 < share[9] < 0.21  # published 0.153
    assert (share[1:9] > 0.03).all()
    assert (share[1:9] < 0.14).all()


@pytest.mark.parametrize("text", ["[MAX 1 2", "1 ]", "1 2", ""])
def test_refuses_what_is_no_expression(text: str) -> None:
    with pytest.raises(TersorError):
        evaluate(parse(text))


def test_refuses_lengths_that_cannot_be() -> None:
    with pytest.raises(TersorError, match="between 9 and 10"):
        make_listops(1, min_length=9, max_length=10)
