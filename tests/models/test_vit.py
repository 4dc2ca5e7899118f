"""ViT and DeiT beyond what the golden cases show: key layout, the distilled variant, refusals, the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tersor
from tersor.errors import TersorError
from tersor.evaluate.accuracy import read_images

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def test_the_keys_are_timms() -> None:
    layers = ["patch_embed.proj", *(f"blocks.{n}.{layer}" for n in (0, 1) for layer in BLOCK), "norm", "head"]
    wanted = {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")} | {"cls_token", "pos_embed"}
    assert set(tersor.models.create("vit", **SMALL).state_dict()) == wanted


def test_a_checkpoint_of_timms_layout_loads_and_a_foreign_key_is_named() -> None:
    model = tersor.models.create("vit", **SMALL).eval()
    state = {key: torch.randn_like(value) * 0.1 for key, value in model.state_dict().items()}
    loaded = tersor.models.load("vit", {"model": state}["model"], **SMALL)
    model.load_state_dict(state)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(image), model(image))
    with pytest.raises(TersorError, match=r"1 left over \(fc_norm.weight\)"):
        tersor.models.load("vit", {**state, "fc_norm.weight": torch.ones(48)}, **SMALL)


def test_the_distilled_variant_has_two_heads_and_gives_their_mean() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("vit", **SMALL, distilled=True)
    state = model.state_dict()
    assert state["dist_token"].shape == (1, 1, 48)
    assert state["head_dist.weight"].shape == (10, 48)
    assert state["pos_embed"].shape == (1, 18, 48)
    torch.nn.init.normal_(model.dist_token)
    image = torch.randn(2, 3, 32, 32)
    first, second = model.train()(image)
    assert not torch.allclose(first, second)
    assert torch.allclose(model.eval()(image), (first + second) / 2, atol=1e-6)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_base_distilled_patch16_224"])
def test_published_sizes(name: str) -> None:
    (info,) = tersor.models.list(name)
    with torch.device("meta"):
        model = tersor.models.create(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == info.parameters


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"img_size": 30}, "patches of 8 do not divide an image of 30 pixels"),
        ({"num_heads": 5}, "5 heads do not divide 48 channels"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: dict[str, Any], line: str) -> None:
    with pytest.raises(TersorError, match=line):
        tersor.models.create("vit", **{**SMALL, **config})


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(TersorError, match="takes images of 32 x 32 pixels, not 32 x 40"):
        tersor.models.create("vit", **SMALL)(torch.randn(1, 3, 32, 40))


def test_demo_vit_is_built_in_and_right_about_most_images(data: Path) -> None:
    pixels, labels = read_images("demo-vit", data / "images" / "cifar10_test_1000.npz", limit=60)
    assert tersor.accuracy(tersor.load("demo-vit", device="cpu"), (pixels, labels)).top1 > 75


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_accuracy_of_a_model_and_of_images_and_classes_on_a_gpu() -> None:
    model, pixels = tersor.models.create("vit", **SMALL).eval().cuda(), torch.randn(6, 3, 32, 32, device="cuda")
    with torch.no_grad():
        assert tersor.accuracy(model, (pixels, model(pixels).argmax(-1))).top1 == 100
