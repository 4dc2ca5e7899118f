"""PlainMamba with token pruning: keeping all is the dense model, walks over what is left, images of any size, refusals."""

from __future__ import annotations

import pytest
import torch

import tersor.models
from tersor.errors import TersorError
from tersor.models.vision.plainmamba import walks

SMALL = {"img_size": 64, "num_classes": 3, "embed_dims": 16, "num_layers": 3, "d_state": 4}


def test_a_walk_skips_places_without_tokens_and_counts_them() -> None:
    """A grid of 2 x 3, rows back and forth: 0 1 2 5 4 3. Left are 0, 2, 3 (the tokens 0, 1, 2)."""
    way = walks((2, 3), torch.tensor([[0, 2, 3]]), torch.device("cpu"))
    assert way.order[0, 0].tolist() == [0, 1, 2]
    assert way.gaps[0, 0].tolist() == [1, 2, 3]
    assert way.moves[0, 0].tolist() == [0, 1, 2]  # start, right, left
    assert way.order[0, 2].tolist() == [2, 1, 0]  # from the other end
    assert way.gaps[0, 2].tolist() == [1, 3, 2]
    assert way.order[0, 1].tolist() == [0, 2, 1]  # columns: 0 3 4 1 2 5
    assert way.moves[0, 1].tolist() == [0, 4, 1]  # start, down, right
    assert way.gaps[0, 1].tolist() == [1, 1, 3]


def test_the_grid_holds_zeros_where_tokens_are_gone() -> None:
    way = walks((2, 2), torch.tensor([[1, 2]]), torch.device("cpu"))
    x = torch.tensor([[[5.0], [7.0]]])
    assert way.on_grid(x).flatten().tolist() == [0, 5, 7, 0]
    assert torch.equal(way.off_grid(way.on_grid(x)), x)


@torch.no_grad()
def test_keeping_all_tokens_is_the_dense_model_on_an_image_of_any_size() -> None:
    torch.manual_seed(0)
    dense = tersor.models.create("plainmamba", **SMALL).eval()
    all_kept = tersor.models.load("plainmamba", dense.state_dict(), **SMALL, prune_after=(1, 2), keep=1.0)
    image = torch.randn(2, 3, 70, 90)
    torch.testing.assert_close(all_kept(image), dense(image), rtol=1e-4, atol=1e-5)
    (map_,) = dense.features(image)  # type: ignore[operator]
    assert map_.shape == (2, 16, 5, 6)


@torch.no_grad()
def test_pictures_of_a_batch_are_pruned_each_for_itself() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("plainmamba", **SMALL, prune_after=(1, 2), keep=0.5).eval()
    image = torch.randn(2, 3, 64, 64)
    tokens, way = model.tokens(image)  # type: ignore[operator]
    assert tokens.shape == (2, 4, 16)
    assert not torch.equal(way.places[0], way.places[1])
    alone = torch.cat([model(each[None]) for each in image])
    torch.testing.assert_close(model(image), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "told"), [({"keep": 1.5}, "0..1"), ({"prune_after": (3,)}, "prune_after"), ({"conv_size": 4}, "odd")]
)
def test_refuses_what_cannot_be_built(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(TersorError, match=told):
        tersor.models.create("plainmamba", **{**SMALL, **wrong})
