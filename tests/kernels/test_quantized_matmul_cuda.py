"""The GPU kernel computes x · Wᵀ as exactly as the reference does, measured against float64."""

import pytest
import torch
from kernels.random_weights import random_weight
from torch import Tensor

from tersor.kernels.quantized_matmul import quantized_matmul, reference
from tersor.kernels.quantized_matmul_cuda import HOPPER, Launch, architecture_of, launch
from tersor.kernels.tiled_weight import TiledWeight, prepare
from tersor.layers.quantized_linear import QuantizedLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or architecture_of(torch.device("cuda", 0)) != HOPPER,
        reason="needs a GPU of compute capability 9.0 (Hopper)",
    ),
]


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def assert_as_good_as_reference(
    rows: int, weight_of: dict[str, int | bool], out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    weight = random_weight(out_features, in_features, device="cuda", **weight_of)  # type: ignore[arg-type]
    x = torch.randn(rows, in_features, dtype=dtype, device="cuda")
    exact = x.double() @ weight.dequantize(torch.float64).t()
    torch.full(
        (rows, out_features), float("nan"), dtype=dtype, device="cuda"
    )  # freed at once: the output's memory to be
    y = quantized_matmul(x, prepare(weight))
    assert y.dtype == dtype
    # In bfloat16 the scale is rounded before it meets the code, the reference rounds once: hence the margin.
    assert relative_error(y, exact) < 1.35 * relative_error(reference(x, weight), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 13, 40])
def test_every_kind_of_weight(rows: int, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype) -> None:
    kind = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    assert_as_good_as_reference(rows, kind, 544, 1056, dtype)


@pytest.mark.parametrize(
    "shape", [(96, 288), (77, 200), (1056, 2080), (1000, 4224), (4096, 4096), (64, 12288), (8192, 8192)]
)
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 32, 33, 64, 100, 128, 130, 200, 300, 1000])
def test_every_shape_and_number_of_rows(rows: int, shape: tuple[int, int]) -> None:
    assert_as_good_as_reference(rows, {"bits": 4, "group_size": 128}, *shape, torch.float16)


@pytest.mark.parametrize("rows", [1, 64, 256])
def test_activation_order(rows: int) -> None:
    kind = {"bits": 4, "group_size": 128, "shuffled": True}
    assert_as_good_as_reference(rows, kind, 512, 1024, torch.float16)


def test_inputs_that_fill_no_16_bytes() -> None:
    assert_as_good_as_reference(3, {"bits": 8, "group_size": -1}, 64, 84, torch.float16)


@pytest.mark.parametrize("rows", [1, 32, 256])
def test_the_same_bits_every_time(rows: int) -> None:
    weight = prepare(random_weight(4096, 4096, bits=4, group_size=128, device="cuda"))
    x = torch.randn(rows, 4096, dtype=torch.float16, device="cuda")
    first = quantized_matmul(x, weight)
    assert all(torch.equal(quantized_matmul(x, weight), first) for _ in range(20))


def test_leading_dimensions_and_no_rows_at_all() -> None:
    weight = random_weight(128, 256, bits=4, group_size=64, device="cuda")
    x = torch.randn(2, 3, 256, dtype=torch.float16, device="cuda")
    torch.testing.assert_close(quantized_matmul(x, prepare(weight)), reference(x, weight), rtol=1e-2, atol=1e-2)
    assert quantized_matmul(x[:0], prepare(weight)).shape == (0, 3, 128)


def test_float32_goes_through_the_reference() -> None:
    weight = random_weight(128, 256, bits=4, group_size=64, device="cuda")
    x = torch.randn(2, 256, device="cuda")
    torch.testing.assert_close(quantized_matmul(x, prepare(weight)), reference(x, weight))


def test_one_graph_under_compile_with_a_gradient() -> None:
    layer = QuantizedLinear(random_weight(256, 512, bits=4, group_size=128, device="cuda"))
    assert layer.prepare()
    x = torch.randn(4, 512, dtype=torch.float16, device="cuda", requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    expected = torch.autograd.grad(reference(x, layer.packed).float().square().sum(), x)[0]
    found = torch.autograd.grad(compiled(x).float().square().sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_captured_graph_replays_with_new_input() -> None:
    weight = random_weight(4096, 4096, bits=4, group_size=128, device="cuda")
    prepared, x = prepare(weight), torch.randn(1, 4096, dtype=torch.float16, device="cuda")
    quantized_matmul(x, prepared)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = quantized_matmul(x, prepared)
        y = quantized_matmul(hidden / 100, prepared)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, quantized_matmul(quantized_matmul(x, prepared) / 100, prepared), rtol=0, atol=0)


def test_launches_beyond_the_table() -> None:
    """Other cuts of the same work give the same numbers."""
    weight = prepare(random_weight(1056, 2080, bits=4, group_size=64, device="cuda"))
    x = torch.randn(24, 2080, dtype=torch.float16, device="cuda")
    expected = launch(x, weight)
    for how in (Launch(8, 1, 4, 2, True), Launch(16, 4, 1, 1, True), Launch(24, 2), Launch(256, 2)):
        y = launch(x, weight, (how, 100))
        assert relative_error(y, expected.double()) < 1e-3


def test_the_weight_may_follow_its_tiles_to_another_place() -> None:
    weight = prepare(random_weight(128, 256, bits=4, group_size=64))
    moved = weight.to("cuda")
    assert isinstance(moved, TiledWeight)
    x = torch.randn(2, 256, dtype=torch.float16)
    torch.testing.assert_close(
        quantized_matmul(x.cuda(), moved).cpu(), quantized_matmul(x, weight), rtol=1e-2, atol=1e-2
    )
