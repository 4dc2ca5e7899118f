"""Mamba and its hybrids beyond their golden cases: transformers' checkpoints, generation, padding, other options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tersor.models
from tersor.errors import TersorError

MAMBA2 = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2, "chunk_size": 8}
SMALL = {"d_model": 32, "n_layer": 2, "vocab_size": 61}
ATTENTION = {"num_heads": 4, "num_heads_kv": 2, "d_conv": 4, "rotary_emb_dim": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba1": ("mamba", {**SMALL, "ssm_cfg": {"d_state": 4}}),
    "mamba2": ("mamba", {**SMALL, "ssm_cfg": MAMBA2, "d_intermediate": 64}),
    "mamba2 without norm": ("mamba", {**SMALL, "ssm_cfg": {**MAMBA2, "rmsnorm": False, "D_has_hdim": True}}),
    "mamba2 with bypass": (
        "mamba",
        {**SMALL, "ssm_cfg": {**MAMBA2, "d_ssm": 32, "norm_before_gate": True, "bias": True}},
    ),
    "attention": ("mamba", {**SMALL, "ssm_cfg": MAMBA2, "attn_layer_idx": (1,), "attn_cfg": ATTENTION}),
    "layer norm": ("mamba", {**SMALL, "rms_norm": False, "tie_embeddings": False}),
    "hybrid": ("mamba_hybrid", tersor.models.find("mamba_hybrid").small),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    system, config = KINDS[request.param]
    return tersor.models.create(system, **config).eval()


@torch.no_grad()
def test_steps_and_pieces_equal_the_whole(model: nn.Module) -> None:
    ids = torch.randint(61, (2, 21))
    whole = model(input_ids=ids)
    first, state = model.prefill(ids[:, :7])
    second, state = model.prefill(ids[:, 7:12], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole[:, :12], rtol=1e-5, atol=1e-5)
    for t in range(12, 21):
        logits, state = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_prompt_padded_on_the_left_goes_on_as_if_alone(model: nn.Module) -> None:
    ids, following = torch.randint(61, (2, 12)), torch.randint(61, (2, 3))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    together, state = model.prefill(ids, attention_mask=mask)
    alone, alone_state = model.prefill(ids[1:, 5:])
    torch.testing.assert_close(together[1:, 5:], alone, rtol=1e-4, atol=1e-5)
    for t in range(3):
        logits, state = model.step(following[:, t], state)
        expected, alone_state = model.step(following[1:, t], alone_state)
        torch.testing.assert_close(logits[1:], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_token_changes_nothing_before_it(model: nn.Module) -> None:
    ids = torch.randint(61, (1, 20))
    changed = ids.clone()
    changed[0, 11] = (ids[0, 11] + 1) % 61
    before, after = model(input_ids=ids), model(input_ids=changed)
    torch.testing.assert_close(before[:, :11], after[:, :11])
    assert not torch.allclose(before[:, 11:], after[:, 11:])


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_loads_transformers_mamba(tied: bool) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    theirs = MambaForCausalLM(MambaConfig(**sizes, tie_word_embeddings=tied)).eval()
    randomise(theirs)
    sizes = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "ssm_cfg": {"d_state": 4}}
    assert_loads(theirs, "mamba", tie_embeddings=tied, **sizes)


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 4])
def test_loads_transformers_mamba2(groups: int) -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "state_size": 8,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
    }
    theirs = Mamba2ForCausalLM(Mamba2Config(**sizes, n_groups=groups, chunk_size=16, tie_word_embeddings=False)).eval()
    randomise(theirs)
    ssm = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": groups}
    assert_loads(theirs, "mamba", vocab_size=64, d_model=32, n_layer=2, ssm_cfg=ssm, tie_embeddings=False)


@torch.no_grad()
def test_loads_the_older_prefix_of_a_hybrid() -> None:
    small = tersor.models.find("mamba_hybrid").small
    ours = tersor.models.create("mamba_hybrid", **small)
    state = {key.replace("model.", "backbone."): value for key, value in ours.state_dict().items()}
    again = tersor.models.load("mamba_hybrid", state, **small)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize(
    ("system", "config", "said"),
    [
        ("mamba", {"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
        ("mamba", {"n_layer": 4, "attn_layer_idx": [4], "attn_cfg": {"num_heads": 2}}, r"\[4\].* 0 to 3"),
        ("mamba", {"attn_layer_idx": [1]}, "num_heads"),
        ("mamba", {"d_model": 32, "ssm_cfg": {"layer": "Mamba2", "headdim": 48}}, "48"),
        ("mamba_hybrid", {"pattern": "MXM"}, "'X'"),
        ("mamba_hybrid", {"pattern": "MEM"}, "MEM"),
        ("mamba_hybrid", {"pattern": "MM/M*/MM"}, r"'M\*', 'MM'"),
        ("mamba_hybrid", {"mlp_hidden_act": "mish"}, "mish"),
    ],
)
def test_refuses_what_cannot_work(system: str, config: dict[str, Any], said: str) -> None:
    with torch.device("meta"), pytest.raises(TersorError, match=said):
        tersor.models.create(system, **config)


def test_half_precision_keeps_the_residual_in_float32_and_stays_close() -> None:
    torch.manual_seed(0)
    model = tersor.models.create("mamba", **KINDS["mamba2"][1]).eval()
    ids = torch.randint(61, (2, 16))
    kept = []
    with torch.no_grad():
        expected = model(input_ids=ids)
        model.bfloat16().backbone.layers[0].register_forward_hook(lambda _m, _i, result: kept.append(result[0].dtype))
        got = model(input_ids=ids)
    assert kept == [torch.float32]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.05)


def randomise(model: nn.Module) -> None:
    """No weight as initialised: norms, D and biases would hide what is mixed up."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)


def assert_loads(theirs: nn.Module, system: str, **config: Any) -> None:
    state = theirs.state_dict()
    if config["tie_embeddings"]:
        del state["lm_head.weight"]  # as in the files, which hold a shared matrix once
    ours = tersor.models.load(system, state, **config)
    ids = torch.randint(64, (2, 19))
    torch.testing.assert_close(ours(input_ids=ids), theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
