"""Learning by acting: episodes as the environment has them, advantages by their definition, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.errors import TersorError
from tersor.tasks.act import TASK, EnvConfig, make_env
from tersor.train.config import TrainConfig
from tersor.train.ppo import Episodes, Played, PPOConfig, advantages, play, proximal
from tersor.train.trainer import train, validate

gymnasium = pytest.importorskip("gymnasium", reason="environments need gymnasium")
from tersor.data.memory_task import FORWARD, LEFT, RIGHT, TMaze  # noqa: E402

SMALL = {"input_dim": 3, "actions": 3, "d_model": 16, "layers": 1, "heads": 2, "d_head": 8, "d_ff": 16}


def policy(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("gtrxl", **{**SMALL, "memory_len": 20, **config})


def test_the_maze_shows_the_cue_once_and_pays_for_the_right_turn() -> None:
    env = TMaze(length=4)
    cues = set()
    for seed in range(8):
        state, _ = env.reset(seed=seed)
        cue = state[0]
        cues.add(float(cue))
        assert state.tolist() == [cue, 1, 0]
        assert env.step(LEFT)[:2][1] == pytest.approx(-0.3 / 4)  # a wall
        states = [env.step(FORWARD)[0].tolist() for _ in range(4)]
        assert states == [[0, 1, 0]] * 3 + [[0, 0, 1]]
        _, reward, ended, cut, info = env.step(LEFT if seed % 2 else RIGHT)
        right = (cue == -1) == bool(seed % 2)
        assert (reward, ended, cut, info) == (1 if right else -1, True, False, {"success": right})
    assert cues == {-1, 1}
    env.reset(seed=0)
    told = [env.step(FORWARD) for _ in range(env.most_steps)]
    assert [step[3] for step in told] == [False] * (env.most_steps - 1) + [True]
    with pytest.raises(TersorError, match="not 0"):
        TMaze(length=0)


def test_the_maze_keeps_the_contract_of_gymnasium() -> None:
    from gymnasium.utils.env_checker import check_env

    check_env(TMaze(length=3), skip_render_check=True)


def test_advantages_are_their_definition() -> None:
    """Against the sum over k written out, of an episode that ended and one that was cut."""
    draw = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(5, 2, generator=draw), torch.randn(6, 2, generator=draw)
    lengths, ended = torch.tensor([3, 5]), torch.tensor([True, False])
    none = torch.zeros(5, 2)
    played = Episodes(none, none, none, rewards, values, lengths, ended, none[0])
    found = advantages(played, discount=0.9, trace=0.7)
    for b in range(2):
        length = int(lengths[b])
        after = [values[t + 1, b] if t < length - 1 or not ended[b] else 0 for t in range(length)]
        errors = [rewards[t, b] + 0.9 * after[t] - values[t, b] for t in range(length)]
        for t in range(5):
            wanted = sum((0.9 * 0.7) ** k * errors[t + k] for k in range(length - t))
            assert float(found[t, b]) == pytest.approx(float(wanted), abs=1e-6)


@torch.no_grad()
def test_what_was_played_is_what_the_model_says_of_whole_episodes() -> None:
    model = policy()
    nn.init.normal_(model.heads.weight)
    played = play(model, [TMaze(length=4) for _ in range(6)], steps=16, seed=3)
    y, real = model(played.states), played.real()
    torch.testing.assert_close(y[..., :-1][real], played.logits[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[..., -1][real], played.values[:-1][real], rtol=1e-4, atol=1e-5)
    assert played.lengths.unique().numel() > 1
    env = TMaze(length=4)  # the same actions, one episode alone
    for b in range(6):
        best = [env.reset(seed=seed)[0][0] for seed in range(20)]
        env.reset(seed=best.index(float(played.states[0, b, 0])))
        told = [env.step(int(played.actions[t, b])) for t in range(int(played.lengths[b]))]
        assert sum(step[1] for step in told) == pytest.approx(float(played.returns()[b]), abs=1e-6)
        assert told[-1][2] == bool(played.ended[b])
        assert told[-1][4]["success"] == bool(played.success[b])
        length = int(played.lengths[b])  # the state after the last step is valued too: a cut episode goes on from there
        seen = torch.tensor(np.stack([played.states[0, b].numpy(), *(step[0] for step in told)]))
        torch.testing.assert_close(played.values[length, b], model(seen[:, None])[-1, 0, -1], rtol=1e-4, atol=1e-5)


def test_the_first_loss_has_a_ratio_of_one_and_clips_what_went_too_far() -> None:
    model = policy()
    played = Played(model, lambda: TMaze(length=4), steps=16, config=PPOConfig(episodes=8))
    played.set_epoch(0)
    batch = played.collate(list(range(8)))
    told = proximal(model.train(), batch)
    policy_part = told["loss"] - 0.5 * told["value"] + 0.01 * told["entropy"]
    assert float(policy_part.detach()) == pytest.approx(0, abs=1e-4)  # the mean of normalised advantages
    better, worse = batch["advantages"] > 0, batch["advantages"] < 0
    far = {
        **batch,
        "chosen": batch["chosen"] - 3.0 * better + 3.0 * worse,
    }  # every change was for the better, and too far
    model.zero_grad()
    clipped = proximal(model, far)
    (clipped["loss"] - 0.5 * clipped["value"] + 0.01 * clipped["entropy"]).backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in model.parameters())


def test_trained_by_the_trainer_it_remembers_the_cue(tmp_path: Path) -> None:
    model = policy()
    recipe = {"lr": 1e-2, "epochs": 12, "max_grad_norm": 0.5, "validate_every": 24, "device": "cpu"}
    sets = TASK.load_data(model, Path("tmaze"), None, {"length": 1, "episodes": 32})
    before = validate(model, sets.test, proximal, batch_size=32)["success"]
    told = train(model, sets.train, objective=proximal, out=tmp_path / "run", config=TrainConfig(**recipe),
                 validation=sets.validation, preprocessing=sets.preprocessing)  # fmt: skip
    assert before < 0.7
    assert told.validation["success"] > 0.9
    (tmp_path / "maze.json").write_text(json.dumps({"env": "tmaze", "episodes": 50, "options": {"length": 1}}))
    again = tersor.load(tmp_path / "run")
    shown = TASK.predict(again, tmp_path / "maze.json", settings={}, labels={}, out=None, reference=None)
    assert shown.success > 0.9
    assert shown.mean == pytest.approx(2 * shown.success - 1)
    assert "success" in shown.line()


@pytest.mark.parametrize(
    ("env", "table", "named"),
    [
        ("tmaze", {"length": 30}, "--set model.memory_len=55"),
        ("CartPole-v1", {}, "--set model.input_dim=4 --set model.actions=2 --set model.memory_len=500"),
        (
            "CartPole-v1",
            {"steps": 10},
            "up to 10 steps an episode; train with --set model.input_dim=4 --set model.actions=2$",
        ),
        ("Pendulum-v1", {}, "Pendulum-v1 takes actions Box.* --set data.levels=3"),
        ("Pendulum-v1", {"levels": 5}, "--set model.actions=5 --set model.memory_len=200$"),
        ("Pendulum-v1", {"levels": 1}, "levels=1 of Box.* are 1 actions, 2 levels or more"),
        ("Pendulum-v1", {"levels": 5000}, "are 5000 actions"),
        ("Pendulum-v1", {"levels": "many"}, "data.levels is 'many'"),
        ("CartPole-v1", {"levels": 3}, r"levels are for actions of bounded numbers \(Box\), not Discrete\(2\)"),
        ("Nothing-v0", {}, "no environment 'Nothing-v0'"),
        ("tmaze", {"lenght": 3}, r"^the environment tmaze cannot be made with the options \{'lenght': 3\}: "),
        ("CartPole-v1", {"lenght": 3}, "^the environment CartPole-v1 cannot be made"),
        ("tmaze", {"discount": 2.0}, "discount is 2.0"),
        ("tmaze", {"length": "long"}, "not 'long'"),
    ],
)
def test_an_environment_that_does_not_fit_is_named(env: str, table: dict[str, Any], named: str) -> None:
    with pytest.raises(TersorError, match=named) as caught:
        TASK.load_data(policy(), Path(env), None, table)
    assert "\n" not in str(caught.value)


def test_models_that_do_not_learn_by_acting_are_named(tmp_path: Path) -> None:
    pidt = tersor.models.create("pidt", state_dim=3, act_dim=3)
    with pytest.raises(TersorError, match="pidt does not learn by acting"):
        TASK.load_data(pidt, Path("tmaze"), None, {})
    (tmp_path / "what.json").write_text("{}")
    with pytest.raises(TersorError, match="does not say which environment"):
        TASK.predict(policy(), tmp_path / "what.json", settings={}, labels={}, out=None, reference=None)
    (tmp_path / "what.json").write_text('{"env": "antigravity:Maze-v0"}')
    with pytest.raises(TersorError, match=r"what\.json names the module of its environment, 'antigravity:Maze-v0'"):
        TASK.predict(policy(), tmp_path / "what.json", settings={}, labels={}, out=None, reference=None)
    with pytest.raises(TersorError, match="steps -1"):
        make_env(EnvConfig(steps=-1))


def test_states_of_kinds_other_than_vectors_are_flattened() -> None:
    """FrozenLake numbers its 16 states: one of them is 1."""
    env = make_env(EnvConfig(env="FrozenLake-v1"))
    played = play(policy(input_dim=16, actions=4), [env], steps=5, seed=0)
    assert played.states.shape[2] == 16
    real: Tensor = played.states[played.real()]
    assert np.array_equal(real.sum(-1).numpy(), np.ones(len(real)))


def test_numbers_are_chosen_by_levels() -> None:
    from tersor.data.action_levels import ActionLevels

    class Arm(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(-1, 1, (1,))
        action_space = gymnasium.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 3], np.float32))

    env = ActionLevels(Arm(), levels=3)
    assert env.action_space == gymnasium.spaces.Discrete(9)
    assert [env.action(n).tolist() for n in (0, 1, 5, 8)] == [[-2, 0], [-2, 1.5], [0, 3], [2, 3]]
