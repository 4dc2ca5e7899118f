"""The Transformer of "Never Train from Scratch" beyond its golden cases."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import tersor.models
from tersor.errors import TersorError
from tersor.models.sequence.spt import SPT, SPTConfig, local_attention

SMALL = {"d_model": 8, "n_layers": 2, "max_len": 32}


def test_local_attention_is_full_attention_under_its_mask() -> None:
    torch.manual_seed(0)
    for L in (5, 8, 11, 12):
        q, k, v = torch.randn(3, 2, 2, L, 4)
        block = torch.arange(L) // 4
        near = (block[:, None] - block).abs() <= 1
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
        torch.testing.assert_close(local_attention(q, k, v, 4), expected)


def test_a_sequence_is_averaged_over_its_own_length() -> None:
    torch.manual_seed(0)
    model = SPT(SPTConfig(vocab=9, **SMALL)).eval()  # type: ignore[arg-type]
    seen = {}
    model.model.register_forward_hook(lambda _m, _i, h: seen.update(h=h))
    x = torch.randint(9, (2, 12))
    logits = model(x, lengths=torch.tensor([12, 5]))
    expected = model.decoder(torch.stack((seen["h"][0].mean(0), seen["h"][1, :5].mean(0))))
    torch.testing.assert_close(logits, expected)


def test_a_causal_model_does_not_see_what_follows() -> None:
    torch.manual_seed(0)
    for causal in (True, False):
        model = SPT(SPTConfig(rotary=True, pos=False, causal=causal, pool="none", **SMALL)).eval()  # type: ignore[arg-type]
        x = torch.randn(1, 10, 1)
        changed = x.clone()
        changed[:, 6] += 1
        assert torch.equal(model(x)[:, :6], model(changed)[:, :6]) == causal


def test_published_key_names_load() -> None:
    model = tersor.models.create("spt", head="mlp", **SMALL)
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace("norm.", "norm.norm.").replace(".ff.0.", ".ff.0.0.")
        key = key.replace("encoder.", "encoder.0.").replace("decoder.", "decoder.0.output_transform.")
        state[key] = value
    again = tersor.models.load("spt", {**state, "pos.pe": torch.zeros(3)}, head="mlp", **SMALL)
    x = torch.randn(2, 20, 1)
    torch.testing.assert_close(again(x), model.eval()(x))


def test_pairs_are_compared() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("spt", vocab=9, retrieval=True, d_output=2, **SMALL).eval()
    x = torch.randint(9, (6, 12))  # three pairs
    assert model(x).shape == (3, 2)
    torch.testing.assert_close(model(x)[1], model(x[[1, 4]])[0])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"heads": 3}, "d_model 8 is not a multiple of heads 3"),
        ({"pool": "max"}, "not 'max'"),
        ({"local_block": 4, "causal": True}, "local_block 4 does not go with causal"),
        ({"retrieval": True, "head": "mlp"}, "head mlp"),
    ],
)
def test_a_wrong_option_is_named(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(TersorError, match=said):
        tersor.models.create("spt", **{**SMALL, **wrong})


def test_a_sequence_longer_than_its_positions_is_refused() -> None:
    with pytest.raises(TersorError, match="positions for 32 elements, not for 33"):
        tersor.models.create("spt", **SMALL)(torch.zeros(1, 33, 1))
    assert tersor.models.create("spt", **SMALL, pos=False, rotary=True)(torch.zeros(1, 33, 1)).shape == (1, 10)
