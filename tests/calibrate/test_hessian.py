from __future__ import annotations

import torch

from tersor.calibrate.hessian import Hessian


def of(samples: list[torch.Tensor]) -> Hessian:
    hessian = Hessian(16)
    for x in samples:
        hessian.add(x, 1)
    return hessian


def test_is_the_mean_over_samples() -> None:
    samples = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (5, 9, 7)]
    expected = sum(x.double().t() @ x.double() for x in samples) * 2 / 3
    torch.testing.assert_close(of(samples).matrix.double(), expected, rtol=1e-5, atol=1e-5)


def test_does_not_depend_on_the_order_or_the_sharing_out_of_the_samples() -> None:
    samples = [torch.randn(40, 16, generator=torch.Generator().manual_seed(n)) * (1 + n) for n in range(9)]
    whole = of(samples)
    assert torch.equal(of(samples[::-1]).matrix, whole.matrix)
    shares = [of(samples[rank::4]) for rank in range(4)]
    shares[3].total += shares[1].total + shares[0].total + shares[2].total
    assert torch.equal(shares[3].total, whole.total)
