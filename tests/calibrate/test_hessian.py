"""H = 2/N · Σ x xᵀ, whatever the batches that the samples come in."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tersor.calibrate.hessian import Hessian
from tersor.layers.linear_map import columns_of, input_matrix, weight_matrix


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_is_the_same_however_samples_are_batched(seed: int, batches: list[int]) -> None:
    x = torch.randn(sum(batches), 7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    layer, hessian = nn.Linear(5, 3), Hessian(5, dtype=torch.float64)
    for batch in x.split(batches):
        hessian.add(*input_matrix(layer, batch))
    torch.testing.assert_close(hessian.matrix, 2 / len(x) * torch.einsum("bti,btj->ij", x, x))
    assert (hessian.samples, hessian.tokens) == (len(x), 7 * len(x))


def test_a_sample_without_a_batch_axis_counts_once() -> None:
    x, layer = torch.randn(6, 5), nn.Linear(5, 3)
    with_axis, without_axis = Hessian(5), Hessian(5)
    with_axis.add(*input_matrix(layer, x[None]))
    without_axis.add(*input_matrix(layer, x))
    assert torch.equal(with_axis.matrix, without_axis.matrix)


@given(
    st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    st.sampled_from([1, 2]),
    st.sampled_from([0, 1]),
    st.sampled_from([1, 2]),
)
def test_a_convolution_is_the_linear_map_of_its_patches(
    kernel: tuple[int, int], stride: int, padding: int, dilation: int
) -> None:
    conv = nn.Conv2d(3, 4, kernel, stride, padding, dilation, bias=False)
    x = torch.randn(2, 3, 9, 8)
    patches, samples = input_matrix(conv, x)
    y = conv(x)
    assert samples == 2
    assert patches.shape[1] == columns_of(conv)
    torch.testing.assert_close(
        (patches @ weight_matrix(conv).t()).view(2, -1, 4).transpose(1, 2).view_as(y), y, atol=1e-5, rtol=1e-5
    )


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
