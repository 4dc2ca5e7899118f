"""Choosing actions in a gymnasium environment: trained by PPO (tersor.train.ppo), shown by the returns that it reaches.

An environment is a name, `tmaze` (tersor.data.memory_task) or one that gymnasium knows, or a JSON file, which predictions take:

    {"env": "tmaze", "episodes": 100, "seed": 1, "options": {"length": 40}}
    {"env": "Hopper-v5", "levels": 3}              actions that are numbers: tersor.data.action_levels
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tersor.errors import TersorError
from tersor.models.config import checked_config
from tersor.progress import Progress, silent
from tersor.tasks.task import Sets, Task
from tersor.train.ppo import Played, PPOConfig, Shown, play, proximal
from tersor.untrusted import read_json_object

TMAZE = "tmaze"
MOST_STEPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    env: str = TMAZE
    options: Mapping[str, Any] = field(default_factory=dict)  # of the environment
    steps: int = 0  # after which an episode is cut; 0: the environment's own limit
    levels: int = 0  # of each number, where actions are numbers; 0: they are not
    episodes: int = 100  # that are shown
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping):
            raise TersorError(f"the options of {self.env} are a table, not {self.options!r}")
        if not 0 <= self.steps <= MOST_STEPS or not 1 <= self.episodes <= MOST_STEPS or self.seed < 0:
            raise TersorError(
                f"{self.env}: steps {self.steps}, episodes {self.episodes}, seed {self.seed}; from 0, 1 and 0, "
                f"and at most {MOST_STEPS} steps and episodes"
            )


@dataclass(frozen=True)
class Returns:
    """What a policy reached in an environment."""

    path: Path
    env: str
    episodes: int
    mean: float
    spread: float  # standard deviation
    success: float | None  # share of the episodes; None where the environment does not tell

    def line(self) -> str:
        told = "" if self.success is None else f", success {100 * self.success:.1f}%"
        return f"{self.path}: {self.env}, return {self.mean:.3f} ± {self.spread:.3f} in {self.episodes} episodes{told}"

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"path": str(self.path)}


def make_env(config: EnvConfig) -> Any:
    """Raises TersorError where there is no such environment, or it does not take the options."""
    try:
        import gymnasium
    except ImportError:
        raise TersorError("environments need gymnasium; pip install 'tersor[control]'") from None
    try:
        if config.env == TMAZE:
            from tersor.data.memory_task import TMaze

            return TMaze(**config.options)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # what is out of date
            env = gymnasium.make(config.env, **config.options)
    except (gymnasium.error.DependencyNotInstalled, TypeError, ValueError, AttributeError) as error:
        options = f" with the options {dict(config.options)}" if config.options else ""
        raise TersorError(f"the environment {config.env} cannot be made{options}: {error}") from None
    except (gymnasium.error.Error, ImportError) as error:
        known = f"{TMAZE}, or a name that gymnasium knows, such as CartPole-v1"
        raise TersorError(f"there is no environment {config.env!r} ({error}); an environment is {known}") from None
    if not config.levels:
        return env
    from tersor.data.action_levels import ActionLevels

    return ActionLevels(env, config.levels)


def steps_of(config: EnvConfig, env: Any) -> int:
    """The most steps of an episode."""
    own = int(getattr(env.unwrapped, "most_steps", 0) or getattr(env.spec, "max_episode_steps", 0) or 0)
    if not (config.steps or own):
        raise TersorError(f"{config.env} does not end by itself; --set data.steps=200 cuts its episodes")
    return min(config.steps or own, own or config.steps)


def check_fits(model: Any, config: EnvConfig, env: Any) -> None:
    """Raise TersorError where the model cannot act in the environment, naming what is to be set."""
    from gymnasium.spaces import Box, Discrete, flatdim

    name = getattr(type(model), "system", type(model).__name__)
    if not hasattr(model, "stream") or not hasattr(model.config, "actions"):
        raise TersorError(
            f"{name} does not learn by acting, only gtrxl does; train {name} from Python, on recorded runs"
        )
    states, actions = env.observation_space, env.action_space
    if not isinstance(actions, Discrete):
        out = "; train with --set data.levels=3, levels of each number" if isinstance(actions, Box) else ""
        raise TersorError(
            f"{config.env} takes actions {actions}, {name} chooses one of a number of actions (Discrete){out}"
        )
    if actions.start != 0:
        raise TersorError(f"{config.env} counts its actions from {actions.start}, {name} from 0")
    try:
        width = flatdim(states)
    except (NotImplementedError, ValueError):
        raise TersorError(f"{config.env} has states {states}, {name} takes a fixed number of numbers") from None
    steps = steps_of(config, env)
    sizes = {"input_dim": width, "actions": int(actions.n)}
    wanted = [f"model.{key}={value}" for key, value in sizes.items() if getattr(model.config, key) != value]
    if model.config.memory_len < steps:
        wanted.append(f"model.memory_len={steps}")
    if wanted:
        raise TersorError(
            f"{config.env} has {width} numbers a state, {actions.n} actions and up to {steps} steps an episode; train with "
            f"{' '.join(f'--set {each}' for each in wanted)}"
        )


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    if validation is not None:
        raise TersorError("an environment is played anew for validation; leave --validation out")
    learning = {each.name for each in dataclasses.fields(PPOConfig)}
    recipe = checked_config(PPOConfig, {key: value for key, value in table.items() if key in learning}, "data")
    others = {key: value for key, value in table.items() if key not in learning}
    config = read_env(data) if data.suffix == ".json" else EnvConfig(env=str(data))
    own: dict[str, Any] = {key: others.pop(key) for key in ("steps", "levels") if key in others}
    checked_config(EnvConfig, own, "data")
    config = dataclasses.replace(config, seed=recipe.seed, **own, options={**config.options, **others})
    env = make_env(config)
    check_fits(model, config, env)
    steps = steps_of(config, env)
    make = lambda: make_env(config)  # noqa: E731
    learned = Played(model, make, steps=steps, config=recipe)
    often = Shown(model, make, steps=steps, episodes=32, seed=recipe.seed + 1)
    once = Shown(model, make, steps=steps, episodes=200, seed=recipe.seed + 2)
    said = {"env": config.env, "options": dict(config.options), "steps": config.steps, "levels": config.levels}
    return Sets(learned, often, once, preprocessing=said)


def read_env(path: Path) -> EnvConfig:
    described = read_json_object(path)
    if not isinstance(described.get("env"), str):
        raise TersorError(f'{path} does not say which environment it is, as {{"env": "tmaze"}}')
    if ":" in described["env"]:  # gymnasium would import what stands before it
        raise TersorError(
            f"{path} names the module of its environment, {described['env']!r}, and tersor imports none that a file names; "
            "give a name that gymnasium knows without it, such as CartPole-v1"
        )
    options = described.pop("options", {})
    return dataclasses.replace(checked_config(EnvConfig, described, str(path)), options=options)


def predict(
    module: nn.Module,
    path: Path,
    *,
    settings: Mapping[str, Any],
    labels: Mapping[int, str],
    out: Path | None,
    reference: Path | None,
    progress: Progress = silent,
) -> Returns:
    config = read_env(path)
    env = make_env(config)
    check_fits(module, config, env)
    envs = [env, *(make_env(config) for _ in range(config.episodes - 1))]
    played = play(module, envs, steps=steps_of(config, env), seed=config.seed, best=True)
    returns = played.returns()
    success = float(played.success.mean())
    return Returns(
        path,
        config.env,
        config.episodes,
        float(returns.mean()),
        float(returns.std(correction=0)),
        None if math.isnan(success) else success,
    )


TASK = Task(
    proximal,
    load_data,
    predict,
    frozenset({".json"}),
    normalises=False,
    defaults={"lr": 1e-3, "epochs": 200, "max_grad_norm": 0.5},
)
