"""Positions that attention_mask hides do not calibrate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.tiny_models import build, random_ids

import tersor
from tersor import GPTQ, TersorError
from tersor.calibrate.padding import decoder_inputs, shown_only
from tersor.compress.result import Compressed

LENGTHS = (20, 12, 17)
ROWS = [random_ids(1, length, seed=n) for n, length in enumerate(LENGTHS)]


def padded(ids: Tensor, length: int, side: str) -> dict[str, Tensor]:
    hidden = length - ids.shape[1]
    pads = (hidden, 0) if side == "left" else (0, hidden)
    return {
        "input_ids": torch.nn.functional.pad(ids, pads, value=0),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), pads),
    }


def together(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def compressed(batches: list[dict[str, Tensor]]) -> Compressed:
    return tersor.compress(build("llama"), GPTQ(bits=3, group_size=32), calibration=batches, format=None)


@pytest.fixture(scope="module")
def plain() -> Compressed:
    return compressed([{"input_ids": row} for row in ROWS])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("several_rows", [False, True])
def test_padded_and_plain_samples_give_the_same_weights(plain: Compressed, side: str, several_rows: bool) -> None:
    batches = [padded(row, 24, side) for row in ROWS]
    found = compressed([together(batches)] if several_rows else batches)
    assert {layer.tokens for layer in found.summary.layers} == {sum(LENGTHS)}
    ids = random_ids(2, 30, seed=9)
    assert torch.equal(found.model(input_ids=ids).logits, plain.model(input_ids=ids).logits)


def test_a_mask_that_hides_nothing_leaves_a_sample_as_it_is() -> None:
    batch = {"input_ids": ROWS[0], "attention_mask": torch.ones_like(ROWS[0])}
    assert shown_only(batch, 0, encoder_decoder=False) == [batch]


def test_all_that_has_one_entry_a_position_is_cut_along() -> None:
    ids = torch.arange(5)[None]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1]]),
        "token_type_ids": 10 + ids,
        "position_ids": torch.stack([ids, 20 + ids, 30 + ids]),  # [axes, rows, tokens]
        "labels": 40 + ids,
        "pixel_values": torch.zeros(1, 3, 5, 5),
    }
    (found,) = shown_only(batch, 0, encoder_decoder=False)
    assert found["token_type_ids"].tolist() == [[12, 13, 14]]
    assert found["position_ids"].tolist() == [[[2, 3, 4]], [[22, 23, 24]], [[32, 33, 34]]]
    assert found["labels"].tolist() == [[42, 43, 44]]
    assert found["pixel_values"].shape == (1, 3, 5, 5)
    (second,) = shown_only(batch, 0, encoder_decoder=True)  # whose labels belong to the other text
    assert second["labels"].tolist() == batch["labels"].tolist()


@pytest.mark.parametrize(
    ("more", "mask", "said"),
    [
        ({}, [[0, 0], [0, 0]], "calibration sample 3 has no position that its attention_mask shows"),
        (
            {"pixel_values": torch.zeros(5, 3)},
            [[1, 1], [0, 1]],
            r"2 rows with padding, and its 'pixel_values' is \(5, 3\)",
        ),
    ],
)
def test_samples_that_cannot_be_cut(more: dict[str, Any], mask: list[list[int]], said: str) -> None:
    batch = {"input_ids": torch.ones(2, 2, dtype=torch.long), "attention_mask": torch.tensor(mask), **more}
    with pytest.raises(TersorError, match=said):
        shown_only(batch, 3, encoder_decoder=False)


def test_the_decoder_goes_on_with_the_text_from_its_first_shown_position() -> None:
    found = decoder_inputs({"input_ids": torch.tensor([[5, 6, 7]])}, 1)
    assert found["decoder_input_ids"].tolist() == [[1, 5, 6]]
    mask = torch.tensor([[0, 1, 1]])
    found = decoder_inputs({"input_ids": torch.tensor([[0, 6, 7]]), "attention_mask": mask}, 1)
    assert found["decoder_input_ids"].tolist() == [[1, 1, 6]]
    assert found["decoder_attention_mask"] is mask
