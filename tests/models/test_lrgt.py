"""LRGT: views and merged tokens in any order, equal tokens, the official file of three parts, losses, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tersor.models
from tersor.errors import TersorError
from tersor.models.vision.lrgt import LRGT, cluster, dice_loss, intersection_over_union

SMALL = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "lga_layer": (1,),
    "patch_group": 4,
    "merge_tokens": (48, 32),
    "merge_neighbours": 5,
    "merge_heads": 2,
    "decoder_depth": 4,
    "decoder_heads": 2,
    "decoder_channels": (8, 2, 1),
}


@pytest.fixture(scope="module")
def model() -> LRGT:
    torch.manual_seed(0)
    built = tersor.models.create("lrgt", **SMALL).eval()
    assert isinstance(built, LRGT)
    with torch.no_grad():  # weights that say something: fresh ones are close to the identity
        for p in built.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return built


@pytest.fixture(scope="module")
def views() -> Tensor:
    return torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_views_in_another_order_have_the_same_features_in_that_order(model: LRGT, views: Tensor) -> None:
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model.features(views[:, order]), model.features(views)[:, order], rtol=1e-4, atol=1e-5)
    alone = model.features(views[:, :1])
    assert not torch.allclose(alone, model.features(views)[:, :1], atol=1e-3), "the views do not see each other"


@torch.no_grad()
def test_one_view_attends_within_dilated_groups(model: LRGT) -> None:
    """A grid of 8 in groups of side 4: a token's attention holds the 4 tokens whose row and column differ by multiples of
    4; the convolution reaches its 8 neighbours. So another token has no influence."""
    attention = model.encoder.encoder.blocks[1].attn
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with torch.enable_grad():
        attention.over_views(x, 1)[0, 3 * 8 + 2].sum().backward()  # type: ignore[operator, union-attr]
    assert x.grad is not None
    seen = {(int(n) // 8, int(n) % 8) for n in x.grad[0].abs().sum(-1).nonzero()}
    neighbours = {(3 + i, 2 + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert seen == neighbours | {(3, 2), (7, 2), (3, 6), (7, 6)}


@torch.no_grad()
def test_merged_tokens_in_another_order_make_the_same_volume(model: LRGT, views: Tensor) -> None:
    merged = model.merger(model.features(views))
    shuffled = merged[:, torch.randperm(merged.shape[1], generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(model.decoder(shuffled), model.decoder(merged), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_any_number_of_views_makes_one_volume_each_time_the_same(model: LRGT, views: Tensor) -> None:
    for count in (1, 3):
        volume = model(views[:, :count])
        assert volume.shape == (2, 1, 32, 32, 32)
        assert torch.equal(volume, model(views[:, :count]))


def test_equal_tokens_share_a_cluster() -> None:
    places = torch.tensor([[0.0, 0], [0.1, 0], [5, 5], [5.1, 5], [9, 0], [9.1, 0.1]])
    x = places.repeat(2, 1)[None]  # each token twice, as of a picture that is given twice
    clusters = cluster(x, centres=3, neighbours=3)[0]
    assert torch.equal(clusters[:6], clusters[6:])
    assert [len(set(clusters[i : i + 2].tolist())) for i in (0, 2, 4)] == [1, 1, 1]
    assert clusters.unique().numel() == 3


def test_every_token_is_its_own_cluster_where_as_many_are_wanted() -> None:
    assert cluster(torch.randn(2, 10, 4), centres=10, neighbours=3).sort(1).values.tolist() == [list(range(10))] * 2


def test_loads_the_official_file_of_three_parts(model: LRGT, tmp_path: Path) -> None:
    parts = {"epoch_idx": 3}
    for name in ("encoder", "merger", "decoder"):
        part = getattr(model, name).state_dict()
        parts[f"{name}_state_dict"] = {f"module.{key}": value for key, value in part.items()}
    parts["encoder_solver_state_dict"] = {"state": {}, "param_groups": []}  # type: ignore[assignment]
    torch.save(parts, tmp_path / "LRGT.pth")
    again = tersor.models.load("lrgt", tmp_path / "LRGT.pth", **SMALL)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_starts_from_a_distilled_deit(model: LRGT) -> None:
    own = model.encoder.encoder.state_dict()
    deit: dict[str, Tensor] = {"head.weight": torch.zeros(3, 16), "head_dist.weight": torch.zeros(3, 16)}
    for key, value in own.items():
        if ".to_q." in key:
            deit[key.replace("to_q", "qkv")] = torch.cat([own[key.replace("to_q", each)] for each in _QKV])
        elif not any(each in key for each in (*_QKV, "IFS")):
            deit[key] = value
    fresh = tersor.models.create("lrgt", **SMALL)
    assert isinstance(fresh, LRGT)
    fresh.load_deit(deit)
    got = fresh.encoder.encoder.state_dict()
    assert all(torch.equal(value, got[key]) for key, value in own.items() if "IFS" not in key)
    with pytest.raises(TersorError, match="no distilled DeiT"):
        fresh.load_deit({"cls_token": own["cls_token"]})


_QKV = ("to_q", "to_k", "to_v")


def test_overlap_and_loss_of_volumes() -> None:
    target = torch.zeros(2, 1, 4, 4, 4)
    target[0, 0, :2] = 1
    volume = 0.45 * target
    assert intersection_over_union(volume, target).tolist() == [[1, 1], [1, 1], [0, 1]]
    empty = dice_loss(torch.zeros(1, 8), torch.zeros(1, 8))
    assert empty == 0  # smooth / smooth
    assert dice_loss(target, target) == pytest.approx((1 - 33 / 65) / 2)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"patch_group": 3}, "grid 8 is not a multiple of patch_group 3"),
        ({"lga_layer": (2,)}, "lga_layer"),
        ({"decoder_channels": (9, 2, 1)}, "decoder width 9"),
    ],
)
def test_refuses_what_cannot_be_built(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(TersorError, match=told):
        tersor.models.create("lrgt", **{**SMALL, **wrong})


def test_refuses_other_pictures_and_too_few_tokens(model: LRGT) -> None:
    with pytest.raises(TersorError, match="img_size"):
        model(torch.randn(1, 2, 3, 48, 48))
    many = tersor.models.create("lrgt", **{**SMALL, "merge_tokens": (100, 32)})
    with pytest.raises(TersorError, match="more views"):
        many(torch.randn(1, 1, 3, 32, 32))
