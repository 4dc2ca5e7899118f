"""Sums of x xᵀ on a GPU: half of the matrix, as exact as float32 sums of exact products can be."""

from __future__ import annotations

import pytest
import torch
from kernels.triton_interpreter import run_interpreted

from tersor.calibrate.hessian import Hessian
from tersor.kernels import gram

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_every_tile_on_and_below_the_diagonal_is_added_once() -> None:
    run_interpreted("""
        from tersor.kernels import gram, gram_triton
        gram_triton.TILE = 16  # so that a small matrix has several bands
        gram_triton.TOGETHER = 64
        for tokens, columns in ((70, 16 * 9 + 5), (64, 16), (1, 7), (130, 16 * 4)):
            x = torch.randn(tokens, columns).half()
            start = torch.randn(columns, columns, dtype=torch.float64)
            start = start + start.t()
            total = start.clone()
            gram_triton.add_gram(total, x)
            gram_triton.add_gram(total, x)
            gram.mirror(total, 100)
            torch.testing.assert_close(total, start + 2 * x.double().t() @ x.double(), rtol=1e-5, atol=1e-4)
            wide = torch.randn(tokens, columns + 3).half()[:, 1 : columns + 1]
            total = torch.zeros(columns, columns, dtype=torch.float64)
            gram_triton.add_gram(total, wide)
            gram.mirror(total)
            torch.testing.assert_close(total, wide.double().t() @ wide.double(), rtol=1e-5, atol=1e-4)
    """)


@pytest.mark.parametrize("size", [1, 7, 48, 100])
def test_mirrored_parts_make_a_symmetric_matrix(size: int) -> None:
    total = torch.randn(48, 48)
    lower = total.tril()
    gram.mirror(total, size)
    assert torch.equal(total, lower + lower.tril(-1).t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [128, 1000, 4096])
class TestOnTheGPU:
    pytestmark = on_gpu

    def test_is_as_exact_as_sums_in_float32_of_a_tensor_core_are(self, columns: int, dtype: torch.dtype) -> None:
        x = (torch.randn(8192, columns, device="cuda") * torch.rand(columns, device="cuda").exp()).to(dtype)
        hessian = Hessian(columns, device="cuda")
        for part in x.split(4096):
            hessian.add(part, 1)
        exact = x.double().t() @ x.double()
        error = (hessian.total - exact).norm() / exact.norm()
        assert error < 3e-5
        assert torch.equal(hessian.total, hessian.total.t())
