"""What is true of GPTQ's solution of one layer, whatever its weights and inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.grid import Stored, dequantize, quantize
from tersor.methods.weights.gptq_solver import Solution, factorize, solve_gptq, solve_rtn

COLUMNS = 48


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Weights [5, 48] and the Hessian of correlated inputs of very different sizes, in float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(200, COLUMNS) @ (torch.eye(COLUMNS, dtype=torch.float64) + 0.3 * normal(COLUMNS, COLUMNS))
    x *= torch.exp(normal(COLUMNS))
    return normal(5, COLUMNS), 2 * x.t() @ x / len(x)


# The largest weight of a symmetric group lies exactly between two levels, so that a change in the last digit decides where it
# goes. What is claimed of solutions that are summed in different orders is therefore claimed of asymmetric grids only.
ASYMMETRIC = {"sym": False}

options = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([2, 3, 4, 8, "ternary"]),
        "sym": st.booleans(),
        "group_size": st.sampled_from([-1, 16, 48]),
        "desc_act": st.booleans(),
        "static_groups": st.booleans(),
        "block_size": st.sampled_from([16, 20, 128]),
    }
)


@given(problems(), options)
def test_the_reported_error_is_that_of_the_weights_under_the_damped_hessian(
    problem: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    W, H = problem
    solution = solve_gptq(W, H, **options)
    d = W - solution.dequantize()
    damped = H + solution.damp * H.diagonal().mean() * torch.eye(COLUMNS, dtype=H.dtype)
    expected = float((d @ damped * d).sum() / 2)
    assert abs(solution.error - expected) <= 1e-8 * expected


@given(problems(), options)
def test_rows_are_independent(problem: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    W, H = problem
    options |= ASYMMETRIC
    together = solve_gptq(W, H, **options)
    apart = [solve_gptq(row[None], H, **options) for row in W]
    assert torch.equal(together.codes, torch.cat([each.codes for each in apart]))
    assert torch.equal(together.g_idx, apart[0].g_idx)


@given(problems(), options)
def test_dead_columns_become_zero_and_change_nothing_else(
    problem: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    W, H = problem
    dead = [0, 7, COLUMNS - 1]
    H[dead], H[:, dead] = 0, 0
    solution = solve_gptq(W, H, **options)
    assert torch.all(solution.dequantize()[:, dead] == 0)


@given(problems(), options)
def test_the_arguments_are_left_as_they_were(problem: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    W, H = problem
    H[3], H[:, 3] = 0, 0
    before = W.clone(), H.clone()
    solve_gptq(W, H, **options)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


@given(problems(), st.sampled_from([2, 4, "ternary"]), st.booleans(), st.sampled_from([-1, 16]))
def test_act_order_is_solving_the_permuted_problem(
    problem: tuple[Tensor, Tensor], bits: Any, sym: bool, group_size: int
) -> None:
    W, H = problem
    order = torch.argsort(H.diagonal(), descending=True)
    ordered = solve_gptq(W, H, bits=bits, sym=sym, group_size=group_size, desc_act=True)
    permuted = solve_gptq(W[:, order], H[order][:, order], bits=bits, sym=sym, group_size=group_size)
    assert torch.equal(ordered.codes[:, order], permuted.codes)
    assert torch.equal(ordered.g_idx[order], permuted.g_idx)
    assert torch.equal(ordered.scales, permuted.scales)


@given(problems(), options, st.sampled_from([1, 16, 31]))
def test_lazy_updates_in_blocks_change_nothing_where_grids_are_known_before(
    problem: tuple[Tensor, Tensor], options: dict[str, Any], block_size: int
) -> None:
    W, H = problem
    options |= {"static_groups": True} | ASYMMETRIC
    one = solve_gptq(W, H, **(options | {"block_size": COLUMNS}))
    many = solve_gptq(W, H, **(options | {"block_size": block_size}))
    assert torch.equal(one.codes, many.codes)


@given(problems(), options)
def test_without_correlation_there_is_nothing_to_make_up_for(
    problem: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    W, H = problem
    solution = solve_gptq(W, torch.diag(H.diagonal()), **(options | {"static_groups": True}))
    assert torch.equal(solution.codes, _rounded(W, options).codes)


@given(problems(), options)
def test_overwhelming_damping_is_rounding(problem: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    W, H = problem
    options |= {"static_groups": True} | ASYMMETRIC
    solution = solve_gptq(W, H, **(options | {"damp": 1e12}))
    assert torch.equal(solution.codes, _rounded(W, options).codes)


@given(problems(), st.floats(1e-3, 1e3))
def test_the_scale_of_the_hessian_does_not_matter(problem: tuple[Tensor, Tensor], factor: float) -> None:
    W, H = problem
    power = 2.0 ** round(torch.tensor(factor).log2().item())  # exact in floating point
    assert torch.equal(solve_gptq(W, power * H, bits=4).codes, solve_gptq(W, H, bits=4).codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [False, True])
def test_correlated_inputs_lose_less_than_by_rounding(bits: int, desc_act: bool) -> None:
    """No theorem for a single row, since the algorithm is greedy; over 64 rows it has always held."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(512, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
        W, H = torch.randn(64, 96, generator=generator), x.t() @ x
        solved = solve_gptq(W, H, bits=bits, group_size=32, desc_act=desc_act, static_groups=True)
        rounded = solve_rtn(W, bits=bits, group_size=32)
        assert _lost(W, solved, H) < 0.9 * _lost(W, rounded, H)


@given(problems(), options, st.sampled_from([torch.float16, torch.bfloat16]))
def test_the_packed_weight_is_the_weight_that_was_solved_for(
    problem: tuple[Tensor, Tensor], options: dict[str, Any], dtype: torch.dtype
) -> None:
    W, H = problem
    if options["bits"] == "ternary":
        options |= {"sym": True}  # two magnitudes fit no file
        W[0] = W[0].abs()  # no negative weight: the grid has a negative level all the same
    stored = Stored(dtype, 1)
    solution = solve_gptq(W, H, stored=stored, **options)
    packed = solution.pack(stored)
    assert packed.scales.dtype == dtype
    assert torch.equal(packed.dequantize(torch.float64), solution.dequantize())


@given(problems(), st.booleans())
def test_the_factor_is_the_damped_hessian_s_in_the_order_of_solving(
    problem: tuple[Tensor, Tensor], desc_act: bool
) -> None:
    _, H = problem
    factor = factorize(H, damp=0.01, desc_act=desc_act)
    damped = H + factor.damp * H.diagonal().mean() * torch.eye(COLUMNS, dtype=H.dtype)
    torch.testing.assert_close(factor.R, factor.R.triu())
    torch.testing.assert_close(factor.R @ factor.R.t(), damped[factor.order][:, factor.order])
    assert torch.equal(factor.order, H.diagonal().argsort(descending=True) if desc_act else torch.arange(COLUMNS))


@given(problems(), options)
def test_is_the_algorithm_of_the_paper_which_changes_all_columns_that_remain(
    problem: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    """Column by column, with the inverse: what the solver brings up to date block by block, without one."""
    W, H = problem
    solution = solve_gptq(W, H, **{**options, "static_groups": True})
    bits = options["bits"]
    order = H.diagonal().argsort(descending=True) if options["desc_act"] else torch.arange(COLUMNS)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(COLUMNS, dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    scale, zero = solution.scales[:, solution.g_idx][:, order], solution.zeros[:, solution.g_idx][:, order]
    now, found, errors = W[:, order].clone(), solution.codes[:, order].to(W.dtype), 0.0
    for i in range(COLUMNS):
        near = quantize(now[:, i], scale[:, i], zero[:, i], bits)
        level = dequantize(found[:, i], scale[:, i], zero[:, i], bits)
        other = dequantize(near, scale[:, i], zero[:, i], bits)
        tie = (now[:, i] - level).abs() - (now[:, i] - other).abs() < 1e-9 * scale[:, i].abs()
        assert bool(((near == found[:, i]) | tie).all())
        error = (now[:, i] - level) / U[i, i]
        errors += float(error.square().sum() / 2)
        now[:, i:] -= torch.outer(error, U[i, i:])
    assert errors == pytest.approx(solution.error, rel=1e-8)


def test_damping_is_raised_where_the_hessian_is_not_positive_definite() -> None:
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 1.05  # an eigenvalue of -0.05: 0.01 is too little, ten times that is enough
    assert solve_gptq(torch.randn(3, 8), H, bits=4).damp == pytest.approx(0.1)


def test_a_hessian_that_float32_cannot_factorize_is_factorized_in_float64_at_the_same_damping() -> None:
    H = torch.ones(64, 64)  # 1 + 1e-9 is 1 in float32
    single, double = factorize(H, damp=1e-9), factorize(H.double(), damp=1e-9)
    assert (single.damp, single.in_float64, double.in_float64) == (1e-9, True, False)
    assert torch.equal(single.R, double.R.float())
    assert not factorize(H, damp=0.01).in_float64


def test_a_hessian_that_no_damping_helps_is_an_error_not_a_rounding() -> None:
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 100.0
    with pytest.raises(TersorError, match="cannot be factorized even with damping 10; use more calibration samples"):
        solve_gptq(torch.randn(3, 8), H, bits=4)


def _rounded(W: Tensor, options: dict[str, Any]) -> Solution:
    return solve_rtn(W, bits=options["bits"], sym=options["sym"], group_size=options["group_size"])


def _lost(W: Tensor, solution: Solution, H: Tensor) -> float:
    d = W - solution.dequantize()
    return float((d @ H * d).sum())
