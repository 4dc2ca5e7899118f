"""What a user can spend: bytes, time and quality, as written on the command line, and which of them rules plans out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from tersor.advise.plans import Plan
from tersor.errors import TersorError

BYTES = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
SPEEDS = {"tok/s": 1.0, "tokens/s": 1.0, "/s": 1.0, "": 1.0}
NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z/%]*)\s*")


@dataclass(frozen=True)
class Budget:
    """Hard limits; None where there is none. The names are those of a plan's figures.

    memory, disk: bytes; loss: the relative rise of perplexity or of the error, or the share of pictures lost; latency: seconds
    a token, picture or window.
    """

    memory: float | None = None
    disk: float | None = None
    loss: float | None = None
    latency: float | None = None

    def limits(self) -> dict[str, float]:
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}

    def allows(self, plan: Plan, *, hopeful: bool = False) -> bool:
        """Whether a plan keeps every limit: measured figures as they are, predicted ones at the bad end of their interval.
        hopeful: at the good end, for a plan that a measurement could still prove to fit."""
        return all(self.keeps(name, plan, hopeful=hopeful) for name in self.limits())

    def expects(self, plan: Plan) -> bool:
        """Whether a plan keeps every limit by its figures' values, intervals aside."""
        limits = self.limits()
        return all((each := plan.figure(name)) is not None and each.value <= limits[name] for name in limits)

    def keeps(self, name: str, plan: Plan, *, hopeful: bool = False) -> bool:
        figure = plan.figure(name)
        if figure is None:
            return hopeful
        return (figure.low if hopeful else figure.bound) <= self.limits()[name]


def binding(budget: Budget, plans: Sequence[Plan]) -> str:
    """Which limit leaves no plan, with the best that any plan reaches."""
    limits = budget.limits()

    def without(name: str) -> Budget:
        return Budget(**{key: value for key, value in limits.items() if key != name})

    alone = [name for name in limits if not any(Budget(**{name: limits[name]}).allows(plan) for plan in plans)]
    found = alone or [name for name in limits if any(without(name).allows(plan) for plan in plans)] or list(limits)
    return "; ".join(_best(name, limits[name], plans) for name in found)


def _best(name: str, limit: float, plans: Sequence[Plan]) -> str:
    known = [(figure.bound, plan.name, figure.source) for plan in plans if (figure := plan.figure(name)) is not None]
    if not known:
        return f"{OPTIONS[name]} {shown(name, limit)}: nothing was measured that says it"
    value, plan, source = min(known)
    told = f"{plan}: {source}" if source else plan
    return f"{OPTIONS[name]} {shown(name, limit)} binds: the least is {shown(name, value)} ({told})"


OPTIONS = {"memory": "--memory", "disk": "--disk", "loss": "--max-loss", "latency": "--max-latency or --min-speed"}


def shown(name: str, value: float) -> str:
    """A figure for people."""
    if name in ("memory", "disk"):
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.2f} MB"
    if name == "loss":
        return f"{100 * value:.2f} %"
    return f"{1e3 * value:.3g} ms"


def parse_bytes(text: str, option: str) -> float:
    return _parsed(text, option, BYTES, "6GB or 500MB")


def parse_seconds(text: str, option: str) -> float:
    return _parsed(text, option, SECONDS, "50ms, 10m or 1h")


def parse_share(text: str, option: str) -> float:
    share = _parsed(text, option, {"%": 0.01, "": 1.0}, "1% or 0.01", zero=True)
    if share >= 1 and "%" not in text:
        bare = text.strip()
        raise TersorError(f"{option} {bare} would be {100 * share:g} %; write {bare}% or {share / 100:g}")
    return share


def parse_speed(text: str, option: str) -> float:
    """Seconds a token, of tokens a second."""
    return 1 / _parsed(text, option, SPEEDS, "20tok/s")


def parse_training(text: str) -> tuple[bool, float]:
    """--training: whether calibration samples may be used, and seconds of training a method may take."""
    if text in ("none", "calibration"):
        return text == "calibration", 0.0
    try:
        return True, parse_seconds(text, "--training")
    except TersorError:
        raise TersorError(f"--training {text!r} is not none, calibration, or a time such as 1h") from None


def _parsed(text: str, option: str, units: dict[str, float], example: str, *, zero: bool = False) -> float:
    found = NUMBER.fullmatch(text)
    unit = found[2].lower() if found else None
    if found is None or unit not in units:
        raise TersorError(f"{option} {text!r} is not understood; write it as {example}")
    value = float(found[1]) * units[unit]
    if not math.isfinite(value) or (value == 0 and not zero):
        raise TersorError(f"{option} {text!r} must be more than 0, such as {example}")
    return value
