"""The chain-of-thought GPT beyond its golden cases: generation, checkpoints with buffers, answers counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tersor.models
from tersor.data.chain_of_thought import EOS, make_chains
from tersor.errors import TersorError
from tersor.evaluate.chain_of_thought import accuracy, write

SMALL = {"dmodel": 32, "num_layer": 2}


@pytest.fixture(params=[False, True], ids=["sinusoids", "alibi"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("cot", **SMALL, rpe=request.param).eval()


@torch.no_grad()
def test_steps_and_pieces_equal_the_whole(model: nn.Module) -> None:
    ids = torch.randint(1, 21, (2, 15))
    whole = model(ids)
    first, state = model.prefill(ids[:, :6])
    second, state = model.prefill(ids[:, 6:10], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole[:, :10], rtol=1e-5, atol=1e-5)
    for t in range(10, 15):
        logits, state = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-5, atol=1e-5)


def test_loads_a_checkpoint_with_its_buffers(model: nn.Module) -> None:
    state = dict(model.state_dict())
    state["transformer.embedding.pe"] = torch.zeros(1, 87, 32)
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 87, 87)
        state[f"transformer.h.{layer}.attn.RPE"] = torch.zeros(1, 4, 87, 87)
    again = tersor.models.load("cot", state, **SMALL, rpe=model.config.rpe)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


class Reader:
    """Writes, after each question, what the sample has there; of the first `wrong` samples another answer."""

    def __init__(self, samples: Tensor, wrong: int) -> None:
        self.samples, self.wrong = samples, wrong

    def prefill(self, prompt: Tensor) -> tuple[Tensor, tuple[Tensor, int]]:
        size = prompt.shape[1]
        index = torch.stack([(self.samples[:, :size] == row).all(1).int().argmax() for row in prompt])
        rows = self.samples[index]
        end = (rows == EOS).int().argmax(1) - 1
        last = rows.gather(1, end[:, None])
        other = torch.where(last == 10, 11, 10)
        rows = rows.scatter(1, end[:, None], torch.where(index[:, None] < self.wrong, other, last))
        return F.one_hot(rows[:, size : size + 1], 21).float(), (rows, size + 1)

    def step(self, token: Tensor, state: tuple[Tensor, int]) -> tuple[Tensor, tuple[Tensor, int]]:
        rows, place = state
        assert torch.equal(token, rows[:, place - 1])
        return F.one_hot(rows[:, place], 21).float(), (rows, place + 1)


@pytest.mark.parametrize("chain", [True, False])
def test_accuracy_counts_answers_of_questions_of_all_lengths(chain: bool) -> None:
    samples = make_chains("arithmetic", 40, length=4, chain=chain)
    assert accuracy(Reader(samples, 0), "arithmetic", samples) == 1
    assert accuracy(Reader(samples, 10), "arithmetic", samples) == 0.75


class Endless(Reader):
    """Writes one token of what the sample has, then never <eos>."""

    def step(self, token: Tensor, state: tuple[Tensor, int]) -> tuple[Tensor, tuple[Tensor, int]]:
        return F.one_hot(torch.full_like(token, 10), 21).float(), state


def test_a_direct_answer_counts_without_an_end_and_a_chain_does_not() -> None:
    """Training for direct answers asks for the answer alone (chain_targets)."""
    for chain, right in ((False, 0.75), (True, 0)):
        samples = make_chains("arithmetic", 40, length=4, chain=chain)
        assert accuracy(Endless(samples, 10), "arithmetic", samples) == right


def test_writing_ends_at_the_limit_where_no_end_comes(model: nn.Module) -> None:
    with torch.no_grad():
        model.lm_head.bias[EOS] = -1e9
    assert write(model, torch.randint(3, 21, (2, 5)), 7).shape == (2, 7)


def test_refuses_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(TersorError, match="30"):
        tersor.models.create("cot", dmodel=30)
