"""AlgoFormer's properties: one loop block, causality, and the methods that such a loop can be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.data.in_context import make_in_context
from tersor.errors import TersorError
from tersor.models.sequence.algoformer import descend, newton, training_loss

SMALL = tersor.models.find("algoformer").small


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("algoformer", **SMALL).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 12, 5, dtype=torch.float64)


def test_the_loop_is_one_block_however_often_it_runs(model: nn.Module) -> None:
    count = sum(p.numel() for p in model.parameters())
    longer = tersor.models.create("algoformer", **{**SMALL, "loops": 50})
    assert sum(p.numel() for p in longer.parameters()) == count


def test_a_loop_is_tied_copies_and_its_gradient_is_their_sum(model: nn.Module, x: Tensor) -> None:
    model(x, 4).square().sum().backward()
    copies = [copy.deepcopy(model.loop[0]) for _ in range(4)]
    for each in copies:
        each.zero_grad()
    P = h = model.pre[0](model.read_in(x) + model.positions[:12])
    for t, block in enumerate(copies):
        h = block(h + P if t else h)
    unrolled = model.read_out(model.norm(model.post[0](h)))
    torch.testing.assert_close(unrolled, model(x, 4))
    unrolled.square().sum().backward()
    for name, parameter in model.loop[0].named_parameters():
        parts = [each.get_parameter(name).grad for each in copies]
        torch.testing.assert_close(parameter.grad, torch.stack(parts).sum(0))


@torch.no_grad()
def test_without_repetitions_it_is_post_of_pre(model: nn.Module, x: Tensor) -> None:
    P = model.pre[0](model.read_in(x) + model.positions[:12])
    torch.testing.assert_close(model(x, 0), model.read_out(model.norm(model.post[0](P))))


@torch.no_grad()
def test_an_idle_block_leaves_the_state_as_it_is(x: Tensor) -> None:
    torch.manual_seed(0)
    model = tersor.models.create("algoformer", **SMALL, inject=False).double()
    for layer in (model.loop[0].attention_out, model.loop[0].narrow):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for loops in (1, 7):
        torch.testing.assert_close(model(x, loops), model(x, 0))


@torch.no_grad()
def test_a_token_changes_nothing_before_it(model: nn.Module, x: Tensor) -> None:
    changed = x.clone()
    changed[:, 5] += 1
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_linear_attention_is_gradient_descent(steps: int) -> None:
    torch.manual_seed(0)
    X, Y, queries = torch.randn(3, 20, 5), torch.randn(3, 20), torch.randn(3, 4, 5)
    w = torch.zeros(3, 5, 1)
    for _ in range(steps):
        w = w + 0.3 / 20 * X.mT @ (Y[..., None] - X @ w)
    got = descend(X, Y, queries, steps=steps, rate=0.3)
    torch.testing.assert_close(got, (queries @ w)[..., 0], rtol=1e-5, atol=1e-5)


def test_linear_attention_is_newtons_iteration() -> None:
    torch.manual_seed(0)
    X, Y, queries = (torch.randn(3, *shape, dtype=torch.float64) for shape in ((20, 5), (20,), (4, 5)))
    S = X.mT @ X
    A = S / torch.linalg.matrix_norm(S).square()[:, None, None]
    for _ in range(3):
        A = 2 * A - A @ S @ A
    explicit = (queries @ A @ X.mT @ Y[..., None])[..., 0]
    torch.testing.assert_close(newton(X, Y, queries, steps=3), explicit, rtol=1e-8, atol=1e-8)
    exact = (queries @ torch.linalg.lstsq(X, Y[..., None]).solution)[..., 0]
    errors = [float((newton(X, Y, queries, steps=steps) - exact).abs().max()) for steps in (9, 10, 11, 20)]
    assert errors[3] < 1e-8
    assert errors[2] < errors[1] < errors[0]


def test_the_loss_is_the_mean_over_the_last_repetitions(model: nn.Module) -> None:
    x, target = make_in_context("linear", 3, points=6, d=5)
    x, target = x.double(), target.double()
    asked = [((model(x, loops) - target)[:, 0::2]).square().mean() for loops in (3, 4, 5)]
    torch.testing.assert_close(training_loss(model, x, target, loops=5, window=3), torch.stack(asked).mean())


@pytest.mark.slow
def test_it_learns_a_regression_and_more_repetitions_do_not_hurt() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("algoformer", **{**SMALL, "d_in": 1, "max_len": 10, "loops": 3})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(250):
        x, target = make_in_context("linear", 64, points=5, d=1, seed=step)
        loss = training_loss(model, x, target, loops=3, window=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, target = make_in_context("linear", 1000, points=5, d=1, seed=10_000)
    zero = target[:, -2].square().mean()
    with torch.no_grad():
        errors = [(model(x, loops)[:, -2] - target[:, -2]).square().mean() / zero for loops in (3, 5)]
    assert errors[0] < 0.5
    assert errors[1] < 3 * errors[0]


def test_refuses_more_tokens_than_it_has_positions(model: nn.Module) -> None:
    with pytest.raises(TersorError, match="22 tokens, not for 23"):
        model(torch.randn(1, 23, 5, dtype=torch.float64))
