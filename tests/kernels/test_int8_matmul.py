"""Every implementation of the product of 8-bit integers gives the bits of its definition."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernels.random_weights import random_weight
from torch import Tensor

from tersor.formats.activation_grid import round_tokens, token_codes
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels import choices, cpp, nvrtc, quantized_matmul
from tersor.kernels import int8_matmul as int8
from tersor.kernels import int8_matmul_cpu as cpu
from tersor.layers.quantized_linear import QuantizedLinear

SHAPES = [(1, 5, 3), (2, 64, 32), (7, 33, 40), (13, 1030, 65), (520, 40, 33)]  # rows, inputs, outputs


def drawn(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs) + 0.1


def weight_of(outputs: int, inputs: int) -> QuantizedWeight:
    torch.manual_seed(0)
    return replace(random_weight(outputs, inputs, bits=8, group_size=-1, symmetric=True), a_bits=8)


def test_a_token_has_the_codes_of_the_compressed_tensors_package() -> None:
    x = torch.tensor([[2.55, -2.55, 0.01, 0.03], [0.0, 0.0, 0.0, 0.0]])
    codes, step = token_codes(x)
    assert codes.tolist() == [
        [127, -128, 0, 2],
        [0, 0, 0, 0],
    ]  # 127.5 lies between two codes: the even one is out of range
    assert step.flatten().tolist() == pytest.approx([0.02, 1.0])


def test_gradients_pass_the_rounding() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    round_tokens(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("implementation", cpu.supported())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_equals_the_definition(implementation: str, dtype: torch.dtype) -> None:
    try:
        cpu.library(implementation)
    except cpp.CompileError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    for rows, inputs, outputs in SHAPES:
        codes, steps = drawn(outputs, inputs)
        x = (torch.randn(rows, inputs) * 10 ** torch.linspace(-20, 20, rows)[:, None]).to(dtype)
        x[-1] = 0
        packed = cpu.pack(codes)
        assert torch.equal(cpu.unpack(packed, outputs, inputs), codes)
        assert torch.equal(cpu.matmul(x, packed, steps, implementation), int8.reference(x, codes, steps))


@pytest.mark.skipif(cpu.choose() is None, reason="no compiler")
def test_the_largest_sums_fit_and_what_is_not_finite_stays_so() -> None:
    chosen = cpu.choose()
    assert chosen is not None
    codes, steps = torch.full((32, 4096), -128, dtype=torch.int8), torch.ones(32)
    x = torch.full((5, 4096), -1.0)
    x[1, 7], x[2, 9], x[3, 0] = float("nan"), float("inf"), 0.5
    found, wanted = cpu.matmul(x, cpu.pack(codes), steps, chosen), int8.reference(x, codes, steps)
    assert torch.equal(found[[0, 3, 4]], wanted[[0, 3, 4]])
    assert found[0, 0].item() == pytest.approx(127 * 128 * 4096 / 127.5)  # float32 puts -1 a hair inside -127.5 steps
    assert bool(found[1:3].isnan().all())
    assert bool(wanted[1:3].isnan().all())


@pytest.mark.skipif(cpu.choose() is None, reason="no compiler")
def test_rows_need_not_be_contiguous_and_threads_change_nothing() -> None:
    torch.manual_seed(0)
    chosen, (codes, steps) = cpu.choose(), drawn(256, 96)
    assert chosen is not None
    x = torch.randn(3, 50, 200)[..., 4:100]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = cpu.matmul(x, cpu.pack(codes), steps, chosen)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, int8.reference(x, codes, steps))


def test_torch_gives_the_same() -> None:
    torch.manual_seed(0)
    for rows in (1, 20):
        codes, steps = drawn(24, 40)
        x = torch.randn(2, rows, 40)
        assert torch.equal(int8.torch_matmul(x, codes, steps), int8.reference(x, codes, steps))


@pytest.mark.parametrize("implementation", [*([cpu.choose()] if cpu.choose() else []), int8.TORCH, int8.REFERENCE])
def test_a_layer_multiplies_integers_once_it_is_prepared(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_choose", lambda *_: implementation)
    weight, bias = weight_of(24, 40), torch.randn(24)
    layer, x = QuantizedLinear(weight, bias), torch.randn(2, 3, 40)
    plain = layer(x)
    assert torch.allclose(plain, round_tokens(x) @ weight.dequantize(torch.float32).t() + bias, atol=1e-5)
    assert layer.prepare()
    assert isinstance(layer.prepared, int8.Int8Weight)
    assert torch.allclose(layer(x), plain, atol=1e-5)
    assert not torch.equal(layer(x), plain)
    again = layer.packed
    assert torch.equal(again.qweight, weight.qweight)
    assert torch.equal(again.scales, weight.scales)
    assert again.a_bits == 8
    assert torch.equal(again.zeros, weight.zeros)
    assert torch.allclose(layer(x.half()).float(), layer(x.half().float()), rtol=2e-3, atol=1e-2)
    compiled = torch.library.opcheck(
        torch.ops.tersor.int8_matmul.default,
        (x, *(getattr(layer.prepared, name) for name in int8.Int8Weight.__dataclass_fields__)),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(compiled.values()) == {"SUCCESS"}


def test_gradients_are_those_of_the_dense_weight() -> None:
    weight = weight_of(24, 40)
    x = torch.randn(5, 40, requires_grad=True)
    y = quantized_matmul.quantized_matmul(x, int8.prepare(weight))
    assert torch.equal(y.detach(), quantized_matmul.quantized_matmul(x.detach(), int8.prepare(weight)))
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.dequantize(torch.float32).sum(0).expand(5, 40), atol=1e-5)


def test_other_kernels_leave_rounded_inputs_alone() -> None:
    weight = weight_of(32, 64)
    assert isinstance(quantized_matmul.prepare(weight), int8.Int8Weight)
    assert not isinstance(quantized_matmul.prepare(replace(weight, a_bits=None)), int8.Int8Weight)
    groups = replace(random_weight(32, 64, bits=8, group_size=32), a_bits=8)
    assert isinstance(quantized_matmul.prepare(groups), QuantizedWeight)  # still rounds, without integers


def test_the_faster_of_two_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = cpu.choose()
    if compiled is None:
        pytest.skip("no compiler")
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True, "cpu_name": "a test's"})
    int8._measured.cache_clear()
    chosen = int8._choose(torch.device("cpu"), 64, 64)
    assert chosen in (compiled, int8.TORCH)
    (kept,) = tmp_path.glob("choice-*.json")
    other = int8.TORCH if chosen == compiled else compiled
    asked = json.loads(kept.read_text())["asked"]
    choices.keep(asked, {chosen: 2.0, other: 1.0})
    int8._measured.cache_clear()
    assert int8._choose(torch.device("cpu"), 64, 64) == other  # recalled, not measured again
    int8._measured.cache_clear()
