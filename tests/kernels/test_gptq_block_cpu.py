"""The compiled loop over a block's columns gives the bits of the loop in torch."""

from __future__ import annotations

import pytest
import torch

from tersor.formats.grid import Bits, fit_grid
from tersor.kernels import gptq_block_cpu
from tersor.methods.weights.gptq_solver import solve_columns


@pytest.mark.parametrize("bits", [2, 3, 4, 8, "ternary"])
@pytest.mark.parametrize(("rows", "width", "sym"), [(1, 1, False), (70, 40, True), (300, 128, False)])
def test_equal_bit_for_bit(bits: Bits, rows: int, width: int, sym: bool) -> None:
    W = torch.randn(rows, 2 * width)[:, :width]  # a block of a wider matrix
    if not gptq_block_cpu.takes(W):
        pytest.skip("no C++ compiler")
    U = (torch.randn(width, width) / width**0.5 + 2 * torch.eye(width)).triu()
    grid = fit_grid(W, bits, sym=sym)
    scale, zero = grid.scale.expand(-1, width), grid.zero.expand(-1, width)
    errors, others = torch.ones(rows), torch.ones(rows)
    codes, levels = gptq_block_cpu.solve_block(W, U, scale, zero, bits, errors)
    expected = solve_columns(W, U, scale, zero, bits, others)
    assert torch.equal(codes, expected[0])
    assert torch.equal(levels, expected[1])
    assert torch.equal(errors, others)
    assert len(codes.unique()) > 1 or codes.numel() == 1


def test_what_does_not_fit_is_refused_and_float64_is_left_to_torch() -> None:
    W, U = torch.randn(3, 4), torch.eye(4)
    assert not gptq_block_cpu.takes(W.double())
    if gptq_block_cpu.takes(W):
        with pytest.raises(ValueError, match=r"no block of W \[3, 4\], U \[4, 4\], scale \[3, 1\]"):
            gptq_block_cpu.solve_block(W, U, W[:, :1], W, 4, torch.zeros(3))
