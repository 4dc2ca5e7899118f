"""PIDT beyond its golden cases: padding, causality, feasibility; and the physics of the feeder that it restores."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.data.restoration import Feeder, Restoration, best_order, trajectories
from tersor.errors import TersorError

# 0 and 5 have sources; 0-1-2-3-4 is a line that 3-6-5 ties to the other source, which can serve 3 or 7, not both
FEEDER = Feeder(
    load_p=(0.1, 0.3, 0.2, 0.4, 0.1, 0.0, 0.3, 0.4),
    load_q=(0.0, 0.1, 0.1, 0.2, 0.0, 0.0, 0.1, 0.0),
    switches=((0, 1), (1, 2), (2, 3), (3, 4), (5, 6), (3, 6), (6, 7)),
    r=(0.02, 0.02, 0.03, 0.02, 0.02, 0.04, 0.02),
    x=(0.02, 0.02, 0.02, 0.02, 0.02, 0.03, 0.02),
    sources=((0, 0.8, 0.5), (5, 0.7, 0.5)),
    priority=(1, 1, 1, 3, 1, 1, 1, 1),
    limits=(0.6, 1, 1, 1, 1, 1, 1),
)
SMALL: dict[str, Any] = {"state_dim": 31, "act_dim": 7, "discrete": True, "max_length": 8, "max_ep_len": 20,
                         "hidden_size": 16, "n_layer": 2, "n_head": 2}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return trajectories(FEEDER, 40, np.random.default_rng(0), steps=8)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("pidt", **SMALL).eval()


@torch.no_grad()
def test_what_is_not_feasible_has_probability_zero(model: nn.Module, data: dict[str, Tensor]) -> None:
    real = data["attention_mask"] > 0
    probabilities = model(**data).actions.softmax(-1)[real]
    feasible = data["feasible"][real]
    assert not feasible.all()
    assert (probabilities[~feasible] == 0).all()
    assert (probabilities[feasible] > 0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(probabilities)))


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3, 8, 11])
def test_padding_at_the_left_does_not_change_the_action(model: nn.Module, steps: int) -> None:
    run = {name: value[0] for name, value in model.example_inputs(1).items()}
    run = {name: torch.cat((value, value))[:steps] for name, value in run.items()}
    alone = model(**{name: value[-8:][None] for name, value in run.items()}).actions[0, -1]
    torch.testing.assert_close(model.act(**run), alone.softmax(-1), rtol=1e-5, atol=1e-6)
    only = torch.arange(7) == 2
    assert model.act(**run, feasible=only).tolist() == [0, 0, 1, 0, 0, 0, 0]


def test_an_action_does_not_depend_on_itself_or_later_tokens(model: nn.Module) -> None:
    inputs = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in model.example_inputs(1).items()}
    chosen = model(**inputs).actions[0, 4].square().sum()
    seen = [g[0].abs().amax(-1) > 0 for g in torch.autograd.grad(chosen, [inputs[k] for k in ("states", "actions")])]
    assert seen[0].tolist() == [True] * 5 + [False] * 3
    assert seen[1].tolist() == [True] * 4 + [False] * 4


def test_padded_steps_do_not_count_in_the_loss(model: nn.Module, data: dict[str, Tensor]) -> None:
    mask, actions = data["attention_mask"], data["actions"]
    assert (mask == 0).any()
    changed = actions.masked_fill(mask[..., None] == 0, 7.0)
    torch.testing.assert_close(
        model.loss(model(**{**data, "actions": changed}), changed, mask), model.loss(model(**data), actions, mask)
    )


def test_a_checkpoint_in_transformers_layout_loads(model: nn.Module) -> None:
    theirs: dict[str, Tensor] = {"encoder.wpe.weight": torch.zeros(1024, 16), "encoder.h.0.attn.bias": torch.ones(1)}
    names = {".qkv.": ".c_attn.", ".attn.out.": ".attn.c_proj.", ".up.": ".c_fc.", ".down.": ".c_proj."}
    for key, value in model.state_dict().items():
        for ours, published in names.items():
            if ours in key:
                key, value = key.replace(ours, published), value.t() if value.dim() == 2 else value
        theirs[key.replace("transformer.", "encoder.")] = value
    again, inputs = tersor.models.load("pidt", theirs, **SMALL), model.example_inputs(2)
    torch.testing.assert_close(again(**inputs).actions, model(**inputs).actions)


def test_two_buses_have_the_voltage_of_linearised_distflow() -> None:
    feeder = Feeder(
        load_p=(0.0, 0.5), load_q=(0.0, 0.3), switches=((0, 1),), r=(0.04,), x=(0.05,), sources=((0, 1, 1),)
    )
    volts, power = feeder.flow(frozenset({0}))
    assert volts[1] ** 2 == pytest.approx(1 - 2 * (0.04 * 0.5 + 0.05 * 0.3))
    assert power.tolist() == [[0.5, 0.3], [0.5, 0.3]]
    assert feeder.flow(frozenset())[0].tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_no_run_of_feasible_switches_breaks_a_limit_or_closes_a_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    cells, lines = 9, 14
    pairs = [tuple(int(cell) for cell in random.choice(cells, 2, replace=False)) for _ in range(lines)]
    feeder = Feeder(
        load_p=(0.0, 0.0, *random.uniform(0, 0.4, cells - 2)),
        load_q=(0.0, 0.0, *random.uniform(0, 0.2, cells - 2)),
        switches=tuple((a, b) for a, b in pairs),
        r=tuple(random.uniform(0, 0.1, lines)),
        x=tuple(random.uniform(0, 0.1, lines)),
        sources=((0, 0.9, 0.5), (1, 0.7, 0.5)),
    )
    run = Restoration(feeder)
    while not run.done():
        run.step(int(random.choice(np.flatnonzero(run.feasible()))))
        volts, power = feeder.flow(run.closed)
        live = volts > 0
        assert ((volts[live] >= 0.95) & (volts[live] <= 1.05)).all()
        assert (power[:2, 0] <= (0.9, 0.7)).all()
        assert live.sum() == 2 + len(run.closed)  # a forest with one source a tree
    refused = np.flatnonzero(~run.feasible())
    assert len(refused)
    state = run.state()
    after, reward, _ = run.step(int(refused[0]))
    assert reward == -1
    assert np.array_equal(after, state)


def test_the_best_order_is_feasible_and_no_random_run_beats_it(data: dict[str, Tensor]) -> None:
    order, served = best_order(FEEDER)
    run = Restoration(FEEDER)
    rewards = [run.step(switch)[1] for switch in order]
    assert min(rewards) > 0
    assert sum(rewards) + 0.1 == pytest.approx(served)  # the first source's own cell
    assert run.done()
    first = data["attention_mask"].argmax(1)
    returns = data["returns_to_go"][torch.arange(40), first, 0]
    assert returns.max() <= served - 0.1 + 1e-6
    assert returns.min() < served - 0.1 - 1e-3
    broken = FEEDER.violations(frozenset({0, 1, 2}))
    assert [line.split(" ")[0] for line in broken] == ["source", "line", "cell"]
    assert "P 1, Q 0.4 of 0.8, 0.5" in broken[0]


def test_trained_on_random_runs_it_restores_what_is_asked_for(model: nn.Module, data: dict[str, Tensor]) -> None:
    """Asked for the best return it reaches 95% of the optimum; a random policy does not on average."""
    best = best_order(FEEDER)[1] - 0.1
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        model.loss(model(**data), data["actions"], data["attention_mask"]).backward()
        optimizer.step()

    def restored(asked: float) -> float:
        run, left = Restoration(FEEDER, steps=8), [asked]
        states, actions = [run.state()], torch.zeros(1, 7)
        while not run.done():
            feasible = torch.from_numpy(run.feasible())
            returns = torch.tensor(left)[:, None]
            chances = model.act(
                torch.from_numpy(np.stack(states)), actions, returns, torch.arange(len(left)), feasible=feasible
            )
            switch = int(chances.argmax())
            actions[-1, switch] = 1
            state, reward, _ = run.step(switch)
            states.append(state)
            actions = torch.cat((actions, torch.zeros(1, 7)))
            left.append(left[-1] - reward)
        return asked - left[-1]

    returns = data["returns_to_go"][torch.arange(40), data["attention_mask"].argmax(1), 0]
    assert returns.mean() < 0.9 * best
    assert restored(best) >= 0.95 * best
    assert restored(float(returns.min())) < restored(best)


def test_trajectories_tell_the_return_to_come(data: dict[str, Tensor]) -> None:
    for row in range(12):
        run, first = Restoration(FEEDER, steps=8), int(data["attention_mask"][row].argmax())
        left = float(data["returns_to_go"][row, first])
        for place in range(first, 8):
            assert data["returns_to_go"][row, place, 0] == pytest.approx(left, abs=1e-6)
            assert np.array_equal(data["states"][row, place].numpy(), run.state())
            left -= run.step(int(data["actions"][row, place].argmax()))[1]
        assert left == pytest.approx(0, abs=1e-6)
        assert run.done()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"r": (0.1,)}, "r has 1 entries for 7 lines"),
        ({"sources": ((9, 1.0, 1.0),)}, "cell 9"),
        ({"sources": ()}, "at least one source"),
        ({"sources": ((0, 0.05, 1.0),)}, "source 0 gives P 0.1"),
    ],
)
def test_refuses_feeders_that_cannot_be(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(TersorError, match=named):
        dataclasses.replace(FEEDER, **changed)


def test_refuses_what_cannot_work(model: nn.Module) -> None:
    with pytest.raises(TersorError, match="n_head"):
        tersor.models.create("pidt", n_head=3)
    with pytest.raises(TersorError, match="no switch is feasible"):
        model.act(*(v[0] for v in model.example_inputs(1).values()), feasible=torch.zeros(7, dtype=torch.bool))
    with pytest.raises(TersorError, match="switches 0 to 6"):
        Restoration(FEEDER).step(7)
