"""Holes in sequences: what the model sees of them, what it is asked, how many there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tersor.data.denoising import (
    Denoising,
    DenoisingConfig,
    bernoulli_mask,
    denoise_numbers,
    denoise_tokens,
    next_element,
    pixel_class,
    span_mask,
)
from tersor.errors import TersorError


def test_hidden_numbers_are_zero_and_marked_the_others_untouched() -> None:
    x, mask = torch.rand(12, 2) + 0.5, bernoulli_mask(12, 0.5, np.random.RandomState(0))
    inputs, target = denoise_numbers(x, mask)
    hidden = mask[:, 0] == 1
    assert 0 < hidden.sum() < 12
    assert torch.equal(inputs[hidden], torch.tensor([0.0, 0.0, 1.0]).expand(int(hidden.sum()), 3))
    assert torch.equal(inputs[~hidden], torch.cat((x, torch.zeros(12, 1)), 1)[~hidden])
    assert torch.equal(target[hidden], x[hidden])
    assert (target[~hidden] == -10_000).all()


def test_hidden_tokens_become_the_mask_token_and_padding_may_be_hidden() -> None:
    ids = torch.tensor([5, 6, 1, 1])
    inputs, target = denoise_tokens(ids, torch.tensor([[1.0], [0], [1], [0]]))
    assert inputs.tolist() == [0, 6, 0, 1]
    assert target.tolist() == [5, -100, 1, -100]


def test_the_next_element_is_asked_everywhere_but_at_the_last() -> None:
    assert next_element(torch.tensor([4, 5, 6]))[1].tolist() == [5, 6, -100]
    assert next_element(torch.tensor([[0.5], [1.0]]))[1].tolist() == [1.0, -10_000]
    assert next_element(torch.tensor([[1.0], [-1.0]]), pixel_classes=True)[1].tolist() == [0, -100]


def test_every_grey_value_comes_back_from_minus_one_to_one() -> None:
    grey = torch.arange(256)
    assert torch.equal(pixel_class(grey.float() / 255 * 2 - 1), grey)


def test_single_positions_are_hidden_at_the_ratio() -> None:
    random = np.random.RandomState(0)
    share = torch.stack([bernoulli_mask(100, 0.15, random) for _ in range(400)]).mean()
    assert abs(share - 0.15) < 4 * (0.15 * 0.85 / 40_000) ** 0.5


@pytest.mark.parametrize(("length", "ratio", "span"), [(100, 0.5, 5), (64, 0.3, 0.1), (30, 0.4, 1)])
def test_spans_hide_an_exact_number_of_positions(length: int, ratio: float, span: float) -> None:
    random = np.random.RandomState(0)
    s = int(span * length) if span < 1 else int(span)
    for _ in range(50):
        mask = span_mask(length, ratio, span, random)
        assert mask.shape == (length, 1)
        assert mask.sum() == int(length * ratio / s) * s


def test_spans_that_find_no_room_are_refused() -> None:
    with pytest.raises(TersorError, match="9 spans of 1 do not find room in 10 positions"):
        span_mask(10, 0.99, 1, np.random.RandomState(0))
    with pytest.raises(TersorError, match="a span of 30 covers 30 of 20"):
        span_mask(20, 0.5, 30, np.random.RandomState(0))


def test_masks_follow_from_seed_epoch_and_index_alone() -> None:
    labelled = [{"x": torch.arange(3, 40), "lengths": torch.tensor(5), "target": torch.tensor(1)}] * 3
    data = Denoising(labelled, DenoisingConfig(ratio=0.4, seed=1))
    first = [data[i]["x"] for i in range(3)]
    assert data[0].keys() == {"x", "target"}
    assert not torch.equal(first[0], first[1])
    assert torch.equal(data[1]["x"], first[1])
    data.set_epoch(1)
    assert not torch.equal(data[1]["x"], first[1])
    spans = Denoising(labelled, DenoisingConfig(ratio=0.4, span=4))
    assert (spans[0]["target"] != -100).sum() == 12  # 3 spans of 4 in 37 positions


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"objective": "both"}, "not 'both'"), ({"ratio": 1.0}, "positions is 1.0"), ({"span": -1}, "span is -1")],
)
def test_a_wrong_setting_is_named(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(TersorError, match=said):
        DenoisingConfig(**wrong)  # type: ignore[arg-type]
