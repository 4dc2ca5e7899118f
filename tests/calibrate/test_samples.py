"""Calibration dictionaries as tokenizers return them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tersor.calibrate.batches import fingerprint, make_batches
from tersor.errors import TersorError


def batch(sample: Any) -> dict[str, Any]:
    return make_batches([sample], None, samples=1, seq_len=8, seed=0)[0]


@pytest.mark.parametrize("ids", [[5, 6, 7], [[5, 6, 7]], (5, 6, 7), np.array([5, 6, 7]), torch.tensor([5, 6, 7])])
def test_tokens_in_any_form_are_a_batch_of_one(ids: Any) -> None:
    found = batch({"input_ids": ids, "attention_mask": [1, 1, 1], "mode": "text"})
    assert found["input_ids"].tolist() == [[5, 6, 7]]
    assert found["input_ids"].dtype == torch.int64
    assert found["attention_mask"].tolist() == ([[1, 1, 1]])
    assert found["mode"] == "text"


def test_images_as_lists_of_arrays() -> None:
    image = np.zeros((3, 4, 4), np.float32)
    assert batch({"pixel_values": [image]})["pixel_values"].shape == (1, 3, 4, 4)


def test_rows_of_several_lengths_are_refused() -> None:
    with pytest.raises(TersorError, match="calibration sample 0: the rows of input_ids are of several lengths"):
        batch({"input_ids": [[1, 2], [3]]})


def test_samples_that_differ_in_one_number_have_another_fingerprint() -> None:
    one, other = np.arange(3000), np.arange(3000)
    other[1500] = 0
    for wrap in (lambda x: x, torch.from_numpy, lambda x: (torch.from_numpy(x), 1)):
        assert fingerprint([{"x": wrap(one)}]) == fingerprint([{"x": wrap(one.copy())}])
        assert fingerprint([{"x": wrap(one)}]) != fingerprint([{"x": wrap(other)}])
