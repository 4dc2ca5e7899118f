"""Where the calibration windows of a text lie."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.calibrate.batches import make_batches


class Numbers:
    """A tokenizer whose tokens are their own places."""

    def __init__(self, tokens: int) -> None:
        self.ids = torch.arange(tokens)[None]

    def __call__(self, text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids}


def starts(tokens: int, samples: int, length: int, seed: int) -> list[int]:
    batches = make_batches("builtin", Numbers(tokens), samples=samples, seq_len=length, seed=seed)
    for batch in batches:
        first = int(batch["input_ids"][0, 0])
        assert torch.equal(batch["input_ids"], torch.arange(first, first + length)[None])
    return [int(batch["input_ids"][0, 0]) for batch in batches]


@given(length=st.integers(1, 50), samples=st.integers(1, 40), spare=st.integers(0, 500), seed=st.integers(0, 2**31))
def test_each_lies_in_a_part_of_its_own(length: int, samples: int, spare: int, seed: int) -> None:
    tokens = length * samples + spare
    found = starts(tokens, samples, length, seed)
    for n, start in enumerate(found):
        assert n * tokens / samples - 1 < start
        assert start + length <= (n + 1) * tokens / samples + 1
    assert all(second - first >= length for first, second in itertools.pairwise(found))


@given(length=st.integers(1, 50), samples=st.integers(1, 40), spare=st.integers(0, 50), seed=st.integers(0, 2**31))
def test_a_short_text_is_used_all_over(length: int, samples: int, spare: int, seed: int) -> None:
    found = starts(length + spare, samples, length, seed)
    assert len(found) == samples
    assert found == sorted(found)
    assert 0 <= found[0] <= found[-1] <= spare


def test_the_seed_decides() -> None:
    assert starts(5000, 8, 100, seed=1) == starts(5000, 8, 100, seed=1) != starts(5000, 8, 100, seed=2)
