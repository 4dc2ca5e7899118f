"""The compiled scan and convolution against their plain forms."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tersor.kernels import mamba_cpu
from tersor.kernels.selective_scan import reference, selective_scan
from tersor.layers.causal_conv import CausalConv1d

needs_compiler = pytest.mark.skipif(mamba_cpu.library() is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize(("b", "length", "d", "n"), [(2, 1, 5, 3), (2, 1, 33, 16), (1, 37, 48, 16), (3, 70, 33, 1)])
@pytest.mark.parametrize("fused", [False, True])
def test_scan_equals_the_reference(b: int, length: int, d: int, n: int, fused: bool) -> None:
    torch.manual_seed(0)
    wide = torch.randn(b, length, 2 * d)
    x, z = wide.chunk(2, -1)  # rows with gaps, as the mixer has them
    dt, A = 3 * torch.randn(b, length, d), -torch.rand(d, n) * 8
    B, C = torch.randn(b, length, n), torch.randn(b, length, n)
    more = {"D": torch.randn(d), "z": z, "dt_bias": torch.randn(d), "dt_softplus": True} if fused else {}
    dt = dt if fused else F.softplus(dt)
    start = torch.randn(b, d, n)
    assert mamba_cpu.plain(x, dt, A, B, C, start)
    given = dict(initial_state=start, **more)
    y, state = selective_scan(x, dt, A, B, C, **given)
    wide_y, wide_state = reference(
        *(each.double() for each in (x, dt, A, B, C)),
        **{name: each.double() if isinstance(each, torch.Tensor) else each for name, each in given.items()},
    )
    torch.testing.assert_close(y.double(), wide_y, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(state.double(), wide_state, rtol=2e-5, atol=2e-5)


@needs_compiler
def test_extreme_steps_stay_finite_and_right() -> None:
    dt = torch.tensor([-200.0, -80.0, -20.0, -7.0, 0.0, 5.0, 30.0, 200.0]).view(1, 8, 1)
    x, A = torch.ones(1, 8, 1), -torch.ones(1, 1)
    B = C = torch.ones(1, 8, 1)
    z = torch.tensor([-1e4, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4, 3.0]).view(1, 8, 1)
    found, _ = selective_scan(x, dt, A, B, C, z=z, dt_softplus=True)
    right, _ = reference(*(e.double() for e in (x, dt, A, B, C)), z=z.double(), dt_softplus=True)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-30)


@needs_compiler
@pytest.mark.parametrize(("width", "channels", "bias"), [(4, 40, True), (1, 3, False), (3, 17, True)])
@pytest.mark.parametrize("silu", [False, True])
def test_convolution_equals_torch_whole_and_in_pieces(width: int, channels: int, bias: bool, silu: bool) -> None:
    torch.manual_seed(0)
    conv = CausalConv1d(channels, width, bias=bias)
    x = torch.randn(2, 21, 2 * channels).chunk(2, -1)[0]
    expected, last = conv(x, silu=silu)  # with gradients, in torch
    assert expected.requires_grad
    with torch.inference_mode():
        whole, after = conv(x, silu=silu)
        torch.testing.assert_close(whole, expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after, last)
        state, pieces = None, []
        for piece in x.split([1, 1, 12, 7], 1):
            y, state = conv(piece, state, silu=silu)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole)
        torch.testing.assert_close(state, last)
