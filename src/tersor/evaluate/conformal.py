"""Intervals by split conformal prediction: how far a forecaster was off on windows that it had not learned from.

    radii = interval_radii(errors, [80, 95])        # |y - forecast| (W, H, N) -> (2, H, N)
    coverage(errors_elsewhere, radii)               # [0.81, 0.94]

For W calibration windows the radius of a step and column is their ceil((W + 1) level)-th smallest error (Lei et al., JASA
2018; split conformal). If the next window is exchangeable with these, the interval covers at least that share. Windows of a
series overlap and drift, so the share is measured on later windows and told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.errors import TersorError

LEVELS = (80.0, 95.0)


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """The levels in rising order. Raises TersorError where one is no share in percent."""
    for level in levels:
        if not 0 < level < 100:
            raise TersorError(f"an interval of {level:g} % is none; levels lie between 0 and 100, such as 80,95")
    return tuple(sorted(set(levels)))


def windows_needed(level: float) -> int:
    """The fewest calibration windows that give an interval of so many percent: 4 for 80, 19 for 95."""
    return math.ceil(level / (100 - level) - 1e-9)


def interval_radii(errors: Tensor, levels: Sequence[float]) -> Tensor:
    """errors: absolute, (W, H, N). Returns (levels, H, N). Raises TersorError where W windows are too few for a level."""
    W = len(errors)
    for level in levels:
        if _rank(W, level) > W:
            raise TersorError(
                f"an interval of {level:g} % needs {windows_needed(level)} windows to calibrate on, there are {W}"
            )
    ordered = errors.sort(0).values
    return torch.stack([ordered[_rank(W, level) - 1] for level in levels])


def coverage(errors: Tensor, radii: Tensor) -> list[float]:
    """The share of the absolute errors (W, H, N) within each level's radii (levels, H, N)."""
    return [float((errors <= radius).double().mean()) for radius in radii]


def _rank(W: int, level: float) -> int:
    return max(1, math.ceil((W + 1) * level / 100 - 1e-9))
