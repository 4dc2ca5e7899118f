"""The compiled loops of GPTQ do what those in torch do."""

from __future__ import annotations

import pytest
import torch

from tersor.formats.grid import Bits, ClipSearch, Stored, fit_grid
from tersor.kernels import gptq_cpu
from tersor.methods.weights.gptq_solver import solve_block


@pytest.mark.parametrize("bits", [2, 3, 4, 8, "ternary"])
@pytest.mark.parametrize(("rows", "width", "sym"), [(1, 1, False), (70, 40, True), (300, 128, False)])
def test_equal_bit_for_bit(bits: Bits, rows: int, width: int, sym: bool) -> None:
    W = torch.randn(rows, 2 * width)[:, :width]  # a block of a wider matrix
    if not gptq_cpu.takes(W):
        pytest.skip("no C++ compiler")
    U = (torch.randn(width, width) / width**0.5 + 2 * torch.eye(width)).triu()
    grid = fit_grid(W, bits, sym=sym)
    scale, zero = grid.scale.expand(-1, width), grid.zero.expand(-1, width)
    errors, others = torch.ones(rows), torch.ones(rows)
    codes, levels = gptq_cpu.solve_block(W, U, scale, zero, bits, errors)
    expected = solve_block(W, U, scale, zero, bits, others)
    assert torch.equal(codes, expected[0])
    assert torch.equal(levels, expected[1])
    assert torch.equal(errors, others)
    assert len(codes.unique()) > 1 or codes.numel() == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8, "ternary"])
@pytest.mark.parametrize(("columns", "sym", "weighted"), [(128, True, True), (37, False, True), (16, False, False)])
def test_the_range_has_the_least_error(bits: Bits, columns: int, sym: bool, weighted: bool) -> None:
    x = torch.randn(200, 2 * columns)[:, :columns]
    if not gptq_cpu.takes(x):
        pytest.skip("no C++ compiler")
    weights = torch.rand(columns) if weighted else None
    how = {"sym": sym, "clip_search": ClipSearch(norm=2.0), "stored": Stored(torch.float16, 1)}
    expected = fit_grid(x.double(), bits, **how, weights=None if weights is None else weights.double())
    found = fit_grid(x, bits, **how, weights=weights, best=gptq_cpu.best_grids)
    cost = 1.0 if weights is None else weights
    errors = ((found.round(x) - x).square() * cost).sum(1)
    least = ((expected.round(x.double()) - x).square() * cost).sum(1).float()
    torch.testing.assert_close(errors, least, rtol=1e-5, atol=1e-7)
    assert (found.scale == expected.scale).float().mean() > 0.95  # others are as good


def test_what_does_not_fit_is_refused_and_float64_is_left_to_torch() -> None:
    W, U = torch.randn(3, 4), torch.eye(4)
    assert not gptq_cpu.takes(W.double())
    if gptq_cpu.takes(W):
        with pytest.raises(ValueError, match=r"no block of W \[3, 4\], U \[4, 4\], scale \[3, 1\]"):
            gptq_cpu.solve_block(W, U, W[:, :1], W, 4, torch.zeros(3))
