"""What the pruning methods share: options, checks, and the choice of the weights to remove.

Unstructured zeros may be anywhere; a pattern n:m keeps n of every m consecutive inputs, as hardware asks for (2:4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.layout import Layout
from tersor.methods.method import BlockMethod, option

UNSTRUCTURED = "unstructured"
PATTERNS = {UNSTRUCTURED: None, "2:4": (2, 4), "4:8": (4, 8)}
SPARSITY_HELP = "share of the weights to remove; a pattern n:m removes half"
HALF = 0.5  # what 2:4 and 4:8 remove


def is_sparsity(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


@dataclass(frozen=True)
class Pruner:
    """Chooses the weights with the lowest scores, exactly as many as asked for."""

    sparsity: float
    pattern: str = UNSTRUCTURED

    def step(self, width: int) -> int:
        """How many columns of a block of `width` a choice covers."""
        kept = PATTERNS[self.pattern]
        return width if kept is None else kept[1]

    def removed(self, scores: Tensor, first: int = 0) -> Tensor:
        """Which weights go, bool [rows, n]. scores [rows, n]: of the n columns from `first` on; with a pattern, whole groups.

        Unstructured, all rows are chosen from together, so many that the asked share of all columns so far is removed.
        """
        kept, (rows, columns) = PATTERNS[self.pattern], scores.shape
        if kept is not None:
            groups = scores.reshape(rows, -1, kept[1])
            return lowest(groups, kept[1] - kept[0]).reshape(rows, columns)
        count = round(self.sparsity * rows * (first + columns)) - round(self.sparsity * rows * first)
        return lowest(scores.flatten(), count).view(rows, columns)


@dataclass(frozen=True)
class Pruning(BlockMethod):
    """A method that makes weights zero."""

    sparsity: float = option(HALF, SPARSITY_HELP, check=lambda v: is_sparsity(v) and v > 0, allowed="above 0, below 1")
    pattern: str = option(
        UNSTRUCTURED,
        "unstructured, or 2:4 or 4:8: so many weights stay of every 4 or 8 consecutive inputs",
        choices=PATTERNS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern != UNSTRUCTURED and self.sparsity != HALF:
            raise TersorError(
                f"sparsity={self.sparsity:g} does not go with pattern {self.pattern}, which removes half: leave sparsity out, "
                f"or use pattern {UNSTRUCTURED}"
            )

    @property
    def layouts(self) -> tuple[str, ...]:
        return ("safetensors",)

    @property
    def pruner(self) -> Pruner:
        return Pruner(self.sparsity, self.pattern)

    def check_linear(self, name: str, out_features: int, in_features: int, layout: Layout | None) -> None:
        kept = PATTERNS[self.pattern]
        if kept is not None and in_features % kept[1]:
            raise TersorError(
                f"{name} has {in_features} inputs, which pattern {self.pattern} does not divide; use --pattern {UNSTRUCTURED}, "
                f"or --exclude '{name}'"
            )


def lowest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` lowest along the last axis; of equal ones the first."""
    chosen = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def zeros_in(weight: Tensor) -> float:
    """The share of zeros."""
    return 1 - int(weight.count_nonzero()) / weight.numel()
