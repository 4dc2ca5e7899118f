"""GGUF blocks hold weights exactly, and mean what the `gguf` package says they mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import TersorError
from tersor.formats.gguf_blocks import (
    BLOCK_TYPES,
    choose_type,
    dequantize_blocks,
    on_grid,
    pack_blocks,
    unpack_blocks,
)
from tersor.formats.quantized_weight import QuantizedWeight

each_type = pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)


def random_weight(
    bits: int, group_size: int, *, sym: bool = True, seed: int = 0, blocks: int = 4, g_idx: torch.Tensor | None = None
) -> QuantizedWeight:
    random = torch.Generator().manual_seed(seed)
    rows, columns = 5, 32 * blocks
    groups = 1 if group_size == -1 else -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=random, dtype=torch.uint8)
    zeros = torch.full((groups, rows), 2 ** (bits - 1), dtype=torch.uint8)
    if not sym:
        zeros = torch.randint(0, 2**bits, zeros.shape, generator=random, dtype=torch.uint8)
    scales = (torch.rand(groups, rows, generator=random) * 0.01 + 1e-4).half()
    return QuantizedWeight.from_codes(codes, scales, zeros, bits=bits, group_size=group_size, g_idx=g_idx)


@given(
    grid=st.sampled_from([(2, True), (2, False), (3, True), (3, False), (4, True), (4, False), (8, True)]),
    group_size=st.sampled_from([32, 64, 128, -1]),
    seed=st.integers(0, 2**31),
)
def test_every_grid_is_packed_and_read_back_exactly(grid: tuple[int, bool], group_size: int, seed: int) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")
    bits, sym = grid
    weight = random_weight(bits, group_size, sym=sym, seed=seed)
    kind = choose_type("layer", weight)
    blocks = pack_blocks("layer", weight, kind)
    assert blocks.shape == (weight.out_features, weight.in_features // 32 * kind.bytes)
    expected = weight.dequantize(torch.float32)
    assert torch.equal(unpack_blocks("layer", blocks, kind, weight.in_features).dequantize(torch.float32), expected)
    assert torch.equal(dequantize_blocks(blocks, kind), expected)
    theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.name])
    assert torch.equal(torch.from_numpy(theirs), expected)


@each_type
@given(seed=st.integers(0, 2**31))
def test_any_bytes_mean_what_the_gguf_package_reads(kind, seed: int) -> None:  # type: ignore[no-untyped-def]
    gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (3, 4, kind.bytes), dtype=np.uint8)
    steps = (random.standard_normal((3, 4, 2)) * 0.01).astype(np.float16).view(np.uint8)  # any bytes may be NaN
    data[..., : 4 if kind.name == "Q4_1" else 2] = steps[..., : 4 if kind.name == "Q4_1" else 2]
    data = data.reshape(3, -1)
    theirs = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.name]))
    blocks = torch.from_numpy(data)
    assert torch.equal(dequantize_blocks(blocks, kind), theirs)
    if on_grid(blocks, kind):
        weight = unpack_blocks("layer", blocks, kind, 128)
        assert torch.equal(weight.dequantize(torch.float32), theirs)
        again = choose_type("layer", weight)
        assert torch.equal(dequantize_blocks(pack_blocks("layer", weight, again), again), theirs)
    else:
        assert kind.name == "Q4_1"
        with pytest.raises(TersorError, match="no multiple of its step"):
            unpack_blocks("layer", blocks, kind, 128)


@pytest.mark.parametrize(
    ("bits", "sym", "expected"),
    [
        (4, True, "Q4_0"),
        (3, True, "Q4_0"),
        (3, False, "Q4_0"),
        (2, True, "Q4_0"),
        (2, False, "Q4_0"),
        (8, True, "Q8_0"),
    ],
)
def test_the_type_is_the_smallest_that_is_exact(bits: int, sym: bool, expected: str) -> None:
    assert choose_type("layer", random_weight(bits, 32, sym=sym)).name == expected


def test_symmetric_integers_are_stored_as_they_are() -> None:
    weight = random_weight(4, 32)
    again = unpack_blocks("layer", pack_blocks("layer", weight, BLOCK_TYPES["Q4_0"]), BLOCK_TYPES["Q4_0"], 128)
    assert torch.equal(again.qweight, weight.qweight)
    assert torch.equal(again.scales, weight.scales)
    assert torch.equal(again.zeros, weight.zeros)


def test_asymmetric_four_bits_take_q4_1_only_where_its_minimum_is_exact() -> None:
    weight = random_weight(4, 32, sym=False)
    assert choose_type("layer", weight).name == "Q5_0"
    powers = QuantizedWeight.from_codes(
        weight.codes(), torch.full_like(weight.scales, 2.0**-7), weight.zeros, bits=4, group_size=32
    )
    kind = choose_type("layer", powers)
    assert kind.name == "Q4_1"
    again = unpack_blocks("layer", pack_blocks("layer", powers, kind), kind, 128)
    assert torch.equal(again.zeros, powers.zeros)
    assert torch.equal(again.qweight, powers.qweight)


def test_act_order_with_groups_side_by_side_is_exact() -> None:
    g_idx = torch.tensor([2, 0, 1, 3]).repeat_interleave(32).to(torch.int32)
    weight = random_weight(4, 32, g_idx=g_idx)
    kind = choose_type("layer", weight)
    assert torch.equal(dequantize_blocks(pack_blocks("layer", weight, kind), kind), weight.dequantize(torch.float32))


def test_what_no_block_holds_is_refused_with_the_reason() -> None:
    scattered = torch.arange(128, dtype=torch.int32) % 4
    with pytest.raises(TersorError, match=r"layer has its groups scattered .* --static-groups"):
        choose_type("layer", random_weight(4, 32, g_idx=scattered))
    with pytest.raises(TersorError, match=r"layer has groups of 16; .* --group-size 32"):
        choose_type("layer", random_weight(4, 16))
    with pytest.raises(TersorError, match=r"layer \(8 bits, asymmetric\).* --sym"):
        choose_type("layer", random_weight(8, 32, sym=False))
    narrow = QuantizedWeight.from_codes(
        torch.zeros(2, 48, dtype=torch.uint8), torch.ones(1, 2), torch.full((1, 2), 8), bits=4, group_size=-1
    )
    with pytest.raises(TersorError, match="layer has 48 inputs"):
        choose_type("layer", narrow)


@pytest.mark.parametrize("step", [1e-9, 1e5, 0.0123456789])
def test_a_step_that_float16_cannot_hold_is_refused(step: float) -> None:
    weight = random_weight(4, 32)
    scales = weight.scales.float()
    scales[2, 3] = step
    with pytest.raises(TersorError, match=r"layer: the step .* of group 2, output 3 is no float16 number"):
        choose_type("layer", QuantizedWeight.from_codes(weight.codes(), scales, weight.zeros, bits=4, group_size=32))


def test_bfloat16_steps_within_the_range_of_float16_are_kept() -> None:
    weight = random_weight(4, 32)
    coarse = QuantizedWeight.from_codes(weight.codes(), weight.scales.bfloat16(), weight.zeros, bits=4, group_size=32)
    kind = choose_type("layer", coarse)
    assert torch.equal(dequantize_blocks(pack_blocks("layer", coarse, kind), kind), coarse.dequantize(torch.float32))


@each_type
def test_rows_of_a_wrong_length_are_refused(kind) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TersorError, match=f"64 inputs in {kind.name} need {2 * kind.bytes}"):
        unpack_blocks("layer", torch.zeros(3, kind.bytes, dtype=torch.uint8), kind, 64)
