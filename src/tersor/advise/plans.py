"""Plans: a recipe with what it costs and gives, each figure measured or predicted; their order and their frontier."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tersor.compress.settings import Settings, counting
from tersor.methods.method import Method, as_words, from_options, methods

Recipe = tuple[Mapping[str, Any], ...]  # the options of each step's method, `name` first; empty: the original
FIGURES = ("disk", "memory", "latency", "loss")


@dataclass(frozen=True)
class Figure:
    """A number with its interval."""

    value: float
    low: float
    high: float
    measured: bool
    source: str = ""  # what it comes from, in words
    evidence: str = ""  # the row that it was fitted from, if any

    @property
    def bound(self) -> float:
        """What a hard limit is compared with."""
        return self.value if self.measured else self.high


@dataclass(frozen=True)
class Plan:
    """A recipe with its figures; None where one is not known."""

    name: str
    recipe: Recipe
    disk: Figure | None = None  # bytes
    memory: Figure | None = None  # bytes
    latency: Figure | None = None  # seconds a token, picture or window
    loss: Figure | None = None  # see `Budget`
    agreement: float | None = None  # how often it answers as the original, in classes or tokens
    seconds: float | None = None  # that the compression took
    notes: tuple[str, ...] = field(default=())

    def figure(self, name: str) -> Figure | None:
        found: Figure | None = getattr(self, name)
        return found

    def values(self) -> tuple[float, ...] | None:
        """All figures, in the order of FIGURES; None where one is not known."""
        found = [each.value for name in FIGURES if (each := self.figure(name)) is not None]
        return tuple(found) if len(found) == len(FIGURES) else None

    @property
    def measured(self) -> bool:
        return all((each := self.figure(name)) is not None and each.measured for name in FIGURES)


def objective(plan: Plan, *, bounded_loss: bool, hopeful: bool = False) -> float:
    """The number by which plans are ordered: size times latency where the loss is bounded, else the loss.

    hopeful: by the good ends of the intervals. Infinite where a figure is not known (minus infinity where hopeful).
    """
    names = ("disk", "latency") if bounded_loss else ("loss",)
    found = [plan.figure(name) for name in names]
    if any(each is None for each in found):
        return -math.inf if hopeful else math.inf
    values = [each.low if hopeful else each.value for each in found if each is not None]
    return math.prod(values) if bounded_loss else values[0]


def ordered(plans: Sequence[Plan], *, bounded_loss: bool) -> list[Plan]:
    """The measured ones first, each group by its objective, then by size and name."""

    def key(plan: Plan) -> tuple[bool, float, float, str]:
        disk = plan.disk.value if plan.disk is not None else math.inf
        return (not plan.measured, objective(plan, bounded_loss=bounded_loss), disk, plan.name)

    return sorted(plans, key=key)


def frontier(plans: Sequence[Plan]) -> list[Plan]:
    """The plans that no other dominates: one with at most as much of every figure and less of one. Plans that lack a figure
    are left out."""
    points = {n: found for n, plan in enumerate(plans) if (found := plan.values()) is not None}
    return [plans[n] for n, point in points.items() if not any(_dominates(each, point) for each in points.values())]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return tuple(one) != tuple(other) and all(a <= b for a, b in zip(one, other, strict=True))


def reason(plan: Plan, plans: Sequence[Plan], *, bounded_loss: bool) -> str:
    """Why a plan stands where it stands, in words."""
    wanted = "the least size times latency" if bounded_loss else "the least loss"
    if plans and plan is plans[0]:
        return f"{wanted} of those that keep the budget"
    mine = plan.values()
    if mine is None:
        return "not all is known of it"
    known = {other.name: found for other in plans if (found := other.values()) is not None}
    for name, theirs in known.items():
        if _dominates(theirs, mine):
            return f"{name} is as good or better in everything"
    words = (
        ("smallest on disk", "as small on disk as any"),
        ("least memory", "as little memory as any"),
        ("fastest", "as fast as any"),
        ("least loss", "as little loss as any"),
    )
    least = []
    for n, (alone, shared) in enumerate(words):
        values = sorted(each[n] for each in known.values())
        if mine[n] == values[0]:
            least.append(shared if values[1:2] == values[:1] else alone)
    return ", ".join(least) or "between the others: no plan is better in everything"


def name_of(recipe: Recipe) -> str:
    """Short and unique for what differs from the defaults, such as `gptq bits=3 group_size=64`."""
    if not recipe:
        return "original"
    return " + ".join(
        " ".join([str(step["name"]), *(f"{k}={_word(v)}" for k, v in _given(step).items())]) for step in recipe
    )


def _given(step: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the method's defaults, and always its bits, where it has any."""
    defaults = from_options(step["name"], {}).options()
    always = [each for each in ("bits", "w_bits", "a_bits") if step.get(each) is not None]
    return {k: v for k, v in step.items() if k != "name" and (k in always or v != defaults[k])}


def _word(value: Any) -> str:
    return "yes" if value is True else "no" if value is False else str(value)


def command(plan: Plan, model: str, settings: Mapping[str, Any], *, recipe_file: str | None, out: str) -> str:
    """The command line that makes it, for a shell. recipe_file: that holds this plan's recipe; of several steps, one is written
    first where there is none."""
    if not plan.recipe:
        return ""
    if len(plan.recipe) > 1 and recipe_file is not None:
        return recipe_command(plan.recipe, model, settings, recipe_file=recipe_file, out=out)
    if len(plan.recipe) > 1:
        written = shlex.quote(json.dumps(recipe_content(plan.recipe)))  # JSON is YAML
        command = recipe_command(plan.recipe, model, settings, recipe_file="plan.yaml", out=out)
        return f"echo {written} > plan.yaml && {command}"
    (step,) = plan.recipe
    fields = methods()[step["name"]].__dataclass_fields__
    options = [word for key, value in _given(step).items() for word in as_words(fields[key], value)]
    words = ["tersor", "compress", step["name"], model, *options, *_flags(plan.recipe, settings), "--out", out]
    return shlex.join(words)


def recipe_command(recipe: Recipe, model: str, settings: Mapping[str, Any], *, recipe_file: str, out: str) -> str:
    """The command line that makes what a recipe file says, with the settings that it was measured with."""
    words = ["tersor", "compress", "recipe", recipe_file, model, *_flags(recipe, settings), "--out", out]
    return shlex.join(words)


def methods_of(recipe: Recipe) -> list[Method]:
    return [from_options(step["name"], {k: v for k, v in step.items() if k != "name"}) for step in recipe]


def _flags(recipe: Recipe, settings: Mapping[str, Any]) -> list[str]:
    """Of the settings, those that count for the recipe, as options."""
    fields = Settings.__dataclass_fields__
    found = counting(settings, methods_of(recipe))
    return [word for key, value in found.items() for word in as_words(fields[key], value)]


def recipe_content(recipe: Recipe) -> dict[str, Any]:
    """What a recipe file says, for `tersor compress recipe`."""
    steps = [{"method": step["name"], **_given(step)} for step in recipe]
    return steps[0] if len(steps) == 1 else {"steps": steps}
