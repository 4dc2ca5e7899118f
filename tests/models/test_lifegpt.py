"""LifeGPT beyond its golden cases: generation, forgetful masking, checkpoints of both kinds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tersor.models
from tersor.errors import TersorError
from tersor.models.text.lifegpt import forgetful_mask, training_loss

SMALL = tersor.models.find("lifegpt").small


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("lifegpt", **SMALL).eval()


@torch.no_grad()
def test_steps_and_pieces_equal_the_whole(model: nn.Module) -> None:
    ids = torch.randint(256, (2, 15))
    whole = model(ids)
    first, state = model.prefill(ids[:, :6])
    second, state = model.prefill(ids[:, 6:10], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole[:, :10], rtol=1e-5, atol=1e-5)
    for t in range(10, 15):
        logits, state = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-5, atol=1e-5)


def test_forgetting_hides_a_fixed_number_of_keys_and_never_the_first() -> None:
    visible = forgetful_mask(200, 41, 0.15)
    assert (visible.sum(1) == 41 - 6).all()
    assert visible[:, 0].all()
    assert not visible[:, 1:].all(0).any()  # every other place is hidden in some row
    with pytest.raises(TersorError, match=r"1\.5"):
        forgetful_mask(2, 8, 1.5)


def test_a_hidden_key_has_no_influence_on_other_places(model: nn.Module) -> None:
    ids, visible = torch.randint(256, (1, 12)), torch.ones(1, 12, dtype=torch.bool)
    visible[0, 4] = False
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % 256
    difference = (model(ids, visible) - model(changed, visible)).abs().amax(-1)[0]
    assert difference.nonzero().flatten().tolist() == [4]


def test_training_without_forgetting_is_plain_cross_entropy(model: nn.Module) -> None:
    ids = torch.randint(256, (2, 20))
    expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(training_loss(model, ids, forgetting=0), expected)
    assert not torch.allclose(training_loss(model, ids, forgetting=0.5), expected, rtol=1e-4)


def test_loads_a_wrapped_checkpoint_and_the_later_name_of_norms(model: nn.Module) -> None:
    state = {}
    for key, value in model.state_dict().items():
        norm = (key.endswith("0.0.weight") and "ff" not in key) or "final_norm" in key
        state["net." + (key.replace(".weight", ".gamma") if norm else key)] = value
    state["net.attn_layers.rotary_pos_emb.inv_freq"] = torch.ones(16)
    again = tersor.models.load("lifegpt", state, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
