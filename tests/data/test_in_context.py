from __future__ import annotations

import pytest
import torch

from tersor.data.in_context import KINDS, least_squares, make_in_context
from tersor.errors import TersorError


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_says_which_samples_and_something_is_asked(kind: str) -> None:
    x, target = make_in_context(kind, 6, points=7, d=4, seed=1)
    again, other = (make_in_context(kind, 6, points=7, d=4, seed=seed)[0] for seed in (1, 2))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert x.shape[:2] == target.shape[:2]
    assert torch.isfinite(x).all()
    assert (~target.isnan()).any()


@pytest.mark.parametrize("kind", ["linear", "sparse"])
def test_least_squares_knows_a_linear_answer_after_d_points(kind: str) -> None:
    x, target = make_in_context(kind, 20, points=12, d=4)
    points, answers = x[:, 0::2], x[:, 1::2, 0]
    assert torch.equal(target[:, 0::2, 0], answers)
    assert target[:, 1::2].isnan().all()
    error = (least_squares(points, answers) - answers).square().mean(0)
    assert (error[4:] < 1e-6).all()
    assert error[:3].min() > 0.01


def test_a_sparse_answer_depends_on_three_channels() -> None:
    x, _ = make_in_context("sparse", 8, points=40, d=10)
    w = torch.linalg.lstsq(x[:, 0::2].double(), x[:, 1::2, :1].double()).solution
    assert ((w.abs() > 1e-4).sum(1) == 3).all()


def test_a_representation_is_not_linear_but_shared() -> None:
    x, _ = make_in_context("representation", 20, points=60, d=4)
    points, answers = x[:, 0::2].double(), x[:, 1::2, :1].double()
    fit = points @ torch.linalg.lstsq(points, answers).solution
    assert (fit - answers).square().mean() > 0.01
    features = torch.cat((points, points.abs()), -1)  # of one leaky-ReLU layer with other weights: still not enough
    assert (features @ torch.linalg.lstsq(features, answers).solution - answers).square().mean() > 1e-4


def test_an_autoregression_is_asked_for_what_comes_next() -> None:
    x, target = make_in_context("autoregressive", 4, points=9, d=3, lags=2)
    assert torch.equal(target[:, 1:-1], x[:, 2:])
    assert target[:, 0].isnan().all()
    torch.testing.assert_close(x[:, 2:].norm(dim=-1), torch.full((4, 7), 3**0.5))


def test_a_chain_is_asked_for_every_step_but_not_for_the_next_point() -> None:
    x, target = make_in_context("chain", 4, points=5, d=3, layers=2)
    x, target = x.unflatten(1, (5, 3)), target.unflatten(1, (5, 3))
    assert torch.equal(target[:, :, :2], x[:, :, 1:])
    assert target[:, :, 2].isnan().all()


def test_refuses_unknown_kinds_and_empty_samples() -> None:
    with pytest.raises(TersorError, match="'trees'"):
        make_in_context("trees", 1)
    with pytest.raises(TersorError, match="0"):
        make_in_context("linear", 1, points=0)
