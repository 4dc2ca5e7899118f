"""The recipes that are considered: every method says its own, for models of a kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tersor.advise.plans import Recipe, name_of
from tersor.methods.method import Method, methods


@dataclass(frozen=True)
class Candidate:
    """A recipe that a method offers."""

    recipe: Recipe
    steps: tuple[Method, ...]
    needs: str  # none, calibration or training

    @property
    def name(self) -> str:
        return name_of(self.recipe)


def candidates_for(kind: str, *, calibration: bool, training: bool) -> list[Candidate]:
    """The candidates in order of name. calibration, training: whether recipes that need these are wanted. The command line
    cannot make samples of tables, so there are no recipes that calibrate for series."""
    allowed = {
        "none",
        *(["calibration"] if calibration and kind != "series" else []),
        *(["training"] if training else []),
    }
    found: dict[str, Candidate] = {}
    for method in methods().values():
        for steps in method.recipes(kind):
            recipe: Recipe = tuple(step.options() for step in steps)
            candidate = Candidate(recipe, tuple(steps), needs_of(steps))
            if candidate.needs in allowed:
                found[candidate.name] = candidate
    return [found[name] for name in sorted(found)]


def needs_of(steps: Sequence[Method]) -> str:
    if any(step.trains for step in steps):
        return "training"
    return "calibration" if any(step.needs_samples for step in steps) else "none"
