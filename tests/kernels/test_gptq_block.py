"""The loop over a block's columns as a kernel gives what the loop in Python gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.compress import gptq_solver
from tersor.compress.gptq_solver import Solution, factorize, solve_factorized
from tersor.formats.grid import Bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(4 * columns, columns, device="cuda") @ (
        torch.eye(columns, device="cuda") + torch.randn(columns, columns, device="cuda") / columns**0.5
    )
    return torch.randn(rows, columns, device="cuda"), 2 * x.t() @ x / len(x)


def solved(W: Tensor, H: Tensor, bits: Bits, group_size: int, desc_act: bool, width: int = 128) -> Solution:
    factor = factorize(H, desc_act=desc_act)
    return solve_factorized(W, factor, bits=bits, group_size=group_size, sym=False, block_size=width)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, "ternary"])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "desc_act", "width"),
    [(64, 256, 128, False, 128), (33, 200, 50, True, 128), (1, 96, -1, False, 128), (257, 1024, 128, True, 100)],
)
def test_levels_differ_only_in_ties(
    rows: int,
    columns: int,
    group_size: int,
    desc_act: bool,
    width: int,
    bits: Bits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    W, H = problem(rows, columns)
    fused = solved(W, H, bits, group_size, desc_act, width)
    monkeypatch.setattr(gptq_solver.gptq_block, "has_kernel", lambda W: False)
    looped = solved(W, H, bits, group_size, desc_act, width)
    exact = solved(W.double(), H.double(), bits, group_size, desc_act, width)
    flips, of_loop = (int((each.codes != exact.codes).sum()) for each in (fused, looped))
    assert flips <= 2 * of_loop + 4
    assert fused.error == pytest.approx(exact.error, rel=1e-3)
    assert int(fused.codes.max()) <= (2 if bits == "ternary" else 2**bits - 1)


def test_one_block_to_the_last_bit() -> None:
    """With U the identity nothing is passed on between columns, so that rounding alone is compared, edges and ties included."""
    W = torch.randn(100, 128, device="cuda") * 3
    W[:, ::7] = (W[:, ::7] * 2).round() / 2
    scale = torch.rand(100, 128, device="cuda").half().float() + 0.1
    scale[:, ::7] = 1
    zero = torch.randint(0, 16, (100, 128), device="cuda").float()
    eye = torch.eye(128, device="cuda")
    codes, errors = gptq_solver.solve_block(W, eye, scale, zero, 4)
    expected = torch.clamp(torch.round(W / scale) + zero, 0, 15)
    assert torch.equal(codes, expected.to(torch.uint8))
    assert torch.equal(errors, W - scale * (expected - zero))
