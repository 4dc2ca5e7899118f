"""The CPU kernels against float64, every instruction set that this machine can run, and AMX emulated."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels import cpp, quantized_matmul, quantized_matmul_int4
from tersor.kernels import quantized_matmul_cpu as cpu
from tersor.layers.quantized_linear import QuantizedLinear

# Round-off of the result, and of the float32 sums in units of sum |x| |w|. vdpbf16ps may drop subnormals.
ROUND_OFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUMS = 2e-6


pytestmark = pytest.mark.skipif(cpu.choose()[0] is None, reason=cpu.choose()[1])


@pytest.fixture(params=[*cpu.FLAGS, "amx_emulated"])
def implementation(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "amx_emulated":
        if "avx512_bf16" not in cpu.supported():
            pytest.skip("emulating AMX needs AVX-512 BF16")
    elif name not in cpu.supported():
        pytest.skip(f"this processor has no {name}")
    return name


@pytest.fixture(autouse=True, scope="module")
def _emulated_amx():
    """The name "amx_emulated" stands for the AMX path with the tile instructions in plain C++."""
    header = Path(__file__).with_name("amx_emulation.h")
    version = f"-DEMULATION={header.stat().st_mtime_ns}"  # so that an edited header is compiled again
    flags = (*cpu.FLAGS["avx512_bf16"], "-include", str(header), version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cpu.FLAGS, "amx_emulated", flags)
        yield


def random_weight(
    *, out_features: int, in_features: int, bits: int, group_size: int, symmetric: bool, act_order: bool, seed: int
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator)
    scales = (torch.rand(groups, out_features, generator=generator) + 0.01).to(torch.float16)
    zeros = torch.randint(0, 2**bits, (groups, out_features), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    g_idx = torch.randint(0, groups, (in_features,), generator=generator) if act_order else None
    return QuantizedWeight.from_codes(codes, scales, zeros, bits=bits, group_size=group_size, g_idx=g_idx)


def assert_close_to_float64(y: Tensor, x: Tensor, weight: QuantizedWeight, *, fixed_point: bool = False) -> None:
    w = weight.dequantize(torch.float64)
    exact = x.double() @ w.t()
    bound = ROUND_OFF[x.dtype] * exact.abs() * 1.01 + SUMS * (x.double().abs() @ _with_zeros(weight).t())
    if x.dtype == torch.bfloat16 or fixed_point:
        bound += _fixed_point(x, weight) @ _with_zeros(weight).t()
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound).all()


def _fixed_point(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """How far x in 16-bit fixed point may be off: the group's largest |x| has 2^14 steps at least, and rounding takes half a
    step; or 2^15, and saturating takes a whole one."""
    groups = weight.groups().long().expand(len(x), -1)
    largest = torch.zeros(len(x), len(weight.scales), dtype=torch.float64)
    largest.scatter_reduce_(1, groups, x.double().abs(), "amax")
    return 1.01 * 2.0**-15 * largest.gather(1, groups)


def _with_zeros(weight: QuantizedWeight) -> Tensor:
    """|scale| (|code| + |zero|), [out, in]: code and zero point are summed apart, so both bound the round-off."""
    index = weight.groups()
    return ((weight.codes().t().double() + weight.zeros.double()[index]) * weight.scales.double()[index]).t()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17, 33, 70]),
    out_features=st.integers(1, 150),
    in_features=st.integers(1, 400),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 1, 7, 32, 64, 100, 128]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    dtype=st.sampled_from(list(ROUND_OFF)),
    seed=st.integers(0, 1000),
)
def test_product_is_that_of_float64_up_to_rounding(
    implementation: str,
    rows: int,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    weight = random_weight(
        out_features=out_features,
        in_features=in_features,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        seed=seed,
    )
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_close_to_float64(cpu.matmul(x, cpu.prepare(weight, implementation=implementation)), x, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_count_up_to_forty(implementation: str, bits: int, dtype: torch.dtype) -> None:
    weight = random_weight(
        out_features=64, in_features=256, bits=bits, group_size=128, symmetric=True, act_order=False, seed=0
    )
    prepared = cpu.prepare(weight, implementation=implementation)
    x = torch.randn(40, 256).to(dtype)
    for rows in range(1, 41):
        assert_close_to_float64(cpu.matmul(x[:rows], prepared), x[:rows], weight)


def test_more_rows_than_one_chunk(implementation: str) -> None:
    weight = random_weight(
        out_features=40, in_features=96, bits=4, group_size=32, symmetric=False, act_order=False, seed=0
    )
    x = torch.randn(1100, 96).bfloat16()
    assert_close_to_float64(cpu.matmul(x, cpu.prepare(weight, implementation=implementation)), x, weight)


def test_every_output_is_written_and_nothing_beside(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(
        out_features=45, in_features=64, bits=4, group_size=32, symmetric=True, act_order=False, seed=0
    )
    prepared = cpu.prepare(weight, implementation=implementation)
    buffers = []

    def poisoned(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        buffers.append(torch.full((shape[0] * shape[1] + 128,), float("nan"), dtype=x.dtype))
        return buffers[-1][64:-64].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for rows in (1, 5, 13, 33):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, 64).to(dtype)
            assert_close_to_float64(cpu.matmul(x, prepared), x, weight)
            assert buffers[-1][:64].isnan().all()
            assert buffers[-1][-64:].isnan().all()


def test_input_may_be_a_slice_or_transposed_or_have_many_dimensions(implementation: str) -> None:
    weight = random_weight(
        out_features=32, in_features=64, bits=4, group_size=32, symmetric=True, act_order=False, seed=0
    )
    prepared = cpu.prepare(weight, implementation=implementation)
    wide = torch.randn(6, 100)
    assert_close_to_float64(cpu.matmul(wide[:, 10:74], prepared), wide[:, 10:74], weight)
    tall = torch.randn(64, 6)
    assert_close_to_float64(cpu.matmul(tall.t(), prepared), tall.t(), weight)
    deep = torch.randn(2, 3, 64)
    assert torch.equal(cpu.matmul(deep, prepared), cpu.matmul(deep.view(6, 64), prepared).view(2, 3, 32))
    assert cpu.matmul(torch.randn(0, 64), prepared).shape == (0, 32)


def test_infinity_and_nan_come_through(implementation: str) -> None:
    weight = random_weight(
        out_features=32, in_features=64, bits=4, group_size=32, symmetric=True, act_order=False, seed=0
    )
    prepared = cpu.prepare(weight, implementation=implementation)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 64, dtype=dtype)
        x[0, 3] = float("nan")
        assert cpu.matmul(x, prepared).isnan().all()
        x[0, 3] = float("inf")
        assert not cpu.matmul(x, prepared).isfinite().any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("in_features", "group_size", "act_order"), [(96, 32, False), (77, 10, True), (50, -1, False)])
def test_restore_is_the_inverse_of_prepare(bits: int, in_features: int, group_size: int, act_order: bool) -> None:
    weight = random_weight(
        out_features=37,
        in_features=in_features,
        bits=bits,
        group_size=group_size,
        symmetric=False,
        act_order=act_order,
        seed=1,
    )
    restored = cpu.restore(cpu.prepare(weight))
    for field in dataclasses.fields(QuantizedWeight):
        expected, found = getattr(weight, field.name), getattr(restored, field.name)
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_type(implementation: str, dtype: torch.dtype) -> None:
    weight = random_weight(
        out_features=33, in_features=64, bits=4, group_size=32, symmetric=True, act_order=False, seed=0
    )
    scales = weight.scales.to(dtype)
    scales[0, 0], scales[1, 1] = 0, 2.0**-24  # float16's smallest number
    weight = dataclasses.replace(weight, scales=scales)
    prepared = cpu.prepare(weight, implementation=implementation)
    assert prepared.scales.dtype == dtype
    x = torch.randn(3, 64)
    assert_close_to_float64(cpu.matmul(x, prepared), x, weight)


@pytest.mark.parametrize("rows", [1, 3, 6, 13])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_float32_in_fixed_point(implementation: str, rows: int, bits: int, symmetric: bool) -> None:
    """`round_x` allows it; magnitudes from the largest to the smallest, and codes and x that make the sums as large as can be."""
    weight = random_weight(
        out_features=40, in_features=300, bits=bits, group_size=-1, symmetric=symmetric, act_order=False, seed=0
    )
    lowest, middle = torch.zeros(40, 300, dtype=torch.int64), torch.full_like(weight.zeros, 2 ** (bits - 1))
    extreme = QuantizedWeight.from_codes(lowest, weight.scales, middle, bits=bits, group_size=-1)
    for scale in (1.0, 1e30, 1e-30, 0.0):
        for x in (torch.randn(rows, 300) * scale, torch.full((rows, 300), -0.99999 * scale)):
            for each in (weight, extreme):
                prepared = cpu.prepare(each, implementation=implementation)
                y = torch.empty(rows, 40)
                call = cpu.call_of(prepared, torch.float32, round_x=True)
                call.x, call.x_stride, call.rows, call.y, call.threads = x.data_ptr(), 300, rows, y.data_ptr(), 1
                assert cpu.library(implementation).tersor_matmul(call) == 0
                assert_close_to_float64(y, x, each, fixed_point=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 32), (77, 45), (3, 1)])
def test_dense_weights(dtype: torch.dtype, in_features: int, out_features: int) -> None:
    weight = torch.randn(out_features, in_features).to(dtype)
    prepared = cpu.prepare_dense(weight)
    assert prepared.bits == (16 if dtype == torch.bfloat16 else 32)
    for rows in (1, 2, 5, 6, 7, 13, 40):
        for x in (torch.randn(rows, in_features), torch.randn(rows, in_features).bfloat16()):
            exact = x.double() @ weight.double().t()
            bound = ROUND_OFF[x.dtype] * exact.abs() * 1.01 + SUMS * (x.double().abs() @ weight.double().abs().t())
            assert ((cpu.matmul(x, prepared).double() - exact).abs() <= bound).all()


def test_float32_weights_that_bfloat16_holds_are_stored_as_such() -> None:
    weight = torch.randn(32, 64).bfloat16()
    assert torch.equal(cpu.prepare_dense(weight.float()).packed, cpu.prepare_dense(weight).packed)


@pytest.fixture
def layer() -> QuantizedLinear:
    weight = random_weight(
        out_features=48, in_features=64, bits=4, group_size=32, symmetric=False, act_order=True, seed=0
    )
    return QuantizedLinear(weight, torch.randn(48))


def test_gradient_of_the_input_is_that_of_the_reference(layer: QuantizedLinear) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    layer.prepare()
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_prepared_layer_compiles_without_a_graph_break(layer: QuantizedLinear) -> None:
    layer.prepare()
    x = torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_the_operator_is_registered_completely(layer: QuantizedLinear) -> None:
    p = cpu.prepare(layer.packed)
    x = torch.randn(3, 64, requires_grad=True)
    arguments = [getattr(p, field.name) for field in dataclasses.fields(p)]
    torch.library.opcheck(torch.ops.tersor.quantized_matmul_cpu.default, (x, *arguments))


def test_a_prepared_layer_saves_and_moves_in_the_standard_layout(layer: QuantizedLinear) -> None:
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.prepare()
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert layer.to(torch.device("cpu")).prepared is None
    assert torch.equal(layer.qweight, before["qweight"])


def test_wrong_width_of_input_is_refused(layer: QuantizedLinear) -> None:
    layer.prepare()
    with pytest.raises(ValueError, match="x has 65 features, the weight takes 64"):
        layer(torch.randn(2, 65))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpp, "COMPILERS", ())
    caches: list[Callable[[], None]] = [f.cache_clear for f in (cpp.compiler, cpu.library, cpu.choose)]
    for clear in caches:
        clear()
    yield
    for clear in caches:
        clear()


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_a_compiler_symmetric_weights_run_on_torchs_int4_operator(bits: int) -> None:
    weight = random_weight(
        out_features=64, in_features=128, bits=bits, group_size=32, symmetric=True, act_order=False, seed=0
    )
    prepared = quantized_matmul.prepare(weight)
    assert isinstance(prepared, quantized_matmul_int4.Int4Weight)
    assert quantized_matmul.restore(prepared) is weight
    assert "no compiled kernel" in cpu.describe()
    for rows in (1, 4, 20):
        x = torch.randn(rows, 128).bfloat16()
        y = quantized_matmul.quantized_matmul(x, prepared)
        exact = x.double() @ weight.dequantize(torch.float64).t()
        torch.testing.assert_close(y.double(), exact, rtol=2.0**-7, atol=2.0**-7 * float(exact.std()))
        x = torch.randn(rows, 128)  # what the operator is not good at goes to the reference
        y = quantized_matmul.quantized_matmul(x, prepared)
        torch.testing.assert_close(y, quantized_matmul.reference(x, weight))


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_other_weights_stay_as_they_are() -> None:
    weight = random_weight(
        out_features=50, in_features=70, bits=8, group_size=10, symmetric=False, act_order=True, seed=0
    )
    assert quantized_matmul.prepare(weight) is weight


def test_processes_that_build_at_the_same_time_all_get_the_library(tmp_path: Path) -> None:
    source, cache = tmp_path / "answer.cpp", tmp_path / "cache"
    source.write_text('extern "C" int answer() { return 42; }')
    code = (
        "import ctypes; from pathlib import Path; from tersor.kernels import cpp;"
        f"library = cpp.build(Path({str(source)!r}), (), cache=Path({str(cache)!r}));"
        "assert ctypes.CDLL(str(library)).answer() == 42"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1


def test_a_library_that_was_cut_off_is_built_again(tmp_path: Path) -> None:
    source, cache = tmp_path / "answer.cpp", tmp_path / "cache"
    source.write_text('extern "C" int answer() { return 42; }')
    library = cpp.build(source, (), cache=cache)
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert cpp.build(source, (), cache=cache).read_bytes() == whole


def test_a_changed_header_builds_the_library_anew(tmp_path: Path) -> None:
    source, cache = tmp_path / "answer.cpp", tmp_path / "cache"
    source.write_text('#include "number.h"\nextern "C" int answer() { return NUMBER; }')
    for number in (42, 43):
        (tmp_path / "number.h").write_text(f"#define NUMBER {number}\n")
        assert ctypes.CDLL(str(cpp.build(source, (), cache=cache))).answer() == number


def test_describe_names_the_implementation_in_use() -> None:
    name, _ = cpu.choose()
    assert str(name) in cpu.describe()
