"""Every layout on disk gives back the weight that was written, and says which tensor does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.layout import QuantizationConfig
from tersor.formats.layouts import BITS, LAYOUTS, layout_named, write
from tersor.formats.quantized_weight import QuantizedWeight

IN, OUT = 96, 64


@st.composite
def weights(draw: st.DrawFn, in_features: int = IN, out_features: int = OUT) -> tuple[QuantizedWeight, bool]:
    """A weight of random integers, and whether its zero points are symmetric."""
    bits, sym = draw(st.sampled_from(BITS)), draw(st.booleans())
    group_size = draw(st.sampled_from([-1, 32, 48, in_features]))
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    zeros = torch.randint(1, 2**bits, (groups, out_features), generator=generator)
    g_idx = torch.randperm(in_features, generator=generator) // group_size if draw(st.booleans()) else None
    weight = QuantizedWeight.from_codes(
        torch.randint(0, 2**bits, (out_features, in_features), generator=generator),
        torch.rand(groups, out_features, generator=generator).add(0.01).half(),
        torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros,
        bits=bits,
        group_size=group_size,
        g_idx=None if group_size == -1 else g_idx,
    )
    return weight, sym


def read(layout: str, tensors: dict[str, Tensor], weight: QuantizedWeight, *, sym: bool) -> QuantizedWeight:
    config = QuantizationConfig(layout, weight.bits, weight.group_size, sym)
    found = layout_named(layout).read("layer", tensors, weight.in_features, config)
    assert isinstance(found, QuantizedWeight)
    return found


def assert_same(got: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert torch.equal(got.qweight, expected.qweight)
    assert torch.equal(got.zeros, expected.zeros)
    assert torch.equal(got.scales, expected.scales)
    assert torch.equal(got.groups(), expected.groups())
    assert (got.bits, got.in_features, got.out_features) == (expected.bits, expected.in_features, expected.out_features)


@given(weights(), st.sampled_from(sorted(LAYOUTS)))
def test_what_is_written_is_read(drawn: tuple[QuantizedWeight, bool], layout: str) -> None:
    weight, sym = drawn
    assert_same(read(layout, write(weight, layout_named(layout), sym=sym), weight, sym=sym), weight)


@given(weights(in_features=50, out_features=37))
def test_compressed_tensors_pads_shapes_that_fill_no_words(drawn: tuple[QuantizedWeight, bool]) -> None:
    weight, sym = drawn
    written = write(weight, layout_named("compressed-tensors"), sym=sym)
    assert_same(read("compressed-tensors", written, weight, sym=sym), weight)


@given(weights(), st.sampled_from(["gptq", "gptq_v2"]))
def test_symmetric_zero_points_tell_v1_from_v2_whatever_the_config_claims(
    drawn: tuple[QuantizedWeight, bool], written_as: str
) -> None:
    weight, sym = drawn
    if not sym:
        return
    claimed = "gptq_v2" if written_as == "gptq" else "gptq"
    assert_same(read(claimed, write(weight, layout_named(written_as), sym=True), weight, sym=True), weight)


@given(weights(), st.sampled_from(sorted(LAYOUTS)), st.sampled_from([-1, 16, 128]))
def test_tensors_win_over_a_wrong_group_size(drawn: tuple[QuantizedWeight, bool], layout: str, claimed: int) -> None:
    weight, sym = drawn
    tensors = write(weight, layout_named(layout), sym=sym)
    if weight.g_idx is None and IN % weight.scales.shape[0]:
        return  # a shorter last group cannot be told from the tensors' shapes
    wrong = QuantizedWeight(**{**weight.__dict__, "group_size": claimed, "g_idx": None})
    if layout == "compressed-tensors" and weight.g_idx is None and claimed == 128 and weight.scales.shape[0] == 1:
        claimed = -1
    assert_same(read(layout, tensors, wrong, sym=sym), weight)


def example(sym: bool = False, g_idx: bool = True) -> QuantizedWeight:
    torch.manual_seed(0)
    return QuantizedWeight.from_codes(
        torch.randint(0, 16, (OUT, IN)),
        torch.rand(3, OUT).add(0.01).half(),
        torch.full((3, OUT), 8) if sym else torch.randint(1, 16, (3, OUT)),
        bits=4,
        group_size=32,
        g_idx=torch.randperm(IN) // 32 if g_idx else None,
    )


def with_value(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[1] = value
    return changed


GPTQ_DAMAGES = {
    "qweight of one row too few": ("qweight", lambda t: t[:-1]),
    "qweight with one dimension": ("qweight", lambda t: t[0]),
    "qweight of another width": ("qweight", lambda t: t[:, :-8]),
    "missing qweight": ("qweight", None),
    "missing qzeros": ("qzeros", None),
    "qzeros of another width": ("qzeros", lambda t: t[:, :-1]),
    "qzeros of fewer groups": ("qzeros", lambda t: t[:-1]),
    "missing scales": ("scales", None),
    "scales with one dimension": ("scales", lambda t: t[0]),
    "no groups": ("scales", lambda t: t[:0]),
    "scales that are zero": ("scales", lambda t: with_value(t, 0)),
    "scales that are not finite": ("scales", lambda t: with_value(t, float("nan"))),
    "scales that are infinite": ("scales", lambda t: with_value(t, float("inf"))),
    "g_idx beyond the last group": ("g_idx", lambda t: with_value(t, 3)),
    "g_idx below the first group": ("g_idx", lambda t: with_value(t, -1)),
    "g_idx of another length": ("g_idx", lambda t: t[:-1]),
}
COMPRESSED_DAMAGES = {
    "weight_packed of one word too few": ("weight_packed", lambda t: t[:, :-1]),
    "weight_packed with one dimension": ("weight_packed", lambda t: t[0]),
    "missing weight_packed": ("weight_packed", None),
    "missing weight_scale": ("weight_scale", None),
    "weight_scale of another height": ("weight_scale", lambda t: t[:-1]),
    "no groups": ("weight_scale", lambda t: t[:, :0]),
    "weight_scale that is zero": ("weight_scale", lambda t: with_value(t, 0)),
    "weight_scale that is not finite": ("weight_scale", lambda t: with_value(t, float("nan"))),
    "weight_shape of another layer": ("weight_shape", lambda t: t.flip(0)),
    "weight_shape of three numbers": ("weight_shape", lambda t: torch.cat([t, t[:1]])),
    "weight_zero_point of another shape": ("weight_zero_point", lambda t: t[:-1]),
    "weight_g_idx beyond the last group": ("weight_g_idx", lambda t: with_value(t, 3)),
    "weight_g_idx of another length": ("weight_g_idx", lambda t: t[:-1]),
}


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("damage", GPTQ_DAMAGES)
def test_a_malformed_gptq_layer_is_named(layout: str, damage: str) -> None:
    _check_named(layout, *GPTQ_DAMAGES[damage])


@pytest.mark.parametrize("damage", COMPRESSED_DAMAGES)
def test_a_malformed_compressed_tensors_layer_is_named(damage: str) -> None:
    _check_named("compressed-tensors", *COMPRESSED_DAMAGES[damage])


def _check_named(layout: str, suffix: str, change) -> None:  # type: ignore[no-untyped-def]
    weight = example()
    tensors = write(weight, layout_named(layout), sym=False)
    changed = {name: tensor for name, tensor in tensors.items() if name != suffix}
    if change is not None:
        changed[suffix] = change(tensors[suffix])
    with pytest.raises(TersorError, match=r"layer\.(weight_)?(q|s|g|p|z)"):
        read(layout, changed, weight, sym=False)


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(TersorError, match="unknown format 'gguf'; known: gptq, gptq_v2, compressed-tensors"):
        layout_named("gguf")


@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
def test_negative_steps_are_read_as_other_writers_mean_them(layout: str) -> None:
    weight = example(sym=True, g_idx=False)
    weight = QuantizedWeight(**{**weight.__dict__, "scales": with_value(weight.scales, -0.5)})
    found = read(layout, write(weight, layout_named(layout), sym=True), weight, sym=True)
    assert_same(found, weight)
    assert torch.equal(found.dequantize(torch.float32), weight.dequantize(torch.float32))
