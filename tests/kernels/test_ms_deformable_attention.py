"""Multi-scale deformable attention against its formula."""

from __future__ import annotations

import pytest
import torch
from kernels.triton_interpreter import run_interpreted
from torch import Tensor

from tersor.kernels.ms_deformable_attention import ms_deformable_attention, reference

SHAPES = ((5, 3), (2, 4), (1, 1))


def arguments(
    b: int = 2,
    q: int = 7,
    m: int = 3,
    d: int = 4,
    p: int = 2,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """value, locations (some outside the maps), weights."""
    tokens = sum(height * width for height, width in SHAPES)
    value = torch.randn(b, tokens, m, d, dtype=dtype, device=device)
    locations = torch.rand(b, q, m, len(SHAPES), p, 2, dtype=dtype, device=device) * 1.4 - 0.2
    return value, locations, torch.rand(b, q, m, len(SHAPES), p, dtype=dtype, device=device)


@pytest.mark.parametrize(("q", "m", "d", "p"), [(7, 3, 4, 2), (1, 1, 1, 1), (40, 2, 5, 3)])
def test_equals_the_formula(q: int, m: int, d: int, p: int) -> None:
    torch.manual_seed(0)
    value, locations, weights = arguments(q=q, m=m, d=d, p=p)
    got = ms_deformable_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(got, reference(value, SHAPES, locations, weights))


def test_a_pixels_centre_gives_the_pixel_and_outside_gives_zero() -> None:
    torch.manual_seed(0)
    value, locations, weights = arguments(b=1, q=1, m=1, p=1)
    locations[..., 0, :, :] = torch.tensor([1.5 / 3, 4.5 / 5], dtype=torch.float64)  # column 1, row 4 of the first map
    locations[..., 1:, :, :] = 2.0
    got = ms_deformable_attention(value, SHAPES, locations, torch.ones_like(weights))
    torch.testing.assert_close(got[0, 0, 0], value[0, 4 * 3 + 1, 0])


def test_gradients_and_registration() -> None:
    torch.manual_seed(0)
    value, locations, weights = (each.requires_grad_() for each in arguments(b=1, q=3, m=2, d=2))
    assert torch.autograd.gradcheck(lambda *tensors: ms_deformable_attention(tensors[0], SHAPES, *tensors[1:]),
                                    (value, locations, weights))  # fmt: skip
    sides = [side for shape in SHAPES for side in shape]
    torch.library.opcheck(torch.ops.tersor.ms_deformable_attention, (value, sides, locations, weights))


CHECK_TRITON = """
from kernels.test_ms_deformable_attention import check_triton
check_triton("cpu", (2, 3, 2, 3, 1))
"""


def check_triton(device: str, *sizes: tuple[int, int, int, int, int]) -> None:
    """Forward and backward in Triton against the formula and its derivative, for these b, q, m, d, p."""
    from tersor.kernels import ms_deformable_attention_triton as in_triton

    for b, q, m, d, p in sizes:
        given = arguments(b, q, m, d, p, dtype=torch.float32, device=device)
        tensors = [each.requires_grad_() for each in given]
        value, locations, weights = tensors
        expected = reference(value, SHAPES, locations, weights)
        grad_y = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, tensors, grad_y)
        value, locations, weights = (each.detach() for each in tensors)
        got = in_triton.forward(value, SHAPES, locations, weights)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(in_triton.backward(grad_y, value, SHAPES, locations, weights), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_triton_equals_the_formula_under_the_interpreter() -> None:
    run_interpreted(CHECK_TRITON)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_equals_the_formula() -> None:
    torch.manual_seed(0)
    check_triton("cuda", (2, 7, 3, 4, 2), (2, 40, 2, 5, 3), (1, 300, 8, 32, 4))
    value, locations, weights = arguments(q=50, m=2, d=16, dtype=torch.bfloat16, device="cuda")
    got = ms_deformable_attention(value, SHAPES, locations.float(), weights)
    torch.testing.assert_close(got, reference(value, SHAPES, locations.float(), weights), rtol=0.02, atol=0.02)
