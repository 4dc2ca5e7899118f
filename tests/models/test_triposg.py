"""TripoSG beyond its golden cases: sets without order, the mixture of experts, the flow, the VAE."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.errors import TersorError
from tersor.models.points.triposg import Mixture, TripoSG, balance_loss, mixture_from_dense
from tersor.models.points.triposg_vae import Attention, TripoSGVAE, farthest_points
from tersor.train.rectified_flow import FlowConfig, RectifiedFlow

SMALL = {"width": 16, "num_layers": 3, "num_attention_heads": 2, "in_channels": 4, "cross_attention_dim": 6}
SMALL_VAE = {
    "latent_channels": 4,
    "num_attention_heads": 2,
    "width_encoder": 16,
    "width_decoder": 16,
    "num_layers_encoder": 1,
    "num_layers_decoder": 1,
    "num_tokens": 8,
}


def dit(**overrides: object) -> TripoSG:
    torch.manual_seed(0)
    model = tersor.models.create("triposg", **{**SMALL, **overrides}).eval()
    assert isinstance(model, TripoSG)
    return model


def vae(**overrides: object) -> TripoSGVAE:
    torch.manual_seed(0)
    model = tersor.models.create("triposg_vae", **{**SMALL_VAE, **overrides}).double().eval()
    assert isinstance(model, TripoSGVAE)
    return model


def cloud(points: int, batch: int = 1) -> Tensor:
    normals = nn.functional.normalize(torch.randn(batch, points, 3, dtype=torch.float64), dim=-1)
    return torch.cat((0.8 * normals, normals), -1)  # a sphere


def test_latents_are_a_set() -> None:
    model = dit()
    x, t, context = model.example_inputs(2).values()
    order = torch.randperm(x.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, order], t, context), model(x, t, context)[:, order])


@pytest.mark.parametrize(("depth", "used"), [(4, [False, True]), (5, [True, True])])
def test_an_even_depth_leaves_the_first_skip_unused(depth: int, used: list[bool]) -> None:
    model = dit(num_layers=depth)
    skips = []
    for block in model.blocks:
        block.register_forward_hook(lambda _block, given, _result: skips.append(given[3]))
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _block, _given, result: outputs.append(result))
    model(**model.example_inputs(1))
    found = [any(skip is not None and torch.equal(skip, outputs[i]) for skip in skips) for i in range(2)]
    assert found == used


def test_scales_weigh_the_two_contexts() -> None:
    model = dit(use_cross_attention_2=True, cross_attention_2_dim=5)
    inputs = model.example_inputs(1)
    other = {**inputs, "encoder_hidden_states_2": torch.randn(1, 3, 5)}
    with torch.no_grad():
        assert not torch.equal(model(**inputs), model(**other))
        torch.testing.assert_close(
            model(**inputs, cross_attention_2_scale=0.0), model(**other, cross_attention_2_scale=0.0)
        )


def test_inputs_that_do_not_fit_are_named() -> None:
    model = dit()
    x, t, context = model.example_inputs(2).values()
    with pytest.raises(TersorError, match=r"latents \(batch, tokens, 4\), not \[2, 12, 3\]"):
        model(x[..., :3], t, context)
    with pytest.raises(TersorError, match=r"context \(2, length, 6\), not \[1, 7, 6\]"):
        model(x, t, context[:1])
    with pytest.raises(TersorError, match="has 1 contexts; 2 came"):
        model(x, t, context, context)
    with pytest.raises(TersorError, match="use_cross_attention_2 and a cross_attention_2_dim"):
        dit(use_cross_attention_2=True)
    with pytest.raises(TersorError, match="moe_layers is 0 to num_layers 3, not 4"):
        dit(moe_layers=4)


# ---- the mixture of experts


def mixture(**overrides: object) -> Mixture:
    found = dit(moe_layers=1, **overrides).blocks[-1].ff
    assert isinstance(found, Mixture)
    return found


def test_equal_experts_are_the_dense_network_plus_the_shared_one() -> None:
    layer = mixture()
    for expert in layer.experts[1:]:
        expert.load_state_dict(layer.experts[0].state_dict())
    z = torch.randn(2, 9, 16)
    torch.testing.assert_close(layer(z), layer.shared(z) + layer.experts[0](z))


def test_each_token_gets_its_best_experts_by_its_gates() -> None:
    layer, z = mixture(experts_per_token=3), torch.randn(1, 5, 16)
    wanted = []
    for token in z[0]:
        gates = layer.gate(token).softmax(-1)
        best = gates.argsort(descending=True)[:3]
        mixed = sum(gates[e] * layer.experts[int(e)](token) for e in best) / gates[best].sum()
        wanted.append(layer.shared(token) + mixed)
    torch.testing.assert_close(layer(z)[0], torch.stack(wanted))


def test_the_gate_of_an_expert_nobody_chose_learns_by_the_balance_alone() -> None:
    layer = mixture(num_experts=4, experts_per_token=2).train()
    z = torch.randn(1, 1, 16)
    chosen = layer.gate(z[0, 0]).topk(2).indices
    others = [e for e in range(4) if e not in chosen]
    layer(z).sum().backward()
    # gates of the chosen sum to 1 among themselves, so the others cancel out
    assert layer.gate.weight.grad[others].abs().max() < 1e-6
    assert layer.gate.weight.grad[chosen].abs().max() > 1e-4
    layer.zero_grad()
    layer(z)
    assert layer.balance is not None
    layer.balance.backward()
    assert layer.gate.weight.grad[others].abs().min() > 0


def test_balance_is_1_for_uniform_routing_and_the_most_where_all_choose_the_same() -> None:
    layer = mixture(num_experts=4, experts_per_token=1).train()
    nn.init.zeros_(layer.gate.weight)
    with torch.no_grad():
        layer.gate.weight[:, :4] = 50 * torch.eye(4)
    z = torch.zeros(1, 4, 16)
    z[0, :, :4] = torch.eye(4)  # token e goes to expert e
    layer(z)
    assert layer.balance is not None
    assert abs(layer.balance.item() - 1) < 1e-5
    layer(z[:, :1].expand(1, 4, 16))
    assert abs(layer.balance.item() - 4) < 1e-4


def test_cost_grows_with_the_experts_per_token_and_not_with_their_number() -> None:
    def rows(**overrides: object) -> int:
        layer, seen = mixture(**overrides), []
        for expert in layer.experts:
            expert.register_forward_hook(lambda _expert, given, _result: seen.append(len(given[0])))
        layer(torch.randn(2, 10, 16))
        return sum(seen)

    assert rows(num_experts=4) == rows(num_experts=16) == 2 * 20
    assert rows(num_experts=4, experts_per_token=3) == 3 * 20


def test_a_mixture_starts_as_the_dense_model_and_learns() -> None:
    dense = dit()
    model = mixture_from_dense(dense, moe_layers=2, num_experts=3)
    inputs = model.example_inputs(2)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs), dense(**inputs))
    with pytest.raises(TersorError, match="no mixture of experts was called in training mode"):
        balance_loss(model)
    (model.train()(**inputs).square().mean() + 0.01 * balance_loss(model)).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "gate" in name or "shared" in name)
    with pytest.raises(TersorError, match="experts in 2 blocks already"):
        mixture_from_dense(model)


# ---- the flow


def test_the_ideal_velocity_leads_to_the_data_in_any_number_of_steps() -> None:
    x0, start = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    for steps in (1, 7):
        for flow in (RectifiedFlow(FlowConfig()), RectifiedFlow(FlowConfig(shift=3.0))):
            found = flow.sample(lambda x, t, context: x0 - start, start, steps=steps)
            torch.testing.assert_close(found, x0)
    ideal = RectifiedFlow(FlowConfig(weighting="cosmap"))
    noise = torch.randn_like(x0)
    assert ideal.loss(lambda x, t, context: x0 - noise, x0, noise=noise) < 1e-10


def test_guidance_asks_for_zeros_first_and_extrapolates() -> None:
    context = torch.ones(1, 2, 3)

    def model(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        assert torch.equal(context[:, 0, 0], torch.tensor([0.0, 1.0]))
        return context.new_ones(2, 1, 1) + context[:, :1, :1]  # v_0 = 1, v_c = 2

    found = RectifiedFlow(FlowConfig()).sample(model, torch.zeros(1, 1, 1), context, steps=4, guidance=7.0)
    torch.testing.assert_close(found, torch.full((1, 1, 1), 1 + 7.0 * (2 - 1)))
    found = RectifiedFlow(FlowConfig()).sample(model, torch.zeros(1, 1, 1), context, steps=4, guidance=0.5)
    torch.testing.assert_close(found, torch.full((1, 1, 1), 1.5))
    with pytest.raises(TersorError, match=r"guidance 7\.0 leads towards a context"):
        RectifiedFlow(FlowConfig()).sample(lambda x, t, c: x, torch.zeros(1, 1, 1), guidance=7.0)


def test_shifts_move_steps_to_high_noise() -> None:
    plain, shifted = (RectifiedFlow(FlowConfig(shift=shift)).sigmas(4) for shift in (1.0, 3.0))
    assert plain.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    torch.testing.assert_close(shifted, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    dynamic = RectifiedFlow(FlowConfig(use_dynamic_shifting=True)).sigmas(4, mu=torch.tensor(3.0).log().item())
    torch.testing.assert_close(dynamic, shifted)  # e^mu is the shift
    with pytest.raises(TersorError, match=r"mu with use_dynamic_shifting and only then, not mu=0\.5"):
        RectifiedFlow(FlowConfig()).sigmas(4, mu=0.5)


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_training_times_lie_between_data_and_noise(density: str) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = RectifiedFlow(FlowConfig(density=density)).draw_times(4000, generator)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert abs(drawn.mean().item() - 0.5) < 0.03
    middle = ((drawn > 0.25) & (drawn < 0.75)).float().mean()
    assert (middle > 0.53) == (density != "uniform")


def test_flow_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TersorError, match="density is one of 'uniform', 'logit_normal', 'mode', not 'normal'"):
        FlowConfig(density="normal")
    with pytest.raises(TersorError, match="needs steps of at least 1, not 0"):
        RectifiedFlow(FlowConfig()).sigmas(0)


# ---- the VAE


def test_distances_in_chunks_are_those_of_the_whole() -> None:
    model, q = vae(), torch.rand(2, 30, 3, dtype=torch.float64)
    latents = torch.randn(2, 8, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(latents, q, chunk=7), model.decode(latents, q), rtol=0, atol=1e-12)


def test_the_fast_decoder_keeps_what_each_head_looks_at_most() -> None:
    torch.manual_seed(0)
    layer = Attention(8, 2, 8).double()
    z, context = torch.randn(1, 250, 8, dtype=torch.float64), torch.randn(1, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(z, context, keep=6), layer(z, context))
    joined = torch.cat((layer.to_k(layer.norm_cross(context)), layer.to_v(layer.norm_cross(context))), -1)
    k, v = joined.view(1, 6, 2, 8).split(4, -1)
    q = layer.to_q(z).view(1, 250, 2, 4)[:, ::100].mean(1)
    best = (q[:, None] * k).sum(-1)[0].argmax(0)  # of each head
    alone = torch.cat([v[0, best[head], head] for head in range(2)])
    torch.testing.assert_close(layer(z, context, keep=1)[0, 17], layer.to_out[0](alone))
    model = vae()
    latents, p = torch.randn(1, 9, 4, dtype=torch.float64), torch.rand(1, 5, 3, dtype=torch.float64)
    kept = model.decoder(model.tokens(latents), model.embed(p), 3)
    assert torch.equal(model.decode(latents, p, fast=True), kept)
    assert not torch.equal(model.decode(latents, p), kept)


def test_gradients_in_space_are_those_of_differences() -> None:
    model, p = vae(), torch.rand(1, 6, 3, dtype=torch.float64)
    tokens = model.tokens(torch.randn(1, 8, 4, dtype=torch.float64))
    s, exact = model.with_gradient(tokens, p)
    s_again, near = model.with_gradient(tokens, p, interval=1e-5)
    torch.testing.assert_close(s_again, s)
    torch.testing.assert_close(near, exact, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("interval", [None, 0.001])
def test_losses_fall_and_reach_every_weight(interval: float | None) -> None:
    model = vae().train()
    points, q = cloud(40, 2), 1.6 * torch.rand(2, 50, 3, dtype=torch.float64) - 0.8
    distances = q.norm(dim=-1) - 0.8
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    found = []
    for _ in range(12):
        torch.manual_seed(1)
        terms = model.losses(points, q, distances, surface=16, interval=interval)
        terms["loss"].backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        found.append(terms)
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]
    last = found[-1]
    parts = last["distance"] + 10 * last["normal"] + 0.1 * last["eikonal"] + 0.001 * last["kl"]
    torch.testing.assert_close(last["loss"], parts)


def test_the_same_cloud_gives_the_same_tokens_and_training_draws() -> None:
    model, points = vae(), cloud(200)
    with torch.no_grad():
        assert torch.equal(model.encode(points).mean, model.encode(points).mean)
        assert not torch.equal(model.train().encode(points).mean, model.encode(points).mean)


def test_losses_take_the_rows_that_become_tokens() -> None:
    model, points = vae(), cloud(40)
    q, distances = torch.rand(1, 4, 3).to(points), torch.rand(1, 4).to(points)
    rows = model.choose(points[..., :3])
    found = model.losses(points, q, distances, rows=rows)["loss"]
    torch.testing.assert_close(found, model.losses(points, q, distances)["loss"])
    assert not torch.equal(model.losses(points, q, distances, rows=rows * 0)["loss"], found)


def test_farthest_points_are_spread_out() -> None:
    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [10, 0, 0], [4, 0, 0]]])
    assert farthest_points(line, 4).tolist() == [[0, 3, 4, 2]]


def test_clouds_that_do_not_fit_are_named() -> None:
    model = vae()
    with pytest.raises(TersorError, match=r"points \(batch, number, 6\), positions and 3 features, not \[1, 20, 3\]"):
        model.encode(torch.rand(1, 20, 3, dtype=torch.float64))
    with pytest.raises(TersorError, match="makes 8 tokens of at least as many points, not of 7"):
        model.encode(cloud(7))
    with pytest.raises(TersorError, match=r"decodes latents \(batch, tokens, 4\), not \[1, 8, 5\]"):
        model.decode(torch.randn(1, 8, 5), torch.rand(1, 2, 3))
    plain = vae(in_channels=0)
    with pytest.raises(TersorError, match="needs points with normals"):
        plain.losses(cloud(40)[..., :3], torch.rand(1, 4, 3), torch.rand(1, 4))
