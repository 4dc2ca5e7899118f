"""RGT beyond its golden cases: recursions, stored buffers, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tersor.models
from tersor.errors import TersorError
from tersor.models.vision.rgt import recursions

SMALL = tersor.models.list("rgt_s_x4")[0].small


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("rgt", **{**SMALL, **overrides}).eval()


@pytest.mark.parametrize(
    ("size", "trained", "evaluated"), [((16, 16), 1, 2), ((64, 64), 2, 2), ((48, 1024), 4, 3), ((300, 256), 3, 2)]
)
def test_the_number_of_recursions_depends_on_size_and_mode(size: tuple[int, int], trained: int, evaluated: int) -> None:
    assert (recursions(*size, training=True), recursions(*size, training=False)) == (trained, evaluated)


def test_a_far_pixel_is_felt_through_the_representative_tokens() -> None:
    model, image = small(depth=(2,), num_heads=(2,)), torch.rand(1, 3, 64, 64)
    changed = image.clone()
    changed[:, :, 2, 2] = 0
    with torch.no_grad():
        difference = (model.features(image)[0] - model.features(changed)[0]).abs()
    assert difference[..., 56:, 56:].max() > 0


def test_takes_a_training_checkpoint_with_its_derived_buffers(tmp_path: Path) -> None:
    model = small(upscale=3)
    state = {**model.state_dict(), "layers.0.blocks.2.attn.attn_mask_0": torch.zeros(2, 32, 32)}
    state["layers.0.blocks.0.attn.attns.0.rpe_biases"] = torch.zeros(105, 2)
    state["layers.0.blocks.0.attn.attns.0.relative_position_index"] = torch.zeros(32, 32)
    torch.save({"params": state}, tmp_path / "RGT_x3.pth")
    again = tersor.models.load("rgt", tmp_path / "RGT_x3.pth", **SMALL, upscale=3)
    image = torch.rand(1, 3, 17, 30)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
        assert again(image).shape == (1, 3, 51, 90)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"upscale": 5}, "not 5"),
        ({"num_heads": (2, 3)}, "num_heads 3"),
        ({"resi_connection": "2conv"}, "2conv"),
        ({"depth": (2,)}, "depth has 1"),
        ({"split_size": (4, 6)}, r"not \(4, 6\)"),
    ],
)
def test_refuses_what_cannot_work(overrides: dict[str, Any], told: str) -> None:
    with pytest.raises(TersorError, match=told):
        small(**overrides)


def test_refuses_pictures_that_reduce_to_nothing() -> None:
    with pytest.raises(TersorError, match="at least 16 x 16 pixels, not 15 x 40"):
        small()(torch.rand(1, 3, 15, 40))
    with pytest.raises(TersorError, match="by 64, so its shorter side"):
        small()(torch.rand(1, 3, 16, 1024))
