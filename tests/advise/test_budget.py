"""Budgets as people write them, and what they let through."""

from __future__ import annotations

import itertools

import pytest

from tersor.advise.budget import (
    Budget,
    binding,
    parse_bytes,
    parse_seconds,
    parse_share,
    parse_speed,
    parse_training,
)
from tersor.advise.plans import FIGURES, Figure, Plan, frontier, objective, ordered
from tersor.errors import TersorError


def plan(name: str, disk: float, memory: float, latency: float, loss: float, *, spread: float = 0.0) -> Plan:
    """Measured where there is no spread, else predicted."""

    def figure(value: float) -> Figure:
        return Figure(value, value * (1 - spread), value * (1 + spread), spread == 0)

    return Plan(name, ({"name": name},), figure(disk), figure(memory), figure(latency), figure(loss))


PLANS = [
    plan("a", 4, 8, 3, 0.01),
    plan("b", 3, 7, 2, 0.04),
    plan("c", 2, 6, 4, 0.2),
    plan("d", 5, 9, 4, 0.3),
    plan("e", 2, 6, 1, 0.1, spread=0.5),
]


def test_sizes_times_and_shares() -> None:
    assert parse_bytes("6GB", "--memory") == 6e9
    assert parse_bytes("500 mb", "--disk") == 5e8
    assert parse_bytes("1GiB", "--disk") == 2**30
    assert parse_seconds("50ms", "--max-latency") == pytest.approx(0.05)
    assert parse_seconds("10m", "--time-limit") == 600
    assert parse_share("1%", "--max-loss") == pytest.approx(0.01)
    assert parse_share("0", "--max-loss") == 0
    assert parse_speed("20tok/s", "--min-speed") == 0.05
    assert parse_training("1h") == (True, 3600)
    assert parse_training("none") == (False, 0)


@pytest.mark.parametrize("text", ["6XB", "", "-1GB", "GB", "0", "1e99999GB"])
def test_a_size_that_is_none_is_named(text: str) -> None:
    with pytest.raises(TersorError, match="--memory"):
        parse_bytes(text, "--memory")


def test_a_share_without_a_percent_sign_is_below_1() -> None:
    with pytest.raises(TersorError, match=r"--max-loss 5 would be 500 %; write 5% or 0\.05"):
        parse_share("5", "--max-loss")
    assert parse_share("150%", "--max-loss") == pytest.approx(1.5)
    assert parse_share("0.99", "--max-loss") == 0.99


def test_relaxing_a_budget_removes_no_plan() -> None:
    steps = {"disk": (2, 3, 9), "memory": (6, 8, 10), "latency": (1, 2, 9), "loss": (0.02, 0.15, 1)}
    for values in itertools.product(*steps.values()):
        budget = dict(zip(steps, map(float, values), strict=True))
        kept = {each.name for each in PLANS if Budget(**budget).allows(each)}
        for name in budget:
            looser = {key: value for key, value in budget.items() if key != name}
            for relaxed in (Budget(**looser), Budget(**looser, **{name: budget[name] * 1.5})):
                assert kept <= {each.name for each in PLANS if relaxed.allows(each)}


def test_a_predicted_figure_is_held_against_the_bad_end_of_its_interval() -> None:
    assert not Budget(disk=2.5).allows(PLANS[4])
    assert Budget(disk=2.5).allows(PLANS[4], hopeful=True)
    assert Budget(disk=3).allows(PLANS[4])
    assert not Budget(loss=0.5).allows(Plan("unknown", ()))


def test_the_frontier_holds_no_dominated_plan() -> None:
    front = frontier(PLANS)
    values = [tuple(each.figure(name).value for name in FIGURES) for each in front]  # type: ignore[union-attr]
    for one, other in itertools.permutations(values, 2):
        assert not all(a <= b for a, b in zip(one, other, strict=True))
    assert [each.name for each in front] == ["a", "b", "e"]


def test_the_order_follows_what_is_not_limited() -> None:
    assert ordered(PLANS, bounded_loss=False)[0].name == "a"  # the least loss
    assert ordered(PLANS, bounded_loss=True)[0].name == "b"  # 3 x 2, the least of those measured
    assert ordered(PLANS, bounded_loss=True)[-1].name == "e"  # predicted
    assert objective(Plan("unknown", ()), bounded_loss=True) == float("inf")


def test_what_binds_is_named_with_the_best_that_is_reached() -> None:
    assert "--disk 1.00 MB binds: the least is" in binding(Budget(disk=1e6, loss=1), [plan("x", 2e6, 1, 1, 0.5)])
    both = binding(Budget(disk=2, loss=0.05), [plan("x", 1, 1, 1, 0.5), plan("y", 3, 1, 1, 0.01)])
    assert "--disk" in both  # each can be kept, not both
    assert "--max-loss" in both
