"""Learning by acting: proximal policy optimisation of models with memory (PPO; Schulman et al., 2017, arXiv 1707.06347).

    played = Played(model, make_env, steps=40, config=PPOConfig())           # a data set that plays
    train(model, played, objective=proximal, out="run", config=TrainConfig(epochs=200, batch_size=32, max_grad_norm=0.5),
          validation=Shown(model, make_env, steps=40))

An epoch of the trainer is one turn of PPO: `Played.set_epoch` has the policy play whole episodes, and the epoch goes through
them `passes` times. So interruption, logs and the best weights are the trainer's. A run that was interrupted within an epoch
plays that epoch anew, by the weights it has then. Leave `ema` at 0: it is the weights that learn that play, in validation too.

The model is called on whole episodes, and step by step with `stream(x, memory) -> (y, memory)`, which are to agree: x
(T, B, states), y (T, B, actions + 1), the logits of the actions and the state's value V. With rho the probability of the action
taken, now over then, discount g and A the advantage by traces (GAE, arXiv 1506.02438) of r_t + g V_{t+1} - V_t, less its mean and
over its spread where it weighs the policy:

    loss = mean over steps of  -min(rho A, clip(rho, 1 - 0.2, 1 + 0.2) A) + 0.5 (V - (A + V_then))^2 - 0.01 entropy

An episode that was cut goes on from the value of its last state; one that ended does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.data.seeding import mixed_seed
from tersor.errors import TersorError
from tersor.train.objectives import Batch

CLIP, OF_VALUE, OF_ENTROPY = 0.2, 0.5, 0.01
MakeEnv = Callable[[], Any]  # a gymnasium environment with discrete actions


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    episodes: int = 32  # that are played an epoch
    passes: int = 4  # through the episodes of an epoch
    discount: float = 0.99
    trace: float = 0.95  # lambda of the advantages
    seed: int = 0  # of starts and of the actions that are drawn

    def __post_init__(self) -> None:
        for name in ("episodes", "passes"):
            if not 1 <= getattr(self, name) <= 1 << 20:
                raise TersorError(f"{name} is {getattr(self, name)}, at least 1 and at most {1 << 20} are played")
        for name in ("discount", "trace"):
            if not 0 <= getattr(self, name) <= 1:
                raise TersorError(f"{name} is {getattr(self, name)}, from 0 to 1")
        if self.seed < 0:
            raise TersorError(f"seed is {self.seed}, it must not be negative")


@dataclass(frozen=True)
class Episodes:
    """B episodes of at most T steps."""

    states: Tensor  # [T, B, n]; zeros after an episode's end
    actions: Tensor  # [T, B]
    logits: Tensor  # [T, B, actions], by which they were drawn
    rewards: Tensor  # [T, B]
    values: Tensor  # [T + 1, B], of the states, and of the one after the last
    lengths: Tensor  # [B]
    ended: Tensor  # [B]; False where the episode was cut
    success: Tensor  # [B]; what the environment says in info["success"], NaN where it does not

    def real(self) -> Tensor:
        """[T, B]: which steps belong to an episode."""
        return torch.arange(len(self.rewards))[:, None] < self.lengths

    def returns(self) -> Tensor:
        """[B], without discount."""
        return (self.rewards * self.real()).sum(0)


@torch.no_grad()
def play(model: Any, envs: Sequence[Any], *, steps: int, seed: int, best: bool = False) -> Episodes:
    """One episode of each environment, cut after `steps`; actions are drawn, or with `best` the likeliest is taken."""
    from gymnasium.spaces import flatten

    was_training = model.training
    model.eval()
    device, draw, count = next(model.parameters()).device, torch.Generator().manual_seed(seed), len(envs)
    space = envs[0].observation_space
    now = np.stack([flatten(space, env.reset(seed=mixed_seed(seed, n) % 2**31)[0]) for n, env in enumerate(envs)])
    alive, ended = np.ones(count, bool), np.zeros(count, bool)
    lengths, success = np.zeros(count, np.int64), np.full(count, np.nan, np.float32)
    kept: dict[str, list[Any]] = {name: [] for name in ("states", "actions", "logits", "rewards", "values")}
    memory = None
    while True:
        states = torch.from_numpy(now.astype(np.float32))
        y, memory = model.stream(states[None].to(device), memory)
        logits, values = y[0, :, :-1].float().cpu(), y[0, :, -1].float().cpu()
        kept["values"].append(values)
        if not alive.any():
            break
        chances = logits.softmax(-1)
        actions = chances.argmax(-1) if best else torch.multinomial(chances, 1, generator=draw)[:, 0]
        rewards = np.zeros(count, np.float32)
        lengths += alive
        before = alive.copy()
        for n in np.flatnonzero(before).tolist():
            state, rewards[n], ended[n], cut, info = envs[n].step(actions[n].item())
            now[n] = flatten(space, state)
            alive[n] = not (ended[n] or cut or lengths[n] >= steps)
            if not alive[n]:
                success[n] = info.get("success", np.nan)
        for name, value in (("states", states), ("actions", actions), ("logits", logits)):
            kept[name].append(value)
        kept["rewards"].append(torch.from_numpy(rewards))
        now[~alive & ~before] = 0  # the last state of an episode is valued once, in the next turn
    model.train(was_training)
    stacked = {name: torch.stack(each) for name, each in kept.items()}
    told = (torch.from_numpy(each) for each in (lengths, ended, success))
    return Episodes(*(stacked[name] for name in ("states", "actions", "logits", "rewards", "values")), *told)


def advantages(played: Episodes, *, discount: float, trace: float) -> Tensor:
    """[T, B]: sum over k of (discount trace)^k times the error of V at t + k; 0 after an episode's end."""
    real, total = played.real(), torch.zeros(played.rewards.shape[1])
    found = torch.zeros_like(played.rewards)
    for t in reversed(range(len(found))):
        ends = (t == played.lengths - 1) & played.ended
        error = played.rewards[t] + discount * played.values[t + 1] * ~ends - played.values[t]
        total = (error + discount * trace * total) * real[t]
        found[t] = total
    return found


class Played:
    """Item: an episode of this epoch. An epoch has each of them `passes` times."""

    def __init__(self, model: nn.Module, make_env: MakeEnv, *, steps: int, config: PPOConfig) -> None:
        self.model, self.steps, self.config = model, steps, config
        self.envs = [make_env() for _ in range(config.episodes)]
        self.batch: Batch = {}
        self.success = torch.zeros(0)  # of the episodes of this epoch

    def __len__(self) -> int:
        return self.config.passes * self.config.episodes

    def set_epoch(self, epoch: int) -> None:
        config = self.config
        played = play(self.model, self.envs, steps=self.steps, seed=mixed_seed(config.seed, epoch))
        self.success = played.success
        gained, real = advantages(played, discount=config.discount, trace=config.trace), played.real()
        chosen = played.logits.log_softmax(-1).gather(-1, played.actions[..., None])[..., 0]
        self.batch = {
            "x": played.states * real[..., None],
            "actions": played.actions,
            "chosen": chosen,
            "advantages": (gained - gained[real].mean()) / (gained[real].std(correction=0) + 1e-8),
            "wanted": gained + played.values[:-1],
            "real": real,
        }

    def __getitem__(self, index: int) -> int:
        return index % self.config.episodes

    def collate(self, numbers: list[int]) -> Batch:
        longest = int(self.batch["real"][:, numbers].sum(0).max())
        return {name: value[:longest, numbers] for name, value in self.batch.items()}


class Shown:
    """Item: an episode, played by the likeliest actions when it is asked for."""

    def __init__(self, model: nn.Module, make_env: MakeEnv, *, steps: int, episodes: int, seed: int = 0) -> None:
        self.model, self.steps, self.seed = model, steps, seed
        self.envs = [make_env() for _ in range(episodes)]
        self.validated_at_once = episodes

    def __len__(self) -> int:
        return len(self.envs)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, numbers: list[int]) -> Batch:
        envs = [self.envs[n] for n in numbers]
        played = play(self.model, envs, steps=self.steps, seed=mixed_seed(self.seed, 1, numbers[0]), best=True)
        told = {"return": played.returns()}
        return told if played.success.isnan().any() else told | {"success": played.success}


def proximal(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The loss of PPO on episodes of `Played`; of `Shown`, the mean return with its sign turned, and the share of successes."""
    if "return" in batch:
        told = {name: value.mean() for name, value in batch.items()}
        return {"loss": -told["return"], **told}
    y, real = model(batch["x"]), batch["real"]
    logits, values = y[..., :-1].float().log_softmax(-1)[real], y[..., -1].float()[real]
    chosen = logits.gather(-1, batch["actions"][real][:, None])[:, 0]
    ratio, gained = (chosen - batch["chosen"][real]).exp(), batch["advantages"][real]
    policy = -torch.minimum(ratio * gained, ratio.clamp(1 - CLIP, 1 + CLIP) * gained).mean()
    value = (values - batch["wanted"][real]).square().mean()
    entropy = -(logits.exp() * logits).sum(-1).mean()
    return {"loss": policy + OF_VALUE * value - OF_ENTROPY * entropy, "value": value, "entropy": entropy}
