"""Checks of a model's config. Each raises an OptionError that names the model, the option and its value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tersor.errors import OptionError


def one_of(model: str, name: str, value: Any, known: Iterable[Any]) -> None:
    """`value` is one of `known`."""
    choices = list(known)
    if value not in choices:
        raise OptionError(f"{model}'s {name} is one of {', '.join(map(repr, choices))}, not {value!r}")


def divides(model: str, divisor: str, by: int, name: str, value: int) -> None:
    """`value` (the option `name`) is a positive multiple of `by` (the option `divisor`)."""
    if by < 1 or value < 1 or value % by:
        raise OptionError(f"{model}'s {name} {value} is not a multiple of {divisor} {by}")


def at_least(model: str, least: float, **options: float) -> None:
    """Every option is a number and not below `least`."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            raise OptionError(f"{model} needs {name} of at least {least}, not {value!r}")


def same_length(model: str, **options: tuple[Any, ...]) -> None:
    """Options with one entry per stage have the same number of entries."""
    if len({len(value) for value in options.values()}) > 1:
        told = ", ".join(f"{name} has {len(value)}" for name, value in options.items())
        raise OptionError(f"{model} needs one entry a stage in each of these: {told}")
