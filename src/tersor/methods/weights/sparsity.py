"""What the pruning methods share: the pattern of zeros, the checks of its options, and which weights it removes.

Unstructured zeros may be anywhere; a pattern n:m keeps n of every m consecutive inputs, as hardware asks for (2:4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError

UNSTRUCTURED = "unstructured"
PATTERNS = {UNSTRUCTURED: None, "2:4": (2, 4), "4:8": (4, 8)}
SPARSITY_HELP = "share of the weights to remove; a pattern n:m removes half"
PATTERN_HELP = "unstructured, or 2:4 or 4:8: so many weights stay of every 4 or 8 consecutive inputs"
HALF = 0.5  # what 2:4 and 4:8 remove


def is_sparsity(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def check_pattern(sparsity: float, pattern: str) -> None:
    """Raise TersorError where a share does not go with a pattern."""
    if pattern != UNSTRUCTURED and sparsity != HALF:
        raise TersorError(
            f"sparsity={sparsity:g} does not go with pattern {pattern}, which removes half: leave sparsity out, or use "
            f"pattern {UNSTRUCTURED}"
        )


def check_removes(sparsity: float) -> None:
    if sparsity == 0:
        raise TersorError("sparsity=0 removes nothing: give a share between 0 and 1")


def check_width(name: str, in_features: int, pattern: str) -> None:
    """Raise TersorError where a layer's inputs are no whole groups of the pattern."""
    kept = PATTERNS[pattern]
    if kept is not None and in_features % kept[1]:
        raise TersorError(
            f"{name} has {in_features} inputs, which pattern {pattern} does not divide; use --pattern {UNSTRUCTURED}, or "
            f"--exclude '{name}'"
        )


@dataclass(frozen=True)
class Pruner:
    """Chooses the weights with the lowest scores, exactly as many as asked for."""

    sparsity: float
    pattern: str = UNSTRUCTURED

    def step(self, width: int) -> int:
        """How many columns of a block of `width` are chosen from together."""
        kept = PATTERNS[self.pattern]
        return width if kept is None else kept[1]

    def removed(self, scores: Tensor, first: int = 0) -> Tensor:
        """Which weights go, bool [rows, n]. scores [rows, n]: of the n columns from `first` on, in whole groups of a pattern.

        Unstructured: from all rows together, such that of the columns up to each call's last the asked share is removed.
        """
        kept, (rows, columns) = PATTERNS[self.pattern], scores.shape
        if kept is not None:
            groups = scores.reshape(rows, -1, kept[1])
            return lowest(groups, kept[1] - kept[0]).reshape(rows, columns)
        count = round(self.sparsity * rows * (first + columns)) - round(self.sparsity * rows * first)
        return lowest(scores.flatten(), count).view(rows, columns)


def lowest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` lowest along the last axis; of equal ones the first."""
    chosen = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def zeros_in(weight: Tensor) -> float:
    """The share of zeros."""
    return 1 - int(weight.count_nonzero()) / weight.numel()
