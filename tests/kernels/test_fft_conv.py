"""The gated FFT convolution against sums written out, and its GPU form against torch.fft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.triton_interpreter import run_interpreted
from torch import Tensor

from tersor.errors import TersorError
from tersor.kernels import fft_conv as module
from tersor.kernels import nvrtc
from tersor.kernels.fft_conv import causal_taps, faster_on_chip, fft_conv, fft_length, reference


def gates(u: Tensor, which: str) -> dict[str, Tensor]:
    return {name: torch.randn_like(u) for name in ("gate_in", "gate_out") if name in which}


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.sampled_from(["", "gate_in", "gate_in gate_out"])
)  # fmt: skip
def test_equals_the_sum_written_out(b: int, h: int, length: int, which: str) -> None:
    torch.manual_seed(length)
    u, kernel, skip = torch.randn(b, h, length).double(), torch.randn(h, length).double(), torch.randn(h).double()
    more = gates(u, which)
    w = u * more.get("gate_in", 1)
    past = torch.arange(length)[:, None] - torch.arange(length)
    matrix = torch.where(past >= 0, kernel[:, past.clamp(min=0)], 0)  # (h, t, s)
    expected = (torch.einsum("hts,bhs->bht", matrix, w) + skip[:, None] * w) * more.get("gate_out", 1)
    torch.testing.assert_close(fft_conv(u, causal_taps(kernel, skip), **more), expected)


def test_the_last_taps_meet_what_follows() -> None:
    u, taps = torch.randn(1, 1, 5).double(), torch.zeros(1, 12).double()
    taps[0, -2] = 1
    expected = torch.nn.functional.pad(u[..., 2:], (0, 2))
    torch.testing.assert_close(fft_conv(u, taps), expected)


def test_gradients_and_registration() -> None:
    torch.manual_seed(0)
    u, taps = torch.randn(3, 2, 5).double(), torch.randn(2, 10).double()
    more = gates(u, "gate_in gate_out")
    inputs = [each.requires_grad_() for each in (u, taps, more["gate_in"], more["gate_out"])]
    assert torch.autograd.gradcheck(lambda u, taps, a, b: fft_conv(u, taps, gate_in=a, gate_out=b), inputs)
    assert torch.autograd.gradcheck(lambda u, taps: torch.ops.tersor.fft_conv(u, taps, None, None, True), inputs[:2])
    torch.library.opcheck(torch.ops.tersor.fft_conv, (*inputs, False), test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(TersorError, match=r"\[2, 9\]"):
        fft_conv(torch.zeros(1, 2, 5), torch.zeros(2, 9))
    with pytest.raises(TersorError, match="gates"):
        fft_conv(torch.zeros(1, 2, 5), torch.zeros(2, 10), gate_out=torch.zeros(1, 2, 4))
    assert [fft_length(length) for length in (1, 512, 513, 2048)] == [1024, 1024, 2048, 4096]


def test_triton_interpreted() -> None:
    run_interpreted(
        """
        from tersor.kernels import fft_conv, fft_conv_triton
        for b, h, length in ((3, 2, 700), (2, 1, 2048)):
            u, a, z, grad = (torch.randn(b, h, length) for _ in range(4))
            N = fft_conv.fft_length(length)
            taps = torch.randn(h, N) / length**0.5
            for gate_in, gate_out, reverse in ((None, None, True), (a, z, False)):
                expected = fft_conv._plain(u, taps, gate_in, gate_out, reverse=reverse)
                found = fft_conv_triton.convolve(u, taps, gate_in, gate_out, reverse=reverse)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
                expected = fft_conv._plain_correlation(u, gate_in, grad, gate_out, N)
                found = fft_conv_triton.correlate(u, gate_in, grad, gate_out, N)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        """
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "h", "length"), [(3, 5, 500), (4, 3, 1024), (1, 2, 2000), (5, 2, 4096)])
def test_on_a_gpu(b: int, h: int, length: int, dtype: torch.dtype) -> None:
    """In Triton where the data have 16 bits and fit, by torch.fft elsewhere."""
    torch.manual_seed(0)
    u = torch.randn(b, h, length, device="cuda").to(dtype)
    taps = causal_taps(torch.randn(h, length, device="cuda") / length**0.5, torch.randn(h, device="cuda"))
    assert module._on_chip(u, taps) == (dtype == torch.bfloat16 and length <= 2048)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for which in ("", "gate_in gate_out"):
        more = gates(u, which)
        leaves = [each.clone().requires_grad_() for each in (u, taps, *more.values())]
        wide = [each.detach().double().requires_grad_() for each in leaves]
        grad = torch.randn_like(u)
        y = fft_conv(leaves[0], leaves[1], **dict(zip(more, leaves[2:], strict=True)))
        expected = reference(wide[0], wide[1], **dict(zip(more, wide[2:], strict=True)))
        found = [y, *torch.autograd.grad(y, leaves, grad)]
        wanted = [expected, *torch.autograd.grad(expected, wide, grad.double())]
        for each, other in zip(found, wanted, strict=True):
            assert float((each.double() - other).detach().norm() / other.detach().norm()) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_faster_is_measured_once_on_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path)
    module._measured.cache_clear()
    device = torch.device("cuda")
    found = [faster_on_chip(length, torch.bfloat16, device, backward=True) for length in (1000, 1024)]
    (kept,) = tmp_path.glob("*.json")  # 1,000 count as 1,024
    times = json.loads(kept.read_text())["microseconds"]
    assert min(times.values()) > 0
    assert found == [times[module.ON_CHIP] < times[module.FFT]] * 2
    kept.write_text(json.dumps({"microseconds": {module.ON_CHIP: 2.0, module.FFT: 1.0}}))
    module._measured.cache_clear()  # as a later process
    assert not faster_on_chip(1024, torch.bfloat16, device, backward=True)
    module._measured.cache_clear()
    for length, dtype in ((2049, torch.bfloat16), (1024, torch.float32)):  # what the Triton form does not take
        assert not faster_on_chip(length, dtype, device, backward=False)
