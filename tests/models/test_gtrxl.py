"""GTrXL beyond its golden cases: streams, causality, gates, and what no gradient reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.errors import TersorError
from tersor.models.control.gtrxl import GATES

SMALL = {"input_dim": 5, "d_model": 8, "layers": 2, "heads": 2, "d_head": 4, "d_ff": 12, "memory_len": 20}


def build(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = tersor.models.create("gtrxl", **{**SMALL, **config}).double().eval()
    for parameter in (model.u, model.v):
        nn.init.normal_(parameter)
    return model


def steps(count: int = 12) -> Tensor:
    return torch.randn(count, 3, 5, dtype=torch.float64)


def streamed(model: nn.Module, x: Tensor, sizes: list[int]) -> Tensor:
    memory, given = None, []
    for piece in x.split(sizes):
        y, memory = model.stream(piece, memory)
        given.append(y)
    return torch.cat(given)


@torch.no_grad()
@pytest.mark.parametrize("gate", GATES)
def test_streaming_with_memory_equals_the_whole(gate: str) -> None:
    model, x = build(gate=gate), steps()
    for sizes in ([1] * 12, [4, 4, 4], [7, 5]):
        torch.testing.assert_close(streamed(model, x, sizes), model(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_only_the_bug_of_one_form_breaks_streams() -> None:
    x = steps()
    broken = build(memory_norm=False)
    assert (streamed(broken, x, [4, 4, 4]) - broken(x)).abs().max() > 1e-3
    zeros = build(memory_starts="zeros", query_norm=False, attention_bias=True, memory_len=12)
    whole, memory = zeros.stream(x, None)
    assert memory.shape == (2, 12, 3, 8)
    # The zeros leave the memory one by one: until then, a step by itself sees as many steps as it does in the whole.
    torch.testing.assert_close(zeros.stream(x[:1], None)[0], whole[:1])


@torch.no_grad()
def test_memory_reaches_no_further_than_its_length() -> None:
    model, x = build(memory_len=3, layers=1), steps()
    changed = torch.cat((x[:1] + 1, x[1:]))
    ones = [1] * len(x)
    same = (streamed(model, x, ones) == streamed(model, changed, ones)).all(-1).all(-1)
    assert same.tolist() == [False] * 4 + [True] * 8  # itself and three more
    assert build(memory_len=0).stream(x, None)[1].shape == (2, 0, 3, 8)


def test_no_step_sees_later_ones_and_no_gradient_reaches_the_memory() -> None:
    model, x = build(), steps().requires_grad_()
    y, memory = model.stream(x, None)
    (seen,) = torch.autograd.grad(y[6].square().sum(), x, retain_graph=True)
    assert seen[:7].abs().amax((1, 2)).all()
    assert not seen[7:].any()
    assert not memory.requires_grad
    memory = memory.requires_grad_()
    model.stream(steps(), memory)[0].sum().backward()
    assert memory.grad is None
    assert x.grad is None


@torch.no_grad()
@pytest.mark.parametrize("gate", ["gru", "output", "highway", "sigtanh"])
def test_closed_gates_leave_the_input(gate: str) -> None:
    model, x = build(gate=gate, gate_bias=1e3), steps()
    torch.testing.assert_close(model(x), model.embedding(x).relu())


@torch.no_grad()
def test_positions_are_relative() -> None:
    """Steps that are all the same, but for one: what a later step gets depends on how long ago that was."""
    model = build(layers=1, memory_len=64)
    a, b = steps(2)
    early, late = torch.stack([a, b, a, a, a]), torch.stack([a, a, b, a, a, a])
    lone = late[1:]
    torch.testing.assert_close(model(early)[-1], model(lone)[-1])
    assert (model(late)[-1] - model(torch.stack([a, b, a, a, a, a]))[-1]).abs().max() > 1e-6


def test_refuses_what_cannot_work() -> None:
    with pytest.raises(TersorError, match="'lstm'"):
        build(gate="lstm")
    with pytest.raises(TersorError, match="d_model is even"):
        build(d_model=7)
    _, memory = build().stream(steps(), None)
    with pytest.raises(TersorError, match="memory is"):
        build().stream(steps()[:, :2], memory)


@torch.no_grad()
def test_the_heads_read_the_results_that_there_are_without_them() -> None:
    torch.manual_seed(0)
    without = build()
    model = tersor.models.create("gtrxl", **SMALL, actions=3).double().eval()
    model.load_state_dict(without.state_dict(), strict=False)
    x = steps()
    torch.testing.assert_close(model(x), without(x) @ model.heads.weight.T + model.heads.bias)
    assert model(x).shape == (12, 3, 4)
    assert model(x)[..., :3].softmax(-1).sub(1 / 3).abs().max() < 0.05  # all actions alike at first
    torch.testing.assert_close(streamed(model, x, [5, 7]), model(x), rtol=1e-9, atol=1e-9)
