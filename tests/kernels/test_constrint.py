"""ConstrINT against a search that tries everything."""

from __future__ import annotations

from itertools import product

import pytest

from tersor.errors import TersorError
from tersor.kernels.constrint import Domain, ValueHeuristic, ValueRefinement, parse_expression, propagated
from tersor.kernels.constrint import solve_constrint as solve

PROBLEMS = {
    "A * B == 12; A + B <= 8;": lambda A, B: A * B == 12 and A + B <= 8,
    "A ^ 2 + B ^ 2 == 25;": lambda A, B: A**2 + B**2 == 25,
    "A % B == 0; B % 3 == 0; A <= 20;": lambda A, B: A % B == 0 and B % 3 == 0 and A <= 20,
    "A == 2 * B | A + 3 == B; B == [2, 5, 7]": lambda A, B: (A == 2 * B or A + 3 == B) and B in (2, 5, 7),
    "60 % A * B == 0; B <= A": lambda A, B: 60 % (A * B) == 0 and B <= A,
    "A + B == B + 3 * A; # never": lambda A, B: False,
}


@pytest.mark.parametrize("text", list(PROBLEMS))
@pytest.mark.parametrize("largest", [False, True])
def test_finds_all_solutions_in_order(text: str, largest: bool) -> None:
    constraint, variables = parse_expression(f"{text.partition('#')[0].rstrip().rstrip(';')}; A <= 40; B <= 40;")
    numbers = range(40, 0, -1) if largest else range(1, 41)
    expected = [{"A": A, "B": B} for A, B in product(numbers, numbers) if PROBLEMS[text](A, B)]
    heuristic = ValueHeuristic.LARGEST_FIRST if largest else ValueHeuristic.SMALLEST_FIRST
    order = [ValueRefinement("A", heuristic), ValueRefinement("B", heuristic)]
    assert list(solve(constraint, variables, order, num_solutions=2000)) == expected
    assert list(solve(constraint, variables, order, exclude_solutions=expected[:2])) == expected[2:3]


def test_brackets_are_left_out_and_comments_too() -> None:
    constraint, _ = parse_expression("(A + 2) * 3 == 9; # (A + 2) * 3\nB <= 4 | B == A ^ 2")
    assert str(constraint) == "A + 2 * 3 == 9;\nB <= 4 | B == A ^ 2;"


def test_large_ranges_stay_intervals_with_their_factor() -> None:
    constraint, variables = parse_expression("X % 48 == 0; X <= Y; Y <= 100000000; Y % 36 == 0")
    left = propagated(constraint, variables)
    assert left["X"] == Domain(48, 99_999_936, 48)
    assert left["Y"] == Domain(72, 100_000_000 // 36 * 36, 36)
    assert solve(constraint, variables, [ValueRefinement("X", ValueHeuristic.LARGEST_FIRST)]) == ({"X": 99_999_936},)


def test_variables_beside_the_order_may_stay_open() -> None:
    constraint, variables = parse_expression("A * C <= 10; A == [2, 3]")
    assert solve(constraint, variables, [ValueRefinement("A")], num_solutions=9) == ({"A": 2}, {"A": 3})


def test_what_cannot_be_read_is_refused() -> None:
    for text, match in (
        ("A >= 2", "none of"),
        ("A % 3 == 1", "none of"),
        ("A == 0", "counts from 1"),
        ("A == B2", "neither"),
        ("A ^ B == 4", "exponent"),
    ):
        with pytest.raises(TersorError, match=match):
            parse_expression(text)
    with pytest.raises(TersorError, match="no variable 'C'"):
        solve(*parse_expression("A == 1"), [ValueRefinement("C")])
