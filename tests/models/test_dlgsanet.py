"""DLGSANet beyond its golden cases: predicted kernels, windows, the other block types, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tersor.models
from tersor.errors import TersorError
from tersor.models.vision.dlgsanet import dynamic_depthwise, window_starts

SMALL = tersor.models.list("dlgsanet_tiny_x4")[0].small


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("dlgsanet", **{**SMALL, **overrides}).eval()


def test_the_predicted_kernels_are_applied_as_on_unfolded_neighbourhoods() -> None:
    torch.manual_seed(0)
    u, weights = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 3, 3, 5, 4)
    neighbourhoods = F.unfold(u, 3, padding=1).reshape(2, 3, 2, 9, 5, 4)  # (B, g, C/g, k k, H, W)
    expected = (neighbourhoods * weights.flatten(2, 3)[:, :, None]).sum(3).reshape(u.shape)
    torch.testing.assert_close(dynamic_depthwise(u, weights), expected)


@pytest.mark.parametrize(
    ("length", "side", "starts"), [(27, 16, [0, 11]), (40, 16, [0, 12, 24]), (16, 16, [0]), (33, 16, [0, 9, 17])]
)
def test_windows_cover_a_side_evenly(length: int, side: int, starts: list[int]) -> None:
    assert window_starts(length, side) == starts


def test_windows_are_used_in_eval_mode_only_and_each_picture_of_a_batch_is_by_itself() -> None:
    image = torch.rand(2, 3, 12, 16)
    windowed, whole = small(), small(tlc_flag=False)
    with torch.no_grad():
        assert not torch.allclose(windowed(image), whole(image), atol=1e-4)
        torch.testing.assert_close(windowed(image)[1:], windowed(image[1:]))
        torch.testing.assert_close(windowed(image[..., :8, :8]), whole(image[..., :8, :8]))
        torch.testing.assert_close(windowed.train()(image), whole.train()(image))


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [({"buildblock_type": "edge"}, 3), ({"buildblock_type": "idynamic", "idynamic": False}, 2),
     ({"buildblock_type": "restormer", "restormer_ffn_type": "BaseFFN", "upsampler": "", "upscale": 1}, 2),
     ({"upsampler": "pixelshuffle", "upscale": 4, "in_chans": 1}, 3)],
)  # fmt: skip
def test_the_other_types_run(overrides: dict[str, Any], layers: int) -> None:
    model = small(**overrides)
    channels, scale = model.config.in_chans, model.config.upscale
    assert len(model.deep_feature_extraction[0].body) == layers
    with torch.no_grad():
        assert model(torch.rand(1, channels, 9, 7)).shape == (1, channels, 9 * scale, 7 * scale)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"buildblock_type": "swin"}, "swin"),
        ({"window_size": 4}, "odd, not 4"),
        ({"restormer_num_heads": 3}, "restormer_num_heads 3"),
        ({"idynamic_num_heads": 5}, "idynamic_num_heads 5"),
        ({"upsampler": "pixelshuffle", "upscale": 6}, "not 6 times"),
    ],
)
def test_refuses_what_cannot_work(overrides: dict[str, Any], told: str) -> None:
    with pytest.raises(TersorError, match=told):
        small(**overrides)
