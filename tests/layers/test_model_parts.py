"""The small parts that models are built of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tersor.errors import TersorError
from tersor.layers.activations import activation
from tersor.layers.checks import at_least, divides, one_of, same_length
from tersor.layers.conv_norm import fold
from tersor.layers.patch_embed import check_image
from tersor.layers.positions import resize_grid, rotary_table, rotate, sinusoids
from tersor.layers.scan_orders import cross_orders, scan, snake_orders, unscan
from tersor.layers.series_parts import InstanceScale, decompose
from tersor.layers.straight_through import round_through, straight_through
from tersor.models.key_maps import drop, pack, rename, split, squeeze_to


def test_folding_a_norm_changes_no_output() -> None:
    torch.manual_seed(0)
    for layer, norm, x in (
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), torch.randn(2, 4, 5, 5)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), torch.randn(2, 4)),
    ):
        norm.train()(layer(x))
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        torch.testing.assert_close(fold(layer, norm)(x), norm.eval()(layer(x)))


def test_sinusoids_and_rotations() -> None:
    table = sinusoids(5, 6)
    assert table[3, 2].item() == pytest.approx(math.sin(3 / 10_000 ** (2 / 6)))
    assert table[3, 3].item() == pytest.approx(math.cos(3 / 10_000 ** (2 / 6)))
    assert torch.equal(sinusoids(5, 6, interleaved=False)[:, :3], table[:, 0::2])
    cos, sin = rotary_table(7, 8)
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    for interleaved in (False, True):
        turned_q, turned_k = (rotate(x.expand(7, 8), cos, sin, interleaved=interleaved) for x in (q, k))
        products = turned_q @ turned_k.t()  # depends on the distance alone
        torch.testing.assert_close(products[2, 0], products[6, 4], rtol=1e-6, atol=1e-6)


def test_resized_grids_keep_class_tokens_and_constants() -> None:
    table = torch.cat((torch.full((1, 1, 3), 9.0), torch.full((1, 16, 3), 2.0)), 1)
    resized = resize_grid(table, (4, 4), (6, 5), extra=1)
    assert resized.shape == (1, 31, 3)
    assert resized[:, 0].eq(9).all()
    torch.testing.assert_close(resized[:, 1:], torch.full((1, 30, 3), 2.0))


def test_scan_orders_are_permutations_that_unscan_undoes() -> None:
    x = torch.randn(2, 3, 4, 5)
    for orders in (cross_orders(4, 5), snake_orders(4, 5)):
        assert torch.equal(orders.sort(1).values, torch.arange(20).expand(4, 20))
        torch.testing.assert_close(unscan(scan(x, orders), orders), 4 * x.flatten(2))
    steps = snake_orders(4, 5)[0].diff().abs()
    assert set(steps.tolist()) == {1, 5}  # neighbours in the grid


def test_series_parts() -> None:
    x = 5 + 3 * torch.randn(2, 40, 3)
    scale = InstanceScale.of(x)
    z = scale.apply(x)
    torch.testing.assert_close(z.mean(1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scale.undo(z), x)
    seasonal, trend = decompose(x, 25)
    torch.testing.assert_close(seasonal + trend, x)
    torch.testing.assert_close(trend[:, 20], x[:, 8:33].mean(1))
    torch.testing.assert_close(trend[:, 0], (13 * x[:, 0] + x[:, 1:13].sum(1)) / 25)


def test_straight_through_gradients() -> None:
    x = torch.tensor([0.4, 1.6], requires_grad=True)
    y = round_through(x)
    y.square().sum().backward()
    assert y.tolist() == [0, 2]
    assert x.grad is not None
    assert x.grad.tolist() == [0, 4]
    soft = torch.tensor(1.0, requires_grad=True)
    straight_through(torch.tensor(7.0), soft).backward()
    assert soft.grad == 1


def test_key_maps() -> None:
    state = {"module.a.qkv.weight": torch.arange(6.0).reshape(6, 1), "module.index": torch.zeros(1)}
    state = drop(rename(state, (r"^module\.", "")), r"index$")
    parts = split(state, r"(.*)\.qkv\.(weight)", (r"\1.q.\2", r"\1.k.\2", r"\1.v.\2"))
    assert parts["a.k.weight"].flatten().tolist() == [2, 3]
    packed = pack(parts, (r"(.*)\.q\.(weight)", r"(.*)\.k\.(weight)", r"(.*)\.v\.(weight)"), r"\1.qkv.\2")
    assert torch.equal(packed["a.qkv.weight"], state["a.qkv.weight"])
    squeezed = squeeze_to(
        {"w": torch.ones(3, 2, 1, 1), "b": torch.ones(4)}, {"w": torch.ones(3, 2), "b": torch.ones(5)}
    )
    assert squeezed["w"].shape == (3, 2)
    assert squeezed["b"].shape == (4,)


def test_checks_name_the_value() -> None:
    for check, said in (
        (lambda: one_of("m", "mode", "x", ("a", "b")), "m's mode is one of 'a', 'b', not 'x'"),
        (lambda: divides("m", "heads", 3, "width", 8), "m's width 8 is not a multiple of heads 3"),
        (lambda: at_least("m", 1, depth=0), "m needs depth of at least 1, not 0"),
        (lambda: same_length("m", a=(1,), b=(1, 2)), "a has 1, b has 2"),
        (lambda: check_image("m", torch.zeros(1, 3, 30, 64), channels=3, multiple=32), "32 x 64 works"),
        (lambda: check_image("m", torch.zeros(3, 32, 32), channels=3), r"not \[3, 32, 32\]"),
        (lambda: activation("swoosh", of="m"), "m's activation is one of"),
    ):
        with pytest.raises(TersorError, match=said):
            check()
