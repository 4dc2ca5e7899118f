"""A weight in the GPU kernel's layout is the same weight."""

import pytest
import torch
from kernels.random_weights import random_weight

from tersor.kernels.quantized_matmul import quantized_matmul, reference
from tersor.kernels.tiled_weight import prepare, restore
from tersor.layers.quantized_linear import QuantizedLinear


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_restore_gives_back_every_tensor(bits: int, group_size: int, symmetric: bool) -> None:
    weight = random_weight(96, 544, bits=bits, group_size=group_size, symmetric=symmetric)
    again = restore(prepare(weight))
    assert torch.equal(again.qweight, weight.qweight)
    assert torch.equal(again.scales, weight.scales)
    assert torch.equal(again.zeros, weight.zeros)
    assert again.g_idx is None


def test_columns_in_activation_order_come_back_in_place() -> None:
    weight = random_weight(64, 256, bits=4, group_size=64, shuffled=True)
    again = restore(prepare(weight))
    assert torch.equal(again.codes(), weight.codes())
    assert again.g_idx is not None
    assert torch.equal(again.g_idx, weight.g_idx)


def test_odd_sizes_lose_their_padding() -> None:
    weight = random_weight(77, 200, bits=3, group_size=32)
    assert torch.equal(restore(prepare(weight)).codes(), weight.codes())


@pytest.mark.parametrize(("bits", "group_size", "message"), [(5, 128, "5 bits"), (4, 48, "groups of 48")])
def test_what_no_kernel_takes_is_refused_with_the_reason(bits: int, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(random_weight(64, 192, bits=bits, group_size=group_size))


def test_a_layer_gives_the_same_output_and_weight_once_prepared() -> None:
    weight = random_weight(64, 256, bits=4, group_size=64, shuffled=True)
    layer, x = QuantizedLinear(weight), torch.randn(3, 5, 256)
    before = layer(x)
    assert layer.prepare()
    assert layer.prepare()  # twice is once
    torch.testing.assert_close(layer(x), before)
    assert torch.equal(layer.packed.qweight, weight.qweight)


def test_the_input_gets_the_references_gradient() -> None:
    weight = random_weight(64, 256, bits=4, group_size=64, shuffled=True)
    x = torch.randn(4, 256, requires_grad=True)
    expected = torch.autograd.grad(reference(x, weight).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(quantized_matmul(x, prepare(weight)).square().sum(), x)[0], expected)
