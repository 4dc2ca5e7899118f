"""RepQuant: its grids, its change of variables, what it adds to RepQ-ViT, what it stores, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tersor
from tersor.calibrate.batches import call
from tersor.errors import TersorError
from tersor.formats.activation_grid import QUANTILES, LogGrid, fit_logarithmic, fit_uniform, tail_quantiles
from tersor.layers.quantized_map import QuantizedMap
from tersor.layers.quantized_products import QuantizedProducts
from tersor.methods.activations.calibrated import reconstructed_codes
from tersor.methods.activations.dual_clipping import clipped_grid, learn_clipping, output_error
from tersor.methods.activations.repquant import RepQuant, fit_weights_again, reparameterize, wrap

PUBLISHED = {"dual_clipping": False, "reconstruct": False}
EXTENDED = {"dual_clipping": True, "reconstruct": True}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
seeds, widths = st.integers(0, 1000), st.integers(2, 8)


def small_vit(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = tersor.models.create("vit", **{**SMALL, **config}).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # channels of unlike ranges: what the method is for
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias, 0, 0.5)
    return model


def small_swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
        num_labels=5,
        initializer_range=0.2,
    )
    return SwinForImageClassification(config).eval()


def transformers_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
        initializer_range=0.2,
    )
    return ViTForImageClassification(config).eval()


def images(count: int = 4) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [{"image": torch.randn(1, 3, 32, 32, generator=random)} for _ in range(count)]


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(pixels)
    return getattr(output, "logits", output)


def data_of(seed: int, *shape: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random) * torch.rand(shape[-1], generator=random) * 4


@given(seed=seeds, bits=widths, offset=st.sampled_from([-50.0, 0.0, 50.0]))
def test_rounding_moves_nothing_inside_the_range_by_more_than_half_a_step(seed: int, bits: int, offset: float) -> None:
    x = data_of(seed, 40, 6).double() + offset
    grid = fit_uniform(x, bits, channel=1)
    low, high = -grid.zero * grid.scale, (2**bits - 1 - grid.zero) * grid.scale
    inside = (x >= low) & (x <= high)
    # zero is rounded, so the far level may lie half a step short of the range it was made for
    assert bool(((grid.round(x) - x).abs() <= grid.scale * (0.5 + 1e-6))[inside].all())
    assert torch.allclose(grid.round(grid.round(x)), grid.round(x), atol=1e-9)
    assert bool((grid.quantize(x) <= 2**bits - 1).all())


@given(seed=seeds, bits=widths)
def test_channels_do_not_see_each_other(seed: int, bits: int) -> None:
    x = data_of(seed, 30, 5)
    together = fit_uniform(x, bits, channel=1)
    for n in range(5):
        alone = fit_uniform(x[:, n], bits)
        assert torch.equal(together.scale[0, n], alone.scale)
        assert torch.equal(together.zero[0, n], alone.zero)


@given(seed=seeds, elements=st.integers(2, 3000))
def test_quantiles_are_those_of_torch(seed: int, elements: int) -> None:
    rows = data_of(seed, 3, elements)
    for n, p in enumerate(QUANTILES):
        for m, q in enumerate((1 - p, p)):
            assert torch.allclose(tail_quantiles(rows)[:, n, m], rows.quantile(q, dim=1), rtol=1e-6, atol=1e-7)


@given(value=st.floats(-100, 100, width=32), bits=widths)
def test_constant_channels_keep_their_value(value: float, bits: int) -> None:
    x = torch.stack([torch.full((9,), value), torch.linspace(-1, 1, 9), torch.zeros(9)], 1)
    grid = fit_uniform(x, bits, channel=1)
    assert bool(torch.isfinite(grid.scale).all())
    assert bool((grid.scale > 0).all())
    assert torch.allclose(grid.round(x)[:, [0, 2]], x[:, [0, 2]], rtol=1e-5, atol=1e-30)
    alone = fit_uniform(x[:, 0], bits)
    assert torch.allclose(alone.round(x[:, 0]), x[:, 0], rtol=1e-5, atol=1e-30)


@given(seed=seeds, bits=widths)
def test_logarithmic_levels_are_powers_of_the_root_of_two(seed: int, bits: int) -> None:
    x = (data_of(seed, 20, 8) * 2).softmax(-1)
    x[0, 0] = 0
    grid = fit_logarithmic(x, bits)
    rounded = grid.round(x)
    levels = torch.cat([grid.scale * 2 ** (-torch.arange(2**bits) / 2), torch.zeros(1)])
    assert float((rounded[..., None] - levels).abs().amin(-1).max()) <= 1e-6 * float(grid.scale)
    assert rounded[0, 0] == 0
    assert float(LogGrid(grid.scale, bits).round(grid.scale * 9)) == pytest.approx(float(grid.scale))


@pytest.mark.parametrize("build", [small_vit, transformers_vit, small_swin])
def test_the_change_of_variables_leaves_the_function_as_it_was(build: Callable[[], nn.Module]) -> None:
    model = build().double()
    name = "image" if hasattr(model, "blocks") else "pixel_values"
    batch = {name: torch.cat([each["image"] for each in images()]).double()}
    before = logits(model, batch[name])
    places = wrap(model, RepQuant(), batch, lambda name: True)
    with torch.no_grad():
        call(model, batch)
    norms = {pair.norm: model.get_submodule(pair.norm).weight.clone() for pair in places.pairs}
    with torch.no_grad():
        reparameterize(model, places)
    assert all(not torch.allclose(model.get_submodule(n).weight, weight) for n, weight in norms.items())
    assert not torch.allclose(logits(model, batch[name]), before, rtol=1e-6)
    for each in places.everything():
        each.enabled = False
    assert torch.allclose(logits(model, batch[name]), before, rtol=1e-9, atol=1e-11)


def test_pairs_are_found_without_names_and_padding_breaks_them() -> None:
    places = wrap(small_swin(), RepQuant(), {"pixel_values": images()[0]["image"]}, lambda name: True)
    found = {pair.norm: len(pair.linears) for pair in places.pairs}
    assert sum(count == 3 for count in found.values()) == 4  # query, key, value of each block
    assert (
        sum(count == 1 for count in found.values()) == 5
    )  # the first layer of each block's MLP, and the patch merging
    assert "swin.layernorm" not in found

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(nn.functional.pad(self.norm(x), (0, 0, 0, 1)))[:, :-1].roll(1, 1) + x

    with pytest.raises(TersorError, match="needs a LayerNorm whose output goes to linear layers alone"):
        tersor.compress(nn.Sequential(Padded(), Padded()), RepQuant(), calibration=[torch.randn(1, 5, 8)])


def test_a_norm_that_a_residual_reads_is_in_no_pair() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return x + self.linear(x)

    with pytest.raises(TersorError, match="finds none in the blocks of Sequential"):
        tersor.compress(nn.Sequential(Residual(), Residual()), RepQuant(), calibration=[torch.randn(1, 5, 8)])


@given(seed=seeds, bits=widths)
def test_factors_of_one_clip_nothing(seed: int, bits: int) -> None:
    x = data_of(seed, 50, 6)
    low, high = x.aminmax(dim=0)
    grid = clipped_grid(low, high, torch.ones(6), torch.ones(6), bits)
    assert torch.allclose(grid.scale, (high - low) / (2**bits - 1))
    assert torch.allclose(grid.zero, torch.round(-low / grid.scale))


@given(seed=seeds, bits=st.integers(2, 6))
def test_learned_clipping_never_adds_to_the_layers_error(seed: int, bits: int) -> None:
    x, weight = data_of(seed, 60, 8), data_of(seed + 1, 5, 8)
    x[0] *= 10  # outliers
    start = fit_uniform(x, bits, channel=1)
    start = type(start)(start.scale[0], start.zero[0], bits)
    learned, gram = learn_clipping(x, weight, start), weight.t() @ weight
    assert float(output_error(learned.round(x) - x, gram)) <= float(output_error(start.round(x) - x, gram))


def test_learned_clipping_lowers_the_error_of_outliers() -> None:
    x, weight = data_of(3, 400, 16), data_of(4, 24, 16)
    x[::50] *= 5
    start = fit_uniform(x, 4, channel=1)
    start = type(start)(start.scale[0], start.zero[0], 4)
    gram = weight.t() @ weight
    before = output_error(start.round(x) - x, gram)
    assert float(output_error(learn_clipping(x, weight, start).round(x) - x, gram)) < 0.95 * float(before)


@given(seed=seeds, bits=widths)
def test_reconstruction_is_never_worse_than_rounding(seed: int, bits: int) -> None:
    W, X = data_of(seed, 6, 12), data_of(seed + 1, 40, 12) @ data_of(seed + 2, 12, 12)
    X[:, 3] = 0
    H, grid = X.t() @ X, fit_uniform(W, bits, channel=0)
    codes = reconstructed_codes(W, H, grid).to(W.dtype)
    assert bool((codes <= 2**bits - 1).all())

    def errors(codes: Tensor) -> Tensor:
        return ((grid.dequantize(codes) - W) @ X.t()).square().sum(1)

    assert bool((errors(codes) <= errors(grid.quantize(W)) * (1 + 1e-4) + 1e-9).all())
    if bits < 5:
        assert float(errors(codes).sum()) < float(errors(grid.quantize(W)).sum())


@pytest.mark.parametrize("options", [PUBLISHED, EXTENDED])
@pytest.mark.parametrize("build", [small_vit, small_swin, transformers_vit])
def test_saved_and_loaded_the_outputs_are_equal_and_the_file_is_small(
    build: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    model = build()
    result = tersor.compress(model, RepQuant(w_bits=4, a_bits=6, **options), calibration=images())
    pixels = torch.cat([each["image"] for each in images(3)])
    loaded = tersor.load(result.save(tmp_path / "model"), device="cpu")
    assert torch.equal(logits(loaded, pixels), logits(result.model, pixels))
    assert not torch.equal(logits(loaded, pixels), logits(model, pixels))
    assert result.summary.parameters_after >= result.summary.parameters_before
    stored = load_file(tmp_path / "model" / "model.safetensors")
    packed = [each for each in loaded.modules() if isinstance(each, QuantizedMap)]
    assert {4 * each.qweight.numel() for each in packed} <= {
        4 * tensor.numel() for name, tensor in stored.items() if name.endswith(".qweight")
    }
    assert sum(t.numel() * t.element_size() for t in stored.values()) < sum(4 * p.numel() for p in model.parameters())


@pytest.mark.parametrize("build", [small_vit, transformers_vit])
def test_a_tensor_of_an_exchanged_module_that_is_gone_is_missed(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    result = tersor.compress(build(), RepQuant(w_bits=4, a_bits=6), calibration=images())
    file = result.save(tmp_path / "model") / "model.safetensors"
    stored = load_file(file)
    gone = next(name for name in stored if name.endswith(".qweight"))
    save_file({name: tensor for name, tensor in stored.items() if name != gone}, file, {"format": "pt"})
    with pytest.raises(TersorError, match=f"lacks the tensor {gone}"):
        tersor.load(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("build", [small_vit, small_swin, transformers_vit])
def test_every_product_of_the_attention_is_quantized(build: Callable[[], nn.Module]) -> None:
    model = build()
    result = tersor.compress(model, RepQuant(w_bits=8, a_bits=8, **EXTENDED), calibration=images())
    products = [each for each in result.model.modules() if isinstance(each, QuantizedProducts)]
    kinds = [kind for each in products for pair in each.kinds for kind in pair]
    blocks = 2 if build is not small_swin else 4
    assert kinds == blocks * ["uniform", "uniform", "logarithmic", "uniform"]
    pixels = torch.cat([each["image"] for each in images(3)])
    wanted, got = logits(model, pixels), logits(result.model, pixels)
    assert float((wanted - got).norm() / wanted.norm()) < 0.2
    assert max(row.error for row in result.summary.layers) < 0.05
    assert not [row for row in result.summary.layers if row.note]


def test_excluded_layers_stay_and_the_image_has_eight_bits() -> None:
    model = small_vit()
    result = tersor.compress(
        model, RepQuant(), calibration=images(), exclude=["head", "blocks.0.mlp.fc1", "blocks.1.attn.*"]
    )
    assert torch.equal(result.model.head.weight, model.head.weight)
    assert torch.equal(result.model.blocks[0].norm2.weight, model.blocks[0].norm2.weight)
    assert isinstance(result.model.blocks[0].mlp.fc2, QuantizedMap)
    assert not [each for each in result.model.blocks[1].attn.modules() if isinstance(each, QuantizedProducts)]
    rows = {row.name: row.bits for row in result.summary.layers}
    assert rows["patch_embed.proj"] == "W4A8"
    assert rows["blocks.0.attn.qkv"] == "W4A4"
    assert rows["blocks.0.attn.av"] == "A4"


def test_weights_are_chosen_anew_only_where_that_is_asked_for() -> None:
    batch = {"image": torch.cat([each["image"] for each in images()])}
    model = small_vit()
    places = wrap(model, RepQuant(**PUBLISHED), batch, lambda name: True)
    with torch.no_grad():
        call(model, batch)
        reparameterize(model, places)
    fit_weights_again(places, reconstruct=False)
    reset = {name for name, each in places.maps.items() if each.codes is None}
    assert reset == {f"blocks.{n}.{each}" for n in (0, 1) for each in ("attn.qkv", "mlp.fc1")}
    assert all(len(grids) == 2 for each in places.products.values() for grids in each.grids)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"w_bits": 1}, "w_bits=1 is not allowed: 2 to 8"),
        ({"a_bits": 9}, "a_bits=9 is not allowed: 2 to 8"),
        ({"num_images": 0}, "num_images=0 is not allowed: 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], line: str) -> None:
    with pytest.raises(TersorError, match=line):
        RepQuant(**options)


def test_no_images_and_images_of_many_sizes_are_refused() -> None:
    with pytest.raises(TersorError, match="the calibration is empty"):
        tersor.compress(small_vit(), RepQuant(), calibration=[])
    with pytest.raises(TersorError, match="'image' differ in shape"):
        tersor.compress(small_vit(), RepQuant(), calibration=[*images(1), {"image": torch.randn(1, 3, 40, 40)}])


def test_command_line_on_the_demo(tersor_command: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    packed, out = data / "images" / "cifar10_train_512.npz", tmp_path / "small"
    ran = tersor_command(
        *("compress", "demo-vit", "--method", "repquant", "--calibration", packed, "--num-images", 4, "--out", out),
        "--json",
    )
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["size_after"] < json.loads(ran.out)["size_before"] / 3  # of float16
    refused = tersor_command("compress", "demo-vit", "--method", "repquant", "--w-bits", 9, "--out", tmp_path / "no")
    assert refused.status == 2
    assert "w_bits=9 is not allowed: 2 to 8" in refused.err
    ran = tersor_command(
        "eval", out, "--images", data / "images" / "cifar10_test_1000.npz", "--max-images", 40, "--json"
    )
    assert ran.status == 0, ran.err
