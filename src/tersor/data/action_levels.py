"""A gymnasium environment whose actions are numbers, for policies that choose one of a number of actions.

    env = ActionLevels(gymnasium.make("Hopper-v5"), levels=3)       # 3 numbers of 3 levels: Discrete(27)

Each number takes one of `levels` evenly spaced values from its lowest to its highest; an action is one choice for each of them.
The number of actions grows as levels^n: for bodies with few joints.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from tersor.errors import TersorError

_MOST_ACTIONS = 4096


class ActionLevels(gymnasium.ActionWrapper[Any, np.int64, Any]):
    """Raises TersorError where the actions are not bounded numbers, or their levels too many actions."""

    def __init__(self, env: Any, levels: int) -> None:
        super().__init__(env)
        space = env.action_space
        if not isinstance(space, Box) or not space.is_bounded():
            raise TersorError(f"levels are for actions of bounded numbers (Box), not {space}; leave them out")
        count = levels ** int(np.prod(space.shape))
        if levels < 2 or count > _MOST_ACTIONS:
            raise TersorError(
                f"levels={levels} of {space} are {count} actions, 2 levels or more and {_MOST_ACTIONS} are taken"
            )
        self.box, self.levels = space, levels
        self.action_space = Discrete(count)

    def action(self, action: np.int64) -> NDArray[Any]:
        size = int(np.prod(self.box.shape))
        place = np.array(np.unravel_index(int(action), (self.levels,) * size)) / (self.levels - 1)  # 0 to 1
        low, high = self.box.low, self.box.high
        found: NDArray[Any] = (low + place.reshape(self.box.shape) * (high - low)).astype(self.box.dtype)
        return found
