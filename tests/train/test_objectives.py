from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.train.objectives import (
    classification,
    forecasting,
    language_modelling,
    masked_language_modelling,
    restoration,
    segmentation,
)


class Answers(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, **inputs: Tensor) -> Any:
        assert "target" not in inputs
        return self.answer


def test_forecasting_is_the_mean_squared_error() -> None:
    scores = forecasting(
        Answers(torch.zeros(1, 2, 1)), {"x_enc": torch.ones(1), "target": torch.tensor([[[1.0], [3.0]]])}
    )
    assert scores["loss"] == 5
    assert scores["mae"] == 2


def test_classification_is_the_cross_entropy() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    scores = classification(Answers(logits), {"image": torch.ones(2), "target": torch.tensor([1, 1])})
    assert scores["loss"] == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert scores["accuracy"] == 0.5


def test_language_modelling_predicts_the_next_token() -> None:
    tokens = torch.tensor([[2, 0, 1]])
    logits = torch.full((1, 3, 3), -100.0)
    logits[0, 0, 0] = logits[0, 1, 1] = 100.0  # at 2 says 0, at 0 says 1; what it says at the last counts for nothing
    assert language_modelling(Answers(logits), {"input_ids": tokens})["loss"] == pytest.approx(0)


def test_restoration_is_the_mean_absolute_error() -> None:
    batch = {"target": torch.tensor([[[[0.5, 0.5]]]])}
    scores = restoration(Answers(torch.tensor([[[[0.6, 0.4]]]])), batch)
    assert scores["loss"] == pytest.approx(0.1)
    assert scores["psnr"] == pytest.approx(20)
    with pytest.raises(TersorError, match=r"makes pictures \[1, 1, 2, 2\], the data hold \[1, 1, 1, 2\]"):
        restoration(Answers(torch.zeros(1, 1, 2, 2)), batch)


def test_segmentation_is_the_cross_entropy_of_pixels_that_have_a_class() -> None:
    logits = torch.tensor([[[[0.0, 0.0, 9.0]], [[math.log(3), 0.0, 0.0]]]])  # (1, 2 classes, 1, 3)
    scores = segmentation(Answers(logits), {"target": torch.tensor([[[1, 1, 255]]])})
    assert scores["loss"] == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert scores["accuracy"] == 0.5
    nothing = segmentation(Answers(logits), {"target": torch.full((1, 1, 3), 255)})
    assert nothing["loss"] == 0
    with pytest.raises(TersorError, match=r"gives \[1, 1, 3\], logits"):
        segmentation(Answers(torch.zeros(1, 1, 3)), {"target": torch.tensor([[[1, 1, 255]]])})


def test_a_second_output_is_refused() -> None:
    with pytest.raises(TersorError, match="returns tuple of 2"):
        forecasting(Answers((torch.zeros(1), torch.zeros(1))), {"target": torch.zeros(1)})


def test_equal_heads_train_together_and_others_are_refused() -> None:
    heads = (torch.randn(4, 3), torch.randn(4, 3))
    batch = {"target": torch.tensor([0, 1, 2, 0])}
    both = classification(Answers(heads), batch)["loss"]
    single = [classification(Answers(head), batch)["loss"] for head in heads]
    torch.testing.assert_close(both, (single[0] + single[1]) / 2)
    with pytest.raises(TersorError, match=r"returns \[4, 3\], \[4, 2\]"):
        classification(Answers((heads[0], torch.zeros(4, 2))), batch)


def test_masked_tokens_are_not_in_sight() -> None:
    seen: list[torch.Tensor] = []

    class Copies(nn.Module):
        """Says that every token is the one that it sees."""

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            seen.append(input_ids)
            return 50 * nn.functional.one_hot(input_ids, 40).float()

    torch.manual_seed(0)
    tokens = torch.randint(40, (8, 64))
    loss = masked_language_modelling(Copies(), {"input_ids": tokens})["loss"]
    assert loss > 20  # copying is no way to do it
    changed = (seen[0] != tokens).float().mean()
    assert 0.08 < changed < 0.2
