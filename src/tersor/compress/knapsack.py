"""One option for each item, the least cost within a budget, exactly: the multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def choose(items: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int] | None:
    """Which option of each item to take, as its place in the item, so that the sum of sizes is at most `budget` and the sum of
    costs the least that can be; None where even the smallest do not fit. items: of each its options, (size, cost).

    Dynamic programming over sizes, item by item: of all sums that can be reached only those are kept that no smaller one beats
    in cost. Their number is bounded by that of different sums, which is small where layers repeat. Raises ValueError where a
    cost is NaN, which compares with nothing.
    """
    if any(math.isnan(cost) for options in items for _, cost in options):
        raise ValueError("a cost is NaN")
    sizes, costs = np.zeros(1, dtype=np.int64), np.zeros(1)
    least = [min(size for size, _ in options) for options in items]
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of every sum that is kept: the one it came from, and the option
    left = budget - sum(least)
    if left < 0:
        return None
    for options, smallest in zip(items, least, strict=True):
        # sizes above the smallest, so that a sum that is over the budget now is over it in the end
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
