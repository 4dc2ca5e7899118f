"""The loop over a block's columns as a kernel gives what the loop in Python gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tersor.formats.grid import Bits, ClipSearch, Stored
from tersor.methods.weights import gptq_solver
from tersor.methods.weights.gptq_solver import Solution, factorize, solve_factorized, solve_rtn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(4 * columns, columns, device="cuda") @ (
        torch.eye(columns, device="cuda") + torch.randn(columns, columns, device="cuda") / columns**0.5
    )
    return torch.randn(rows, columns, device="cuda"), 2 * x.t() @ x / len(x)


def solved(W: Tensor, H: Tensor, bits: Bits, group_size: int, **options: Any) -> Solution:
    factor = factorize(H, desc_act=options.pop("desc_act", False))
    return solve_factorized(W, factor, bits=bits, group_size=group_size, **{"sym": False, **options})


@pytest.mark.parametrize("bits", [2, 3, 4, 8, "ternary"])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "options"),
    [
        (64, 256, 128, {}),
        (64, 512, 32, {"sym": True, "stored": Stored(torch.float16, 1)}),
        (130, 320, 64, {"stored": Stored(torch.bfloat16, 1)}),
        (33, 200, 50, {"desc_act": True}),
        (1, 96, -1, {}),
        (257, 1024, 128, {"desc_act": True, "static_groups": True, "block_size": 100}),
        (64, 384, 128, {"clip_search": ClipSearch(steps=10)}),
        (40, 300, 128, {"stored": Stored(torch.float32)}),
    ],
)
def test_levels_differ_only_in_ties(
    rows: int, columns: int, group_size: int, options: dict[str, Any], bits: Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    W, H = problem(rows, columns)
    fused = solved(W, H, bits, group_size, **options)
    monkeypatch.setattr(gptq_solver.gptq_block, "has_kernel", lambda W, block_size: False)
    looped = solved(W, H, bits, group_size, **options)
    exact = solved(W.double(), H.double(), bits, group_size, **options)
    flips, of_loop = (int((each.codes != exact.codes).sum()) for each in (fused, looped))
    assert flips <= 2 * of_loop + rows * columns // 500
    assert fused.error == pytest.approx(exact.error, rel=1e-2)
    d = (W - fused.dequantize()).double()
    damped = H.double() + fused.damp * H.diagonal().double().mean() * torch.eye(columns, device="cuda")
    assert fused.error == pytest.approx(float((d @ damped * d).sum() / 2), rel=1e-4)
    assert int(fused.codes.max()) <= (2 if bits == "ternary" else 2**bits - 1)


@pytest.mark.parametrize(
    "stored", [None, *(Stored(each, 1) for each in (torch.float16, torch.bfloat16)), Stored(torch.float32)]
)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, "ternary"])
@pytest.mark.parametrize("group_size", [16, 128])
def test_one_block_to_the_last_bit(group_size: int, bits: Bits, sym: bool, stored: Stored | None) -> None:
    """With U the identity nothing is passed on between columns: grids and rounding are compared, edges and ties included.

    With the CPU's: on a GPU, torch divides by a number by multiplying with its inverse.
    """
    W = torch.randn(100, 128, device="cuda") * 3
    W[:, ::7] = (W[:, ::7] * 2).round() / 2
    W[0], W[1], W[2], W[3] = 0, W[1].abs(), -W[2].abs(), W[3] * 1e-9
    expected = solve_rtn(W.cpu(), bits=bits, group_size=group_size, sym=sym, stored=stored)
    found = solved(W, torch.eye(128, device="cuda"), bits, group_size, sym=sym, stored=stored)
    assert torch.equal(found.scales.cpu(), expected.scales)
    assert torch.equal(found.zeros.cpu(), expected.zeros)
    assert torch.equal(found.codes.cpu(), expected.codes)
