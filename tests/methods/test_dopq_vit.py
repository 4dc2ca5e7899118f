"""DopQ-ViT: the properties of its two quantizers, what it is with RepQ-ViT's choices, reconstruction, files, and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.harness import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tersor
from tersor.calibrate.batches import call
from tersor.errors import TersorError
from tersor.formats.activation_grid import fit_logarithmic
from tersor.formats.tangent_grid import FOCUSES, LARGEST_K, fit_tangent, tangent_grid
from tersor.layers.quantized_products import QuantizedProducts
from tersor.methods.activations.block_reconstruction import reconstruct_blocks
from tersor.methods.activations.dopq_vit import DopQViT, fit_tangent_pair
from tersor.methods.activations.repquant import RepQuant, fit_weights_again, reparameterize, wrap
from tersor.models.registry import find

GOLDEN = Path(__file__).parents[1] / "golden" / "repquant"
seeds, widths, focuses = st.integers(0, 1000), st.integers(2, 8), st.floats(0.01, LARGEST_K)
largest = st.floats(0.05, 1)


def float64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def vit(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = tersor.models.create("vit", **{**find("vit").small, **config}).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # channels of unlike ranges
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias, 0, 0.5)
    return model


def samples_of(model: nn.Module, count: int = 4) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"image": each[None]} for each in model.example_inputs(count)["image"]]


def batch_of(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"image": torch.cat([each["image"] for each in samples])}


@given(A=largest, bits=widths)
def test_without_focus_it_is_the_uniform_grid(A: float, bits: int) -> None:
    x = torch.linspace(0, 1, 501, dtype=torch.float64)
    step = A / (2**bits - 1)
    grid = tangent_grid(float64(A), 1e-4, bits)
    levels = torch.arange(2**bits, dtype=torch.float64)
    assert torch.allclose(grid.table, levels * step, atol=1e-5)
    assert torch.allclose(grid.thresholds, (levels[:-1] + 0.5) * step, atol=1e-5)
    inside = (x / step - 0.5 - torch.round(x / step - 0.5)).abs() > 1e-3  # not on a threshold
    uniform = torch.round(x / step).clamp(0, 2**bits - 1) * step
    assert torch.allclose(grid.round(x)[inside], uniform[inside], atol=1e-5)


@given(A=largest, k=focuses, bits=widths)
def test_codes_rise_with_the_number_and_every_level_is_its_own(A: float, k: float, bits: int) -> None:
    for dtype in (torch.float64, torch.float32):
        grid = tangent_grid(torch.tensor(A, dtype=dtype), k, bits)
        codes = grid.quantize(torch.linspace(0, 1.2, 999, dtype=dtype))
        assert bool((codes.diff() >= 0).all())
        every = torch.arange(2**bits)
        assert torch.equal(grid.quantize(grid.dequantize(every)), every)
        assert grid.table[0] == 0
        assert float(grid.table[-1]) == pytest.approx(A, rel=1e-5)


@given(A=largest, k=focuses, bits=widths)
def test_a_code_is_that_of_rounding_in_tangents(A: float, k: float, bits: int) -> None:
    x = torch.rand(400, dtype=torch.float64)
    s = math.tan(k * A) / (2**bits - 1)
    value = torch.tan(k * x) / s
    clear = (value - value.floor() - 0.5).abs() > 1e-6
    wanted = torch.round(value).clamp(0, 2**bits - 1).long()
    assert torch.equal(tangent_grid(float64(A), k, bits).quantize(x)[clear], wanted[clear])


@given(A=st.floats(0.5, 1), k=st.floats(0.3, 1.3))
def test_levels_lie_closer_and_closer_towards_the_largest(A: float, k: float) -> None:
    grid = tangent_grid(float64(A), k, 8)
    gaps = grid.table.diff()
    assert bool((gaps.diff() < 0).all())
    s = math.tan(k * A) / 255
    assert float(gaps[-1]) == pytest.approx(s * math.cos(k * A) ** 2 / k, rel=0.02)
    middles = (grid.table[1:] + grid.table[:-1]) / 2
    assert bool(
        (grid.thresholds > middles).all()
    )  # arctan is concave: rounding in tangents is not to the nearest level


@given(seed=seeds, channels=st.integers(3, 40))
def test_the_median_deviates_least_and_outliers_hardly_move_it(seed: int, channels: int) -> None:
    torch.manual_seed(seed)
    s = torch.rand(channels, dtype=torch.float64) + 0.1
    found = torch.median(s)
    assert bool((s == found).any())

    def deviation(x: Tensor) -> Tensor:
        return (s - x).abs().mean()

    assert all(deviation(found) <= deviation(x) + 1e-12 for x in (*s, s.mean()))
    place = int(torch.randint(channels, ()))
    changed = s.clone()
    changed[place] *= 100
    ordered = s.sort().values
    rank = (channels - 1) // 2
    assert ordered[rank] == found
    assert 0 <= float(torch.median(changed) - found) <= float(ordered[rank + 1] - ordered[rank]) + 1e-12
    assert float(changed.mean() - s.mean()) == pytest.approx(99 * float(s[place]) / channels)


@settings(max_examples=5)
@given(seed=seeds)
def test_any_merged_scale_leaves_the_function_as_it_was(seed: int) -> None:
    model = vit().double()
    batch = {name: value.double() for name, value in batch_of(samples_of(model)).items()}
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        before = model(**batch)
        places = wrap(
            model, RepQuant(), batch, lambda name: True, fit_products=lambda a, b: fit_tangent_pair(a, b, bits=4)
        )
        call(model, batch)
        norms = [model.get_submodule(pair.norm).weight.clone() for pair in places.pairs]

        def anything(values: Tensor) -> Tensor:
            return values.mean() * (0.2 + 2 * torch.rand((), generator=random, dtype=torch.float64))

        reparameterize(model, places, centre=anything)
        for pair, weight in zip(places.pairs, norms, strict=True):
            assert not torch.allclose(model.get_submodule(pair.norm).weight, weight)
        for each in places.everything():
            each.enabled = False
        assert float((model(**batch) - before).abs().max()) < 1e-10


@pytest.mark.parametrize(
    "name", ["vit-tiny-w4a4", "vit-tiny-w6a6", pytest.param("deit-tiny-w4a4", marks=pytest.mark.slow)]
)
def test_with_the_mean_and_the_logarithmic_grid_it_is_repq_vit(name: str) -> None:
    case = Case(GOLDEN / f"{name}.json")
    model = tersor.models.load("vit", case.state_dict(), **case.config["model"]).double()
    batch, test = ({"image": case.inputs()[each].double()} for each in ("calib", "test"))
    bits = {"w_bits": case.config["w_bits"], "a_bits": case.config["a_bits"]}
    given = tersor.compress(model, DopQViT(softmax="logarithmic", merge="mean", **bits), calibration=[batch])
    other = tersor.compress(model, DopQViT(**bits), calibration=[batch])
    with torch.no_grad():
        case.check("logits", call(given.model, test), 5e-7)
        assert case.error("logits", call(other.model, test)) > 1e-3


def test_large_weights_are_kept_better_and_small_ones_worse_than_by_the_logarithmic_grid() -> None:
    random = torch.Generator().manual_seed(0)
    u = torch.rand(20000, generator=random)
    small = 1e-4 * (1 - u * (1 - (1e-4 / 0.5) ** 0.5)) ** -2  # density proportional to a^-1.5 from 1e-4 to 0.5
    large = 0.5 + 0.5 * torch.rand(400, generator=random)
    a = torch.cat([small, large])
    tangent, logarithmic = fit_tangent(a, 4).round(a), fit_logarithmic(a, 4).round(a)

    def error(found: Tensor, of: Tensor) -> float:
        return float((found - a)[of].square().mean())

    assert float(small.max()) <= 0.5
    assert error(tangent, a >= 0.5) < error(logarithmic, a >= 0.5)
    assert error(logarithmic, a < 0.1) < error(tangent, a < 0.1)


def test_the_focus_is_the_one_by_which_the_product_changes_least() -> None:
    torch.manual_seed(0)
    a, v = (torch.randn(2, 2, 20, 20) * 3).softmax(-1), torch.randn(2, 2, 20, 8)
    grid, _ = fit_tangent_pair(a, v, bits=3)
    least = float(((grid.round(a) - a) @ v).square().mean())
    for k in FOCUSES:
        other = tangent_grid(a.amax(), k, 3)
        assert least <= float(((other.round(a) - a) @ v).square().mean()) * (1 + 1e-6)
    large, small = (fit_tangent(a, 3, lambda x, m=m: (x - a)[m].square().mean()) for m in (a > 0.5, a < 0.5))
    assert float(large.table[1]) > float(small.table[1])  # what the error is decides


def test_reconstruction_never_adds_to_the_error_of_a_block_and_lowers_it_at_few_bits() -> None:
    model = vit()
    batch = batch_of(samples_of(model, 4))
    places = wrap(model, RepQuant(w_bits=2, a_bits=6), batch, lambda name: True)
    with torch.no_grad():
        call(model, batch)
        reparameterize(model, places, centre=torch.median)
        fit_weights_again(places, reconstruct=False)
        call(model, batch)
    codes = {name: each.codes.clone() for name, each in places.maps.items()}
    found = reconstruct_blocks(model, places.everything(), batch, steps=15)
    assert [each.name for each in found] == [f"blocks.{n}" for n in range(len(model.blocks))]
    assert all(each.after <= each.before for each in found)
    assert sum(each.after for each in found) < 0.9 * sum(each.before for each in found)
    changed = {name for name, each in places.maps.items() if not torch.equal(each.codes, codes[name])}
    assert changed
    assert all(name.startswith("blocks.") for name in changed)
    assert all(parameter.grad is None for parameter in model.parameters())
    kept = reconstruct_blocks(model, places.everything(), batch, steps=1)
    assert all(each.after <= each.before for each in kept)


@pytest.mark.parametrize(
    "options", [{}, {"tune_blocks": True, "block_steps": 5}, {"softmax": "logarithmic"}, {"merge": "mean"}]
)
def test_saved_and_loaded_the_outputs_are_equal(options: dict[str, Any], tmp_path: Path) -> None:
    model = vit()
    samples = samples_of(model)
    result = tersor.compress(model, DopQViT(w_bits=3, a_bits=4, **options), calibration=samples)
    loaded = tersor.load(result.save(tmp_path / "model"), device="cpu")
    batch = batch_of(samples)
    with torch.no_grad():
        assert torch.equal(loaded(**batch), result.model(**batch))
        assert not torch.equal(loaded(**batch), model(**batch))
    products = [each for each in loaded.modules() if isinstance(each, QuantizedProducts)]
    wanted = options.get("softmax", "tangent")
    assert [pair for each in products for pair in each.kinds] == [["uniform", "uniform"], [wanted, "uniform"]] * len(
        model.blocks
    )
    notes = [row.note for row in result.summary.layers if row.note]
    assert len(notes) == (len(model.blocks) if options.get("tune_blocks") else 0)
    if wanted == "tangent":
        assert products[1].tables.shape == (1, 16)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"a_bits": 9}, "a_bits=9 is not allowed: 2 to 8"),
        ({"softmax": "log2"}, "softmax='log2' is not allowed: one of tangent, logarithmic"),
        ({"merge": "mode"}, "merge='mode' is not allowed: one of median, mean"),
        ({"block_steps": 0}, "block_steps=0 is not allowed: 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(TersorError, match=line):
        DopQViT(**options)


def test_a_model_without_a_norm_before_linear_layers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    with pytest.raises(TersorError, match="dopq-vit needs a LayerNorm whose output goes to linear layers alone"):
        tersor.compress(model, DopQViT(), calibration=[torch.randn(2, 8)])


def test_the_command_line_has_its_options(tersor_command: Callable[..., Any], tmp_path: Path) -> None:
    refused = tersor_command(
        "compress", "demo-vit", "--method", "dopq-vit", "--merge", "mode", "--out", tmp_path / "no"
    )
    assert refused.status == 2
    assert "merge='mode' is not allowed: one of median, mean" in refused.err
    assert not (tmp_path / "no").exists()
