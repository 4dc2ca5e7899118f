"""Video Swin for driver monitoring: other checkpoint layouts, the order of frames, refusals."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional as F

import tersor.models
from tersor.errors import TersorError

SMALL = {
    "num_classes": 5,
    "patch_size": (2, 4, 4),
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": (2, 4, 4),
    "patch_norm": True,
}


def test_loads_torchvisions_names() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("driver", **SMALL).eval()
    theirs = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"layers\.(\d)\.blocks\.", lambda m: f"features.{2 * int(m[1])}.", key.removeprefix("backbone."))
        key = key.replace("layers.0.downsample", "features.1").replace("cls_head.fc_cls", "head")
        theirs[key.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")] = value
    theirs["features.0.0.attn.relative_position_index"] = torch.arange(4)
    again = tersor.models.load("driver", theirs, **SMALL)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_2d_swin_inflated_sees_in_a_still_clip_what_it_sees_in_the_picture() -> None:
    """A 2-D Swin is ours with patches and windows of one frame; its files name it without time and without prefixes."""
    torch.manual_seed(0)
    flat = tersor.models.create("driver", **{**SMALL, "patch_size": (1, 4, 4), "window_size": (1, 4, 4)}).eval()
    state = {
        key.removeprefix("backbone.").replace("cls_head.fc_cls", "head"): value
        for key, value in flat.state_dict().items()
    }
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    model = tersor.models.load("driver", state, **SMALL)
    picture = torch.randn(1, 3, 1, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(model(picture.repeat(1, 1, 8, 1, 1)), flat(picture), rtol=1e-4, atol=1e-6)


def test_has_a_map_for_every_stage_and_none_of_a_head_without_classes() -> None:
    model = tersor.models.create("driver", **{**SMALL, "num_classes": 0}).eval()
    clip = torch.randn(1, 3, 7, 50, 62)
    assert [tuple(each.shape) for each in model.features(clip)] == [(1, 16, 4, 13, 16), (1, 32, 4, 7, 8)]
    assert model(clip).shape == (1, 32)


def moving_bars(count: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A bar that walks right (class 1) or left (class 0); each frame alone looks the same in both classes."""
    target = torch.arange(count) % 2
    steps = torch.arange(frames)
    column = torch.where(target[:, None] == 1, steps, frames - 1 - steps)
    bars = F.one_hot(column, frames).float()  # (count, frames, columns)
    clip = bars[:, None, :, None, :].expand(-1, 3, -1, frames, -1)  # (count, 3, T, H, W)
    return F.interpolate(clip, size=(frames, 4 * frames, 4 * frames)), target


def test_learns_an_order_of_frames_that_no_single_frame_tells() -> None:
    torch.manual_seed(0)
    clip, target = moving_bars(2, frames=4)
    few = {**SMALL, "num_classes": 2, "depths": (1,), "num_heads": (2,), "window_size": (4, 4, 4)}
    model = tersor.models.create("driver", **few, drop_path_rate=0.0, dropout_ratio=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(clip), target).backward()
        optimizer.step()
    assert (model(clip).argmax(1) == target).all()
    assert (model(clip.flip(2)).argmax(1) == 1 - target).all()
    frames = clip.transpose(1, 2).flatten(0, 1)[:, :, None]  # the same pictures one by one
    answers = model(frames).argmax(1).view(2, -1)
    assert torch.equal(answers[0], answers[1].flip(0)), "a frame alone cannot tell the direction"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"window_size": (2, 0, 4)}, "window_size"),
        ({"num_heads": (3, 6)}, "multiple of heads 3"),
        ({"depths": (2,)}, "one entry a stage"),
    ],
)
def test_refuses_what_cannot_be_built(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(TersorError, match=told):
        tersor.models.create("driver", **{**SMALL, **wrong})


def test_refuses_pictures() -> None:
    with pytest.raises(TersorError, match="clips"):
        tersor.models.create("driver", **SMALL)(torch.randn(2, 3, 32, 32))
