"""The multiple-choice knapsack, solved exactly: one option for each item, at the least cost within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def choose(items: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int] | None:
    """The index of the option to take of each item: the sum of sizes is at most `budget`, and the sum of costs is the least
    possible. None where even the smallest options do not fit. items: the options of each, as (size, cost).

    Dynamic programming over sizes, item by item. Of all sums of sizes that can be reached, those stay that cost less than every
    smaller sum. Where layers repeat, there are few different sums. Raises ValueError for a cost that is NaN.
    """
    if any(math.isnan(cost) for options in items for _, cost in options):
        raise ValueError("a cost is NaN")
    sizes, costs = np.zeros(1, dtype=np.int64), np.zeros(1)
    least = [min(size for size, _ in options) for options in items]
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # for every sum that is kept: the sum it came from, and the option
    left = budget - sum(least)
    if left < 0:
        return None
    for options, smallest in zip(items, least, strict=True):
        # Sizes are counted from the smallest option, so a sum over the budget now stays over it.
        new = np.concatenate([sizes + (size - smallest) for size, _ in options])
        worth = np.concatenate([costs + cost for _, cost in options])
        origin = np.tile(np.arange(len(sizes)), len(options))
        option = np.repeat(np.arange(len(options)), len(sizes))
        order = np.lexsort((worth, new))
        order = order[new[order] <= left]
        best = np.minimum.accumulate(worth[order])
        better = np.concatenate([[True], worth[order][1:] < best[:-1]])
        order = order[better]
        sizes, costs = new[order], worth[order]
        steps.append((origin[order], option[order]))
    at, found = int(np.argmin(costs)), []
    for origin, option in reversed(steps):
        found.append(int(option[at]))
        at = int(origin[at])
    return found[::-1]
