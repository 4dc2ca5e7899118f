"""H3 beyond its golden cases: generation, kernels by hand, older checkpoints, options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tersor.models
from tersor.errors import TersorError
from tersor.models.text.h3 import H3Layer, H3LayerConfig

SMALL = {"d_model": 16, "n_layer": 3, "vocab_size": 61, "ssm_cfg": {"d_state": 8}}
KINDS: dict[str, dict[str, Any]] = {
    "pure": SMALL,
    "heads of 4": {**SMALL, "ssm_cfg": {"d_state": 8, "head_dim": 4, "n_ssm": 2, "disc": "zoh"}},
    "hybrid": {**SMALL, "attn_layer_idx": (1,), "attn_cfg": {"num_heads": 2, "rotary_emb_dim": 4}},
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("h3", **KINDS[request.param]).eval()


@torch.no_grad()
def test_steps_and_pieces_equal_the_whole(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.randint(61, (2, 40))
    whole = model(ids)
    first, state = model.prefill(ids[:, :5])  # shorter than the delay line, and longer
    second, state = model.prefill(ids[:, 5:30], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole[:, :30], rtol=1e-5, atol=1e-5)
    for t in range(30, 40):
        logits, state = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_token_changes_nothing_before_it(model: nn.Module) -> None:
    ids = torch.randint(61, (1, 20))
    changed = ids.clone()
    changed[0, 11] = (ids[0, 11] + 1) % 61
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11])
    assert not torch.allclose(before[:, 11:], after[:, 11:])


@torch.no_grad()
def test_the_shift_kernel_is_the_correlation_of_reading_and_writing() -> None:
    torch.manual_seed(0)
    shift = H3Layer(4, H3LayerConfig(d_state=6)).ssm_k_kernel
    shift.kernel.B.normal_()
    B, C = shift.kernel.B.double(), shift.kernel.C[0].double()
    expected = torch.stack([(C[:, lag:] * B[:, : 6 - lag]).sum(-1) for lag in range(6)], -1)
    torch.testing.assert_close(shift(10)[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("longest", [512, 48, 17])
def test_flashconv_whole_and_in_pieces_equals_the_layer(longest: int) -> None:
    """With its gradients; a last piece may be shorter than the others."""
    torch.manual_seed(0)
    layer, u = H3Layer(6, H3LayerConfig(d_state=8)).double(), torch.randn(2, 100, 6).double().requires_grad_()

    def flash(u: torch.Tensor) -> torch.Tensor:
        q, k, v = (project(u).transpose(1, 2) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
        return layer.output_linear(layer.flash(q, k, v, longest=longest).transpose(1, 2))

    leaves = [u, *layer.parameters()]
    expected, found = layer(u)[0], flash(u)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = (torch.autograd.grad(each, leaves, weights) for each in (found, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [700, 5000])  # in one piece, in three
def test_flashconv_on_a_gpu(length: int) -> None:
    torch.manual_seed(0)
    layer = H3Layer(6, H3LayerConfig(d_state=8)).cuda()
    q, k, v = (torch.randn(3, 6, length, device="cuda").bfloat16() for _ in range(3))
    assert length <= 2048 or not layer._flashes(k)
    with torch.no_grad():
        found = layer.flash(q, k, v).cpu().double()
        expected = layer.cpu().double().flash(*(each.cpu().double() for each in (q, k, v)), longest=length)
    assert (found - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
def test_at_first_the_delay_line_writes_its_newest_place() -> None:
    shift = H3Layer(4, H3LayerConfig(d_state=6)).ssm_k_kernel
    torch.testing.assert_close(shift(6), shift.kernel.C.data, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_l_max_ends_the_kernels() -> None:
    torch.manual_seed(0)
    layer = H3Layer(8, H3LayerConfig(d_state=8, l_max=5)).eval()
    u = torch.randn(1, 20, 8)
    changed = u.clone()
    changed[0, 3] += 1
    difference = (layer(u)[0] - layer(changed)[0]).abs().amax((0, 2)) > 1e-5
    assert difference.nonzero().flatten().tolist() == list(range(3, 12))  # five places of each of two kernels


def test_loads_older_checkpoints_with_shifted_norms(model: nn.Module) -> None:
    state = {}
    last = model.config.n_layer - 1
    for key, value in model.state_dict().items():
        for layer in range(last + 1):
            after = f"layers.{layer - 1}.norm2." if layer else "norm."
            key = key.replace(f"backbone.layers.{layer}.norm1.", f"s4seq.encoder.{after}")
            key = key.replace(f"backbone.layers.{layer}.norm2.", f"s4seq.encoder.layers.{layer}.norm1.")
        key = key.replace("backbone.ln_f.", f"s4seq.encoder.layers.{last}.norm2.")
        key = key.replace("backbone.embeddings.word_embeddings.", "embedding.").replace("backbone.", "s4seq.encoder.")
        state["model." + key] = value + len(state)
    again = tersor.models.load("h3", state, **KINDS["pure"] | _described(model))
    for (name, value), number in zip(model.state_dict().items(), range(len(state)), strict=True):
        if name not in ("lm_head.weight", "backbone.embeddings.word_embeddings.weight"):
            torch.testing.assert_close(again.state_dict()[name], value + number, msg=name)


def _described(model: nn.Module) -> dict[str, Any]:
    described = tersor.models.config_of(model)
    described.pop("tersor_model")
    return described


def test_dynamics_learn_slowly_and_without_decay(model: nn.Module) -> None:
    others, dynamics = model.parameter_groups(lr=6e-4, weight_decay=0.1)
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    assert {names[id(p)] for p in dynamics["params"]} == {"B", "log_dt", "inv_A_real", "A_imag"}
    assert dynamics["weight_decay"] == 0
    assert others["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"ssm_cfg": {"mode": "nplr"}}, "nplr"),
        ({"ssm_cfg": {"head_dim": 5}}, "5"),
        ({"ssm_cfg": {"d_state": 7}}, "7"),
        ({"attn_layer_idx": (12,)}, r"\[12\]"),
        ({"attn_layer_idx": (1,), "attn_cfg": {"num_heads": 7}}, "7"),
    ],
)
def test_refuses_what_cannot_work(config: dict[str, Any], said: str) -> None:
    with torch.device("meta"), pytest.raises(TersorError, match=said):
        tersor.models.create("h3", **config)
