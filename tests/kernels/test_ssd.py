"""The state-space dual against its token-by-token reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.triton_interpreter import run_interpreted
from torch import Tensor

from tersor.kernels.ssd import reference, ssd


def arguments(
    b: int = 2,
    length: int = 13,
    heads: int = 4,
    p: int = 3,
    groups: int = 2,
    n: int = 5,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    B, C = normal(b, length, groups, n), normal(b, length, groups, n)
    tensors = (normal(b, length, heads, p), normal(b, length, heads), -normal(heads).exp(), B, C)
    more = {"D": normal(heads), "z": normal(b, length, heads, p), "dt_bias": normal(heads)}
    return tensors, {**more, "initial_state": normal(b, heads, p, n), "dt_softplus": True}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5),
    st.integers(1, 50), st.sets(st.sampled_from(["D", "z", "dt_bias", "initial_state"])), st.booleans(), st.booleans(),
)  # fmt: skip
def test_equals_the_reference(
    b: int,
    length: int,
    repeats: int,
    p: int,
    groups: int,
    n: int,
    chunk: int,
    left_out: set[str],
    padded: bool,
    limited: bool,
) -> None:
    torch.manual_seed(length)
    tensors, more = arguments(b, length, repeats * groups, p, groups, n)
    more = {name: value for name, value in more.items() if name not in left_out}
    if padded:
        more["mask"] = torch.rand(b, length) < 0.7
    if limited:
        more["dt_limit"] = (0.1, 0.8)
        more["D"] = torch.randn(repeats * groups, p).double()
    torch.testing.assert_close(ssd(*tensors, **more, chunk_size=chunk), reference(*tensors, **more))


def test_gradients() -> None:
    torch.manual_seed(0)
    tensors, more = arguments(2, 7, 4, 2, 2, 2)
    names = ["D", "z", "dt_bias", "initial_state"]
    inputs = [each.requires_grad_() for each in (*tensors, *(more[name] for name in names))]

    def scan(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        rest = dict(zip(names, inputs[5:], strict=True))
        return ssd(*inputs[:5], **rest, dt_softplus=True, chunk_size=3)

    assert torch.autograd.gradcheck(scan, inputs)


def test_the_op_is_well_registered() -> None:
    (x, dt, A, B, C), more = arguments(1, 3, 2, 1, 1, 2)
    inputs = [each.requires_grad_() for each in (x, dt.detach().exp(), A, B, C, more["initial_state"])]
    torch.library.opcheck(torch.ops.tersor.ssd, (*inputs, 2))


def test_strong_decay_over_long_chunks_stays_finite_with_its_gradient() -> None:
    (x, dt, A, B, C), _ = arguments(1, 256, 2, 2, 1, 2, dtype=torch.float32)
    dt = dt.requires_grad_()
    y, _ = ssd(x, dt, 50 * A, B, C, dt_softplus=True, chunk_size=256)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert dt.grad is not None
    assert torch.isfinite(dt.grad).all()
    torch.testing.assert_close(y, reference(x, dt, 50 * A, B, C, dt_softplus=True)[0], rtol=1e-3, atol=1e-4)


def test_with_a_decay_of_one_it_is_causal_linear_attention() -> None:
    (x, _, _, B, C), _ = arguments(1, 9, 2, 3, 1, 4)
    y, _ = ssd(x, torch.ones(1, 9, 2).double(), torch.zeros(2).double(), B, C, chunk_size=4)
    scores = (C[:, :, 0] @ B[:, :, 0].mT).tril()
    torch.testing.assert_close(y, torch.einsum("bls,bshp->blhp", scores, x))


def test_triton_interpreted() -> None:
    run_interpreted(
        """
        from kernels.test_ssd import arguments
        from tersor.kernels import ssd, ssd_triton
        for sizes in ((1, 1, 1, 1, 1, 1), (2, 70, 4, 8, 2, 5), (1, 130, 2, 20, 1, 24)):
            (x, dt, A, B, C), more = arguments(*sizes, dtype=torch.float32)
            inputs = (x, torch.nn.functional.softplus(dt), A, B, C, more["initial_state"])
            expected = ssd.chunked(*inputs, chunk_size=16)
            torch.testing.assert_close(ssd_triton.forward(*inputs), expected, rtol=1e-4, atol=1e-4)
        """
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "length", "heads", "p", "groups", "n"),
    [(2, 300, 6, 64, 2, 128), (1, 1, 2, 8, 1, 4), (2, 1000, 24, 64, 1, 64)],
)
def test_on_a_gpu(b: int, length: int, heads: int, p: int, groups: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    (x, dt, A, B, C), more = arguments(b, length, heads, p, groups, n, dtype=torch.float32, device="cuda")
    tensors = (x.to(dtype), dt, A, B.to(dtype) / n**0.5, C.to(dtype))
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    double = {key: value if value is True else value.double() for key, value in more.items()}
    expected = reference(*(each.double() for each in tensors), **double)
    y, state = ssd(*tensors, **more)
    assert y.dtype == dtype
    torch.testing.assert_close((y.double(), state.double()), expected, rtol=tolerance, atol=5 * tolerance)
    leaf = tensors[0].requires_grad_()
    ssd(*tensors, **more)[0].float().square().mean().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
