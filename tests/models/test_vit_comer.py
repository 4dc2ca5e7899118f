"""ViT-CoMer beyond its golden cases: checkpoints of whole segmenters and of plain ViTs, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tersor.models
from tersor.errors import TersorError

SMALL = {
    **tersor.models.list("vit_comer_t")[0].small,
    "version": "segmentation",
    "depth": 4,
    "window_attn": (True, False, False, False),
    "interaction_indexes": ((0, 0), (1, 1), (2, 2), (3, 3)),
    "use_CTI_toV": (True, False, False, True),
    "dim_ratio": 1.0,
}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("vit_comer", **{**SMALL, **overrides}).eval()


def test_takes_the_backbone_of_a_segmenters_checkpoint() -> None:
    model = small()
    state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    again = tersor.models.load("vit_comer", {**state, "decode_head.conv_seg.weight": torch.zeros(1)}, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_plain_vit_fills_its_branch_and_at_first_the_pyramid_does_not_change_it() -> None:
    donor = small()
    vit = {key: value for key, value in donor.state_dict().items() if key.startswith(("patch_embed.", "blocks."))}
    vit = {key: value for key, value in vit.items() if not key.endswith(("gamma1", "gamma2"))}
    positions = torch.randn(1, 1 + 8 * 8, 16)  # of 128 pixels, with a class token
    plain = {**vit, "pos_embed": positions, "cls_token": torch.zeros(1, 1, 16), "norm.weight": torch.ones(16)}
    model = tersor.models.load("vit_comer", plain, **SMALL)
    assert torch.equal(model.blocks[3].mlp.fc2.weight, donor.blocks[3].mlp.fc2.weight)
    assert model.pos_embed.shape == (1, 17, 16)
    assert torch.equal(model.pos_embed[:, 0], positions[:, 0])
    assert all((each.cti_tov.gamma == 0).all() for each in model.interactions if each.cti_tov is not None)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"interaction_indexes": ((0, 1), (2, 3))}, "here are 2"),
        ({"interaction_indexes": ((0, 1), (2, 4))}, r"not in 0\.\.3"),
        ({"deform_num_heads": 3}, "deform_num_heads 3"),
        ({"pretrain_size": 224}, "img_size 64"),
        ({"window_size": None}, "needs a window_size"),
        ({"use_CTI_toC": (True, False)}, "use_CTI_toC has 2 entries for 4"),
        ({"version": "tracking"}, "tracking"),
    ],
)
def test_refuses_what_cannot_work(overrides: dict[str, Any], told: str) -> None:
    with pytest.raises(TersorError, match=told):
        small(**overrides)


def test_refuses_sizes_that_leave_half_a_token_and_says_which_work() -> None:
    with pytest.raises(TersorError, match="not 72 x 64; 64 x 64 works"):
        small()(torch.randn(1, 3, 72, 64))
