"""FlashRNN as a language model: its state, its start, and parity."""

from __future__ import annotations

import pytest
import torch

import tersor.models
from tersor.errors import TersorError
from tersor.kernels.flashrnn_cells import CELLS

SMALL = {"vocab_size": 8, "d_model": 8, "num_heads": 2, "n_layer": 2}


@pytest.mark.parametrize("function", list(CELLS))
@torch.no_grad()
def test_steps_and_pieces_equal_the_whole(function: str) -> None:
    torch.manual_seed(0)
    states = tuple(0.5 for _ in range(CELLS[function].states))
    model = tersor.models.create("flashrnn", **SMALL, function=function, initial_val=states).eval()
    input_ids = torch.randint(8, (2, 9))
    whole = model(input_ids)
    first, state = model.prefill(input_ids[:, :4])
    logits = [first]
    for token in input_ids[:, 4:].unbind(1):
        step, state = model.step(token, state)
        logits.append(step[:, None])
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-5, atol=1e-5)


def test_learns_parity_and_keeps_it_beyond_the_length_of_training() -> None:
    torch.manual_seed(0)
    config = {"vocab_size": 2, "d_model": 16, "num_heads": 2, "n_layer": 1, "mlp_ratio": 0, "function": "lstm"}
    model = tersor.models.create("flashrnn", **config)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(110):
        bits = torch.randint(2, (32, 10))
        loss = torch.nn.functional.cross_entropy(model(bits).flatten(0, 1), (bits.cumsum(1) % 2).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bits = torch.randint(2, (64, 60))
    with torch.no_grad():
        right = model(bits).argmax(-1) == bits.cumsum(1) % 2
    assert right.float().mean() > 0.99


def test_what_cannot_be_is_refused() -> None:
    for wrong, match in (
        ({"function": "rnn"}, "'rnn'"),
        ({"num_heads": 3}, "d_model 8"),
        ({"initial_val": (0.0,)}, "4 numbers"),
    ):
        with pytest.raises(TersorError, match=match):
            tersor.models.create("flashrnn", **{**SMALL, **wrong})
