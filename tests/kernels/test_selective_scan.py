"""The selective scan against its token-by-token reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.triton_interpreter import run_interpreted
from torch import Tensor

from tersor.kernels.selective_scan import reference, selective_scan


def arguments(
    b: int = 2, length: int = 13, d: int = 5, n: int = 3, *, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    tensors = (
        normal(b, length, d),
        normal(b, length, d),
        -normal(d, n).exp(),
        normal(b, length, n),
        normal(b, length, n),
    )
    more = {"D": normal(d), "z": normal(b, length, d), "dt_bias": normal(d), "initial_state": normal(b, d, n)}
    return tensors, {**more, "dt_softplus": True}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(1, 50),
    st.sets(st.sampled_from(["D", "z", "dt_bias", "initial_state"])), st.booleans(),
)  # fmt: skip
def test_equals_the_reference(
    b: int, length: int, d: int, n: int, chunk: int, left_out: set[str], padded: bool
) -> None:
    torch.manual_seed(length)
    tensors, more = arguments(b, length, d, n)
    more = {name: value for name, value in more.items() if name not in left_out}
    if padded:
        more["mask"] = torch.rand(b, length) < 0.7
    torch.testing.assert_close(selective_scan(*tensors, **more, chunk_size=chunk), reference(*tensors, **more))


def test_gradients() -> None:
    torch.manual_seed(0)
    tensors, more = arguments(2, 7, 3, 2)
    names = ["D", "z", "dt_bias", "initial_state"]
    inputs = [each.requires_grad_() for each in (*tensors, *(more[name] for name in names))]

    def scan(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        rest = dict(zip(names, inputs[5:], strict=True))
        return selective_scan(*inputs[:5], **rest, dt_softplus=True, chunk_size=3)

    assert torch.autograd.gradcheck(scan, inputs)


def test_the_op_is_well_registered() -> None:
    x, dt, A, B, C = arguments()[0]
    inputs = [each.requires_grad_() for each in (x, dt.detach().exp(), A, B, C, torch.randn(2, 5, 3).double())]
    torch.library.opcheck(torch.ops.tersor.selective_scan, (*inputs, 4))


def test_a_sequence_in_two_pieces_and_padding_change_nothing() -> None:
    torch.manual_seed(0)
    (x, dt, A, B, C), more = arguments(dtype=torch.float32)
    z, state = more.pop("z"), more.pop("initial_state")
    y, last = selective_scan(x, dt, A, B, C, z=z, initial_state=state, **more)
    first, middle = selective_scan(x[:, :5], dt[:, :5], A, B[:, :5], C[:, :5], z=z[:, :5], initial_state=state, **more)
    second, end = selective_scan(x[:, 5:], dt[:, 5:], A, B[:, 5:], C[:, 5:], z=z[:, 5:], initial_state=middle, **more)
    torch.testing.assert_close((torch.cat((first, second), 1), end), (y, last))
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, 5:] = False
    _, padded = selective_scan(x, dt, A, B, C, z=z, initial_state=state, mask=mask, **more)
    torch.testing.assert_close((padded[0], padded[1]), (middle[0], last[1]))


def test_half_precision_inputs_are_summed_in_float32() -> None:
    tensors, more = arguments(dtype=torch.float32)
    half = [each.bfloat16() for each in tensors]
    y, state = selective_scan(*half, **more)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    expected, _ = reference(*(each.float() for each in half), **more)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


def test_triton_interpreted() -> None:
    run_interpreted(
        """
        from kernels.test_selective_scan import arguments
        from tersor.kernels import selective_scan, selective_scan_triton
        for b, length, d, n, chunk in ((1, 1, 1, 1, 4), (2, 11, 5, 3, 4), (1, 9, 40, 16, 64)):
            (x, dt, A, B, C), more = arguments(b, length, d, n, dtype=torch.float32)
            inputs = (x, torch.nn.functional.softplus(dt), A, B, C, more["initial_state"])
            expected = selective_scan.chunked(*inputs, chunk_size=chunk)
            torch.testing.assert_close(selective_scan_triton.forward(*inputs, chunk), expected, rtol=1e-4, atol=1e-4)
        """
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("b", "length", "d", "n"), [(2, 300, 70, 16), (1, 1, 3, 4), (3, 65, 1536, 16)])
def test_on_a_gpu(b: int, length: int, d: int, n: int) -> None:
    torch.manual_seed(0)
    tensors, more = arguments(b, length, d, n, dtype=torch.float32, device="cuda")
    expected = reference(
        *(each.double() for each in tensors), **{k: v if v is True else v.double() for k, v in more.items()}
    )
    leaves = [each.requires_grad_() for each in tensors]
    y, state = selective_scan(*leaves, **more)
    torch.testing.assert_close((y.double(), state.double()), expected, rtol=1e-3, atol=1e-3)
    gradients = torch.autograd.grad(y.square().mean() + state.mean(), leaves)
    on_cpu = [each.detach().cpu().requires_grad_() for each in tensors]
    y, state = selective_scan(*on_cpu, **{k: v if v is True else v.cpu() for k, v in more.items()})
    expected = torch.autograd.grad(y.square().mean() + state.mean(), on_cpu)
    torch.testing.assert_close([each.cpu() for each in gradients], list(expected), rtol=1e-3, atol=1e-4)
