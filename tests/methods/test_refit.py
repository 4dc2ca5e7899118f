"""Grids that the Hessian chooses: never a greater loss than without, and what the formulas say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.formats.grid import Bits, ClipSearch, Stored, fit_grid
from tersor.methods.weights.gptq_solver import factorize, solve_gptq
from tersor.methods.weights.refit import column_weights, refit_scales


def problem(rows: int = 24, columns: int = 64) -> tuple[Tensor, Tensor]:
    """W, and H of inputs that depend on each other and differ in size."""
    drawn = torch.Generator().manual_seed(0)
    X = torch.randn(256, columns, generator=drawn, dtype=torch.float64) @ torch.randn(
        columns, columns, generator=drawn, dtype=torch.float64
    )
    X *= torch.logspace(-1, 1, columns, dtype=torch.float64)[torch.randperm(columns, generator=drawn)]
    return torch.randn(rows, columns, generator=drawn, dtype=torch.float64), X.t() @ X / len(X)


def loss(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    D = W - Q
    return ((D @ damped) * D).sum(1) / 2


@pytest.mark.parametrize("desc_act", [False, True])
def test_the_weights_are_those_of_gptqs_own_loss(desc_act: bool) -> None:
    _, H = problem()
    factor = factorize(H, desc_act=desc_act)
    weights = column_weights(factor.R, factor.order)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    for place in (0, 5, len(H) - 1):
        rest = factor.order[place:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        torch.testing.assert_close(weights[factor.order[place]], 1 / inverse[0, 0])


def test_the_steps_are_the_least_squares_ones() -> None:
    W, H = problem()
    groups = torch.arange(64) // 16
    factor = factorize(H, damp=1e-6)
    scales = W.reshape(24, 4, 16).abs().amax(2) / 4
    L = torch.round(W / scales[:, groups]).clamp(-3, 3)
    found = refit_scales(W, L, scales, groups, factor.R)
    half = torch.linalg.cholesky(H)
    for row in range(3):
        parts = torch.stack([(L[row] * (groups == g)) @ half for g in range(4)], 1)
        expected = torch.linalg.lstsq(parts, (W[row] @ half)[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row], expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, "ternary"])
@pytest.mark.parametrize(
    ("group_size", "options"),
    [
        (-1, {}),
        (16, {}),
        (16, {"static_groups": True}),
        (16, {"desc_act": True}),
        (16, {"desc_act": True, "static_groups": True}),
    ],
)
def test_refitting_never_makes_a_row_worse(bits: Bits, group_size: int, options: dict[str, bool]) -> None:
    W, H = problem()
    stored = Stored(torch.float16)
    how = {"bits": bits, "group_size": group_size, "sym": True, "stored": stored, "block_size": 32, **options}
    plain, refitted = (solve_gptq(W, H, refits=n, **how) for n in (0, 2))
    before, after = (loss(W, each.dequantize(), H) for each in (plain, refitted))
    assert bool((after <= before * (1 + 1e-9)).all())
    assert float(after.sum()) < 0.97 * float(before.sum())
    assert refitted.error == pytest.approx(float(after.sum()), rel=1e-6)
    assert torch.equal(refitted.scales, refitted.scales.half().double())  # what the file holds
    if bits == "ternary":
        assert torch.equal(refitted.scales, -refitted.zeros)


def test_a_weighted_search_looks_at_the_columns_that_count() -> None:
    """One column is large and never seen: a grid that clips it serves the others better."""
    x = torch.tensor([[0.1, -0.2, 0.3, 8.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    plain = fit_grid(x, 3, sym=True, clip_search=ClipSearch(norm=2.0))
    weighted = fit_grid(x, 3, sym=True, clip_search=ClipSearch(norm=2.0), weights=weights)
    errors = [float(((grid.round(x) - x).square() * weights).sum()) for grid in (plain, weighted)]
    assert errors[1] < errors[0]


def test_a_ternary_search_is_no_worse_than_none() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64, dtype=torch.float64)
    errors = [
        float((grid.round(x) - x).square().sum())
        for grid in (fit_grid(x, "ternary", sym=True, clip_search=search) for search in (None, ClipSearch(norm=2.0)))
    ]
    assert errors[1] < 0.5 * errors[0]


def test_columns_that_are_always_zero_decide_no_range() -> None:
    W, H = problem()
    W[:, :4] *= 30
    H[:4] = H[:, :4] = 0
    how = {"bits": 3, "sym": True, "clip_search": ClipSearch(norm=2.0)}
    found = solve_gptq(W, H, weighted=True, **how)
    alive = solve_gptq(W[:, 4:], H[4:, 4:], weighted=True, **how)
    assert found.error < 1.2 * alive.error
