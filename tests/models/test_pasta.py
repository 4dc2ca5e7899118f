"""PASTA: no code is published, so the fact sheet's properties are what it is held to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.data.control_runs import STEP, SYSTEMS, control_runs
from tersor.errors import TersorError
from tersor.models.control.pasta import PastaConfig, Policy, decode, encode, masked_tokens

SMALL: dict[str, Any] = {"bins": 64, "max_tokens": 40, "hidden_size": 32, "layers": 2, "heads": 2}


def build(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("pasta", **{**SMALL, **config}).eval()


@pytest.mark.parametrize("bins", [16, 1024])
def test_the_tokenizer_keeps_order_and_loses_less_than_a_bin(bins: int) -> None:
    config = PastaConfig(bins=bins)
    x = torch.cat((torch.linspace(-256, 256, 4001), torch.linspace(-1, 1, 4001))).double().sort().values
    ids = encode(x, config)
    assert ids[0] == 0
    assert ids[-1] == bins - 1  # the last bin is closed
    assert (ids.diff() >= 0).all()
    law = 2 / bins * math.log(256 * 100 + 1)  # a bin's width under the logarithm
    width = (x.abs() + 0.01) * (math.exp(law) - 1)
    assert ((decode(ids, config) - x).abs() <= width).all()
    assert torch.equal(encode(decode(torch.arange(bins), config).double(), config), torch.arange(bins))
    assert encode(torch.tensor([torch.nan, 1e9, -1e9]), config).tolist() == [bins, bins - 1, 0]
    assert decode(torch.tensor([bins]), config).isnan().all()


@pytest.mark.parametrize(("n", "m"), [(3, 1), (4, 2), (1, 3)])
def test_components_stand_where_the_layout_says(n: int, m: int) -> None:
    model, states, actions = build(), torch.randn(2, 5, n), torch.randn(2, 5, m)
    tokens = model.tokens_of(states, actions)
    assert tokens.shape == (2, 5 * (n + m))
    for t in range(5):
        start = (n + m) * t
        assert torch.equal(tokens[:, start : start + n], encode(states[:, t], model.config))
        assert torch.equal(tokens[:, start + n : start + n + m], encode(actions[:, t], model.config))
    assert torch.equal(model.tokens_of(states, actions[:, :4]), tokens[:, : 5 * (n + m) - m])
    logits = model(tokens)  # the targets of C-GPT are the tokens one further
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model.loss(tokens), expected)


@torch.no_grad()
@pytest.mark.parametrize("objective", ["gpt", "bert", "mtm"])
def test_later_tokens_are_seen_by_all_but_gpt(objective: str) -> None:
    model, tokens = build(objective=objective), torch.randint(64, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 7) % 64
    same = torch.isclose(model(changed), model(tokens), atol=1e-6).all(-1).all(0)
    assert same[:12].tolist() == [objective == "gpt"] * 12


def test_the_shares_of_masked_tokens_are_berts() -> None:
    torch.manual_seed(0)
    config, tokens = PastaConfig(objective="bert"), torch.randint(1024, (1000, 100))
    given, chosen = masked_tokens(tokens, config)
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.003)
    assert torch.equal(given[~chosen], tokens[~chosen])
    masked, kept = given[chosen] == 1024, given[chosen] == tokens[chosen]
    for share, wanted in ((masked, 0.8), (~masked & ~kept, 0.1), (kept, 0.1)):
        assert share.float().mean().item() == pytest.approx(wanted, abs=0.01)


def test_mtm_draws_a_share_for_each_sequence() -> None:
    torch.manual_seed(0)
    config, tokens = PastaConfig(objective="mtm"), torch.randint(1024, (1000, 100))
    tokens[:, 3] = 1024  # a failed sensor
    given, chosen = masked_tokens(tokens, config)
    shares = chosen.float().mean(1)
    assert (chosen.sum(1) >= 1).all()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.std().item() == pytest.approx(12**-0.5, abs=0.03)  # uniform
    assert (given[chosen] == 1024).all()
    assert not chosen[:, 3].any()


@pytest.mark.parametrize("objective", ["bert", "mtm"])
def test_tokens_that_are_not_asked_for_do_not_count_in_the_loss(objective: str) -> None:
    model, tokens = build(objective=objective), torch.randint(64, (6, 20))
    seen: list[Tensor] = []
    model.head.register_forward_hook(lambda _m, _i, out: seen.append(out) or out.retain_grad())  # type: ignore[func-returns-value]
    torch.manual_seed(3)
    model.loss(tokens).backward()
    torch.manual_seed(3)
    _, chosen = masked_tokens(tokens, model.config)
    gradient = seen[0].grad
    assert gradient is not None
    assert torch.equal(gradient.abs().sum(-1) > 0, chosen)


def test_the_default_has_less_than_seven_million_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in tersor.models.create("pasta").parameters()) < 7e6


def trained(model: nn.Module, batches: Any, lr: float = 3e-3) -> nn.Module:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for tokens in batches:
        model.train().loss(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_it_learns_the_physics_and_no_more_of_random_actions_than_there_is() -> None:
    """x' = 0.8 x + u: the next state is known by more than a nat; of u, drawn from six values, nothing is."""
    model = build(hidden_size=48, bins=48, largest=4.0, max_tokens=12)

    def runs(count: int, seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        u = torch.randint(6, (count, 6, 1), generator=random) / 2.5 - 1
        x = [torch.rand(count, 1, generator=random) * 2 - 1]
        for t in range(5):
            x.append(0.8 * x[-1] + u[:, t])
        return model.tokens_of(torch.stack(x, 1), u)

    trained(model, (runs(64, seed) for seed in range(1, 260)))
    tokens = runs(2000, 0)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(tokens)[:, :-1].mT, tokens[:, 1:], reduction="none").mean(0)
    of_action, of_state = losses[2::2].mean(), losses[3::2].mean()  # from the second step on
    share = tokens[:, 4::2].flatten().bincount().float() / tokens[:, 4::2].numel()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    assert of_state < entropy - 1
    assert of_action == pytest.approx(math.log(6), abs=0.1)


def test_with_a_failed_sensor_a_probe_on_the_representation_beats_one_on_the_state() -> None:
    """Positions are not measured any more: ridge regression of the controller's action, on held-out runs."""
    states, actions = control_runs("point-mass", 120, steps=24, seed=0, noise=0.02)
    model = build(objective="mtm", max_tokens=24, largest=4.0)

    def chunk(rows: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        steps = first[:, None] + torch.arange(4)
        return states[rows[:, None], steps], actions[rows[:, None], steps]

    random = torch.Generator().manual_seed(0)
    drawn = (
        (torch.randint(90, (64,), generator=random), torch.randint(20, (64,), generator=random)) for _ in range(250)
    )
    trained(model, (model.tokens_of(*chunk(rows, first)) for rows, first in drawn))

    everything = torch.cartesian_prod(torch.arange(120), torch.arange(0, 20, 3))
    s, a = chunk(everything[:, 0], everything[:, 1])
    failed = s.clone()
    failed[..., :2] = torch.nan  # both positions
    with torch.no_grad():
        T = model.represent(failed, a[:, :-1], pool="concat")
    held_out, y = everything[:, 0] >= 90, a[:, -1]

    def error(x: Tensor) -> float:
        X = torch.cat((x, torch.ones(len(x), 1)), 1).double()
        known, wanted = X[~held_out], y[~held_out].double()
        W = torch.linalg.solve(known.T @ known + 0.1 * torch.eye(X.shape[1]).double(), known.T @ wanted)
        return float((X[held_out] @ W - y[held_out]).square().mean() / y[held_out].var())

    assert error(T) < 0.7 * error(failed[:, -1].nan_to_num())


@pytest.mark.parametrize(("tune", "pool"), [("probe", "mean"), ("last-layer", "concat"), ("full", "mean")])
def test_a_policy_trains_what_it_says(tune: str, pool: str) -> None:
    encoder = build()
    policy = Policy(encoder, state_dim=3, act_dim=2, tune=tune, pool=pool, width=16)
    states, actions = torch.randn(4, 5, 3), torch.randn(4, 4, 2)
    assert policy(states, actions).shape == (4, 2)
    policy(states, actions).square().sum().backward()
    moved = {name for name, p in encoder.named_parameters() if p.grad is not None}
    if tune == "probe":
        assert not moved
    elif tune == "last-layer":
        assert moved
        assert all(name.startswith(("blocks.1.", "norm.")) for name in moved)
    else:
        assert {name.split(".")[0] for name in moved} == {"embed", "position", "blocks", "norm"}
    assert all(p.grad is not None for p in policy.mlp.parameters())


def test_simulated_runs_follow_their_physics_and_their_controllers() -> None:
    states, actions = control_runs("point-mass", 30, steps=100, noise=0.0)
    v = states[:, :-1, 2:] + STEP * (actions[:, :-1] - 0.1 * states[:, :-1, 2:])
    torch.testing.assert_close(states[:, 1:, 2:], v)
    assert states[:, -1].norm(dim=-1).median() < 0.2 * states[:, 0].norm(dim=-1).median()
    balanced, _ = control_runs("cart-pole", 20, steps=200, noise=0.0)
    assert balanced[:, -1, 2].abs().max() < 0.05
    swings, torque = control_runs("pendulum", 20, steps=300)
    torch.testing.assert_close(swings[..., 0] ** 2 + swings[..., 1] ** 2, torch.ones(20, 300))
    assert (swings[:, -50:, 0].mean(1) > 0.9).float().mean() > 0.7  # up
    assert torque.abs().max() <= SYSTEMS["pendulum"].largest
    assert torch.equal(control_runs("pendulum", 3, steps=9)[0], swings[:3, :9])


def test_says_what_cannot_work() -> None:
    model = build()
    for call, said in (
        (lambda: model(torch.zeros(1, 41, dtype=torch.int64)), "positions for 40 tokens, not 41"),
        (lambda: model.tokens_of(torch.zeros(2, 5, 3), torch.zeros(2, 3, 1)), "5 or 4 steps"),
        (lambda: build(objective="smart"), "'smart'"),
        (lambda: build(heads=5), "heads"),
        (lambda: Policy(model, state_dim=3, act_dim=1, tune="some"), "'some'"),
        (lambda: control_runs("hopper", 1, steps=1), "'hopper'"),
        (lambda: control_runs("pendulum", 0, steps=1), "0 runs"),
    ):
        with pytest.raises(TersorError, match=said):
            call()
