"""A T-maze, which asks for memory: the cue is seen in the first step, and needed at the end of a corridor.

    env = TMaze(length=20)                    # a gymnasium environment: the extra `control`
    state, _ = env.reset(seed=0)              # [-1 or 1, 1, 0], later [0, 1, 0], at the junction [0, 0, 1]
    state, reward, ended, cut, info = env.step(FORWARD)

State: (the cue, in the corridor, at the junction). Actions: forward, left, right. After `length` steps forward comes the
junction, where left and right end the episode: the side of the cue (-1 left, 1 right) gives 1, the other -1. Forward at the
junction and turns in the corridor change nothing and cost 0.3 / length. An episode is cut after 3 length / 2 + 10 steps.
info["success"] says at the end whether the turn was right; without memory it is in half of the episodes. (After Bakker, NeurIPS
2001, whose maze has four actions.)
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from tersor.errors import TersorError

FORWARD, LEFT, RIGHT = range(3)
Floats = NDArray[np.float32]


class TMaze(gymnasium.Env[Floats, np.int64]):  # type: ignore[misc]  # gymnasium is optional
    def __init__(self, *, length: int = 20) -> None:
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= 100_000:
            raise TersorError(f"the corridor of a T-maze has 1 to 100000 steps, not {length!r}")
        self.length, self.most_steps = length, 3 * length // 2 + 10
        self.observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(3)
        self._place = self._taken = self._cue = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        super().reset(seed=seed)
        self._place = self._taken = 0
        self._cue = 1 if self.np_random.integers(2) else -1
        return self._state(self._cue), {}

    def step(self, action: np.int64) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        self._taken += 1
        at_junction = self._place == self.length
        if at_junction and action != FORWARD:
            right = (action == RIGHT) == (self._cue == 1)
            return self._state(0), 1.0 if right else -1.0, True, False, {"success": right}
        cut, reward = self._taken >= self.most_steps, 0.0
        if at_junction or action != FORWARD:
            reward = -0.3 / self.length
        else:
            self._place += 1
        return self._state(0), reward, False, cut, {"success": False} if cut else {}

    def _state(self, cue: int) -> Floats:
        at_junction = self._place == self.length
        return np.array([cue, not at_junction, at_junction], np.float32)
