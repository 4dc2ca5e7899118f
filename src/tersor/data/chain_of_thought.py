"""Four problems with their chains of thought (Feng et al., NeurIPS 2023, arXiv 2305.15408), made by rule.

    samples = make_chains("arithmetic", 1000, length=4, seed=2023)                   # ids (1000, L), padded with 0
    targets = chain_targets("arithmetic", samples)                                   # (1000, L - 1), 0: no loss

A sample is question, separator, steps, separator, answer, <eos>; with chain=False question, separator, answer, <eos>.

arithmetic     4 + 2 * 3 = 4 + 6 = 10          `length` operators over the field of 11, one replaced a step
equation       a + 2 b = 3 , ... <sep> a = 8 , b = 1    `length` unknowns mod 11, one Gauss-Jordan column a step
lis            7 3 9 <sep> 1 1 2 <sep> 2       longest strictly increasing subsequence of `length` numbers; the steps are
               the lengths of those that end at each place
edit_distance  a b | b c c <sep> 3 ... , <sep> 4    insert 2, delete 2, replace 3; the steps are the table's rows

Quirks kept: the edit table's border counts 1 a letter, not 2; div(0, 0) is 10 and a/0 is 0 in the division table, which
no sample needs; leading coefficients of solved columns are dropped where 0 and left out where 1, the others are written
even then. Loss is on the steps and <eos>. Of a direct answer it is on the first token alone, but for equations, whose
answer is a line.

Rules: guyuntian/CoT_benchmark at 650a246 (MIT); a seed draws what it draws there, in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tersor.errors import TersorError

PRIME = 11
PADDING, EOS = 0, 2
INSERT, DELETE, REPLACE = 2, 2, 3
LIS_NUMBERS = 250  # numbers are length + 1 to 249
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Words = list[str]


class Chance:
    """Both generators that the published scripts draw from, of one seed."""

    def __init__(self, seed: int) -> None:
        self.python, self.numpy = random.Random(seed), np.random.RandomState(seed)


@dataclass(frozen=True)
class Task:
    words: tuple[str, ...]  # word of each id
    separator: str  # between question, steps and answer
    draw: Callable[[Chance, int], Words]  # (chance, length) -> a whole chain without <eos>
    lengths: range

    def ids(self, words: Iterable[str]) -> list[int]:
        return [self.words.index(word) for word in words]


def make_chains(
    task: str,
    count: int,
    *,
    length: int,
    chain: bool = True,
    shorter: bool = False,
    seed: int = 2023,
    without: Iterable[Words] = (),
) -> Tensor:
    """ids (count, L), int64, padded with 0 on the right, no two alike.

    shorter: also mix in problems of length 1, 2, ..., with weights 1, 2, ... (published: in training for longer ones).
    without: chains (as `draw_chains` gives them) that must not be among them, such as a training set's in its test set.
    """
    drawn = draw_chains(task, count, length=length, shorter=shorter, seed=seed, without=without)
    rows = [(words if chain else direct(task, words)) for words in drawn]
    ids = torch.full((count, max(map(len, rows)) + 1), PADDING)
    numbers = {word: number for number, word in enumerate(TASKS[task].words)}
    for row, words in zip(ids, rows, strict=True):
        row[: len(words) + 1] = torch.tensor([*(numbers[word] for word in words), EOS])
    return ids


def draw_chains(
    task: str,
    count: int,
    *,
    length: int,
    shorter: bool = False,
    seed: int = 2023,
    without: Iterable[Words] = (),
) -> list[Words]:
    """`count` different chains as words, without <eos>."""
    known = find_task(task)
    least = known.lengths[0]
    if length not in known.lengths:
        raise TersorError(f"{task} has no problems of length {length}, only of {least} to {known.lengths[-1]}")
    chance, refused = Chance(seed), {tuple(words) for words in without}
    drawn: dict[tuple[str, ...], None] = {}  # in the order drawn
    if shorter:
        for size in range(least, length + 1):
            for _ in range(count * size // sum(range(least, length + 1))):
                drawn[tuple(known.draw(chance, size))] = None
    barren = 0
    while len(drawn) < count:
        words = tuple(known.draw(chance, length))
        barren = barren + 1 if words in drawn or words in refused else 0
        if barren > 10_000:
            raise TersorError(f"{task} of length {length} has no {count} different problems: {len(drawn)} were found")
        if words not in refused:
            drawn[words] = None
    return [list(words) for words in list(drawn)[:count]]


def chain_targets(task: str, ids: Tensor, *, chain: bool = True) -> Tensor:
    """ids (n, L) -> what is to be predicted at each of the first L - 1 places, 0 where there is no loss."""
    known = find_task(task)
    is_separator = ids == known.words.index(known.separator)
    after = is_separator.cumsum(1)[:, :-1] > 0  # at the separator and behind it
    if not chain and task != "equation":
        after = is_separator[:, :-1]
    return torch.where(after, ids[:, 1:], PADDING)


def direct(task: str, chain: Words) -> Words:
    """The chain without its steps: question, separator, answer."""
    separator = TASKS[task].separator
    last = len(chain) - 1 - chain[::-1].index(separator)
    return chain[: chain.index(separator) + 1] + chain[last + 1 :]


def find_task(task: str) -> Task:
    if task not in TASKS:
        raise TersorError(f"chain-of-thought tasks are {', '.join(TASKS)}, not {task!r}")
    return TASKS[task]


# -- arithmetic --------------------------------------------------------------------------------------------------------


def division_table(p: int = PRIME) -> np.ndarray:
    """(p, p): a / b; 0 where b is 0, but p - 1 for 0 / 0."""
    inverse = np.array([pow(b, -1, p) if b else 0 for b in range(p)])
    table: np.ndarray = np.arange(p)[:, None] * inverse % p
    table[0, 0] = p - 1
    return table


_DIVISION = division_table()


def calculate(a: int, sign: str, b: int) -> int:
    if sign == "/":
        return int(_DIVISION[a, b])
    return {"+": a + b, "-": a - b, "*": a * b}[sign] % PRIME


def solve_arithmetic(words: Sequence[str]) -> int:
    """The value of an expression, by precedence and from the left. It checks the generator's chains, which are made in
    another way."""
    value, rest = _sum(list(words))
    if rest:
        raise TersorError(f"{' '.join(words)!r} is not one whole expression")
    return value


def _sum(words: Words) -> tuple[int, Words]:
    return _from_left(words, "+-", lambda rest: _from_left(rest, "*/", _atom))


def _from_left(words: Words, signs: str, part: Callable[[Words], tuple[int, Words]]) -> tuple[int, Words]:
    value, words = part(words)
    while words and words[0] in signs:
        right, rest = part(words[1:])
        value, words = calculate(value, words[0], right), rest
    return value, words


def _atom(words: Words) -> tuple[int, Words]:
    if words and words[0] == "(":
        value, rest = _sum(words[1:])
        if rest[:1] == [")"]:
            return value, rest[1:]
    elif words and words[0].isdigit():
        return int(words[0]), words[1:]
    raise TersorError(f"no number or bracket at {' '.join(words)!r}")


def _draw_arithmetic(chance: Chance, length: int) -> Words:
    expression = [str(chance.python.choice(range(PRIME)))]
    history = [expression]
    for _ in range(length):
        while not expression[place := chance.python.randint(0, len(expression) - 1)].isdigit():
            pass
        grown = _expression_of(int(expression[place]), chance.python)
        before, after = expression[:place], expression[place + 1 :]
        if _needs_brackets(before[-1:], grown[1], after[:1]):
            grown = ["(", *grown, ")"]
        expression = before + grown + after
        history.append(expression)
    return [word for state in reversed(history) for word in ("=", *state)][1:]


def _expression_of(value: int, chance: random.Random) -> Words:
    """Two numbers and a sign that make `value`."""
    while True:
        a, sign = chance.choice(range(PRIME)), chance.choice("+-*/")
        if sign == "+":
            b = calculate(value, "-", a)
        elif sign == "-":
            b = calculate(a, "-", value)
        elif (a == 0) != (value == 0) and (sign == "/" or a == 0):
            continue  # no b will do
        elif a == 0:  # any b will do, as a divisor any but 0
            b = chance.choice(range(PRIME))
            if sign == "/" and b == 0:
                continue
        else:
            b = calculate(value, "/", a) if sign == "*" else calculate(a, "/", value)
        return [str(a), sign, str(b)]


def _needs_brackets(before: Words, sign: str, after: Words) -> bool:
    weak = sign in "+-"
    return before == ["/"] or (weak and (before in (["*"], ["-"]) or after in (["*"], ["/"])))


# -- linear equations --------------------------------------------------------------------------------------------------


def solve_equations(matrix: np.ndarray) -> list[np.ndarray] | None:
    """(m, m + 1) mod 11 -> the m + 1 states of Gauss-Jordan from the first to the solved one; None where singular."""
    state, history = matrix % PRIME, [matrix % PRIME]
    for j in range(len(matrix)):
        candidates = np.flatnonzero(state[j:, j])
        if not len(candidates):
            return None
        state = state.copy()
        pivot = j + candidates[0]
        state[[j, pivot]] = state[[pivot, j]]
        state[j] = _DIVISION[state[j], state[j, j]]
        others = np.arange(len(state)) != j
        state[others] = (state[others] - state[others, j : j + 1] * state[j]) % PRIME
        history.append(state)
    return history


def _draw_equation(chance: Chance, length: int) -> Words:
    history = None
    while history is None:
        history = solve_equations(chance.numpy.randint(0, PRIME, size=(length, length + 1)))
    chain: Words = []
    for solved, state in enumerate(history):
        chain += ["<sep>"] * (solved > 0)
        for row, values in enumerate(state.tolist()):
            chain += [","] * (row > 0) + _equation(values, solved)
    return chain


def _equation(values: list[int], solved: int) -> Words:
    terms: Words = []
    for j, value in enumerate(values[:-1]):
        if j < solved and value == 0:
            continue
        number = [] if j < solved and value == 1 else [str(value)]
        terms += ["+"] * bool(terms) + number + [LETTERS[j]]
    return [*terms, "=", str(values[-1])]


# -- longest increasing subsequence ------------------------------------------------------------------------------------


def lis_lengths(numbers: Sequence[int]) -> list[int]:
    """For each place the length of the longest strictly increasing subsequence that ends there."""
    lengths: list[int] = []
    for place, number in enumerate(numbers):
        lengths.append(1 + max((lengths[i] for i in range(place) if numbers[i] < number), default=0))
    return lengths


def _draw_lis(chance: Chance, length: int) -> Words:
    numbers = _planted(chance.numpy, length).tolist()
    lengths = lis_lengths(numbers)
    return [*map(str, numbers), "<sep>", *map(str, lengths), "<sep>", str(max(lengths))]


def _planted(chance: np.random.RandomState, length: int) -> np.ndarray:
    """Random numbers, with one to three increasing runs at random places."""
    least = length + 1
    runs, total = chance.randint(3) + 1, chance.randint(length - 2) + 3
    sizes, left = [], total
    for more in range(runs - 1, 0, -1):
        sizes.append(chance.randint(left // (more + 1) + 1) + 1)
        left -= sizes[-1]
    sizes.append(left)
    planted = [np.sort(chance.choice(LIS_NUMBERS - least, size, replace=False)) + least for size in sizes]
    places = np.sort(chance.choice(length, total, replace=False))
    numbers = chance.randint(least, high=LIS_NUMBERS, size=length)
    numbers[places] = np.concatenate(planted)
    return numbers


# -- edit distance -----------------------------------------------------------------------------------------------------


def edit_table(a: Sequence[str], b: Sequence[str]) -> list[list[int]]:
    """(len(a) + 1) rows of len(b) + 1: the cost of making the beginning of b out of that of a. Row 0 and column 0 count 1 a
    letter."""
    table = [list(range(len(b) + 1))]
    for i, letter in enumerate(a, 1):
        row, above = [i], table[-1]
        for j, other in enumerate(b, 1):
            replaced = above[j - 1] + (0 if letter == other else REPLACE)
            row.append(min(above[j] + DELETE, row[j - 1] + INSERT, replaced))
        table.append(row)
    return table


def _draw_edit(chance: Chance, length: int) -> Words:
    first, second = _draw_pair(chance.numpy, length)
    rows = edit_table(first, second)[1:]
    steps = [word for row in rows for word in (*map(str, row[1:]), ",")]
    return [*first, "|", *second, "<sep>", *steps, "<sep>", str(rows[-1][-1])]


def _draw_pair(chance: np.random.RandomState, length: int) -> tuple[Words, Words]:
    """Two different strings, the shorter one first: of 3 to 10 letters, unrelated or the second edited from the first."""
    edits = chance.randint(length) + 1
    while True:
        using = chance.randint(8) + 3
        letters = chance.choice(list(LETTERS), using, replace=False).tolist()
        first = [letters[i] for i in chance.randint(using, size=length)]
        if chance.rand() < 0.4:
            size = chance.randint(length - 3, length + 3)
            second = [letters[i] for i in chance.randint(using, size=size)]
        else:
            second = _edited(first, edits, letters, chance)
        if first != second and length - 3 <= len(second) < length + 3:
            return (second, first) if len(first) > len(second) else (first, second)


def _edited(word: Words, edits: int, letters: Words, chance: np.random.RandomState) -> Words:
    for _ in range(edits):
        kind = chance.randint(3)
        if kind == 0 and len(word) > 2:
            place = chance.randint(len(word))
            word = word[:place] + word[place + 1 :]
        elif kind == 1:
            place = chance.randint(len(word))
            word = [*word[:place], str(chance.choice(letters)), *word[place + 1 :]]
        else:
            place = chance.randint(len(word) + 1)
            word = [*word[:place], str(chance.choice(letters)), *word[place:]]
    return word


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


TASKS: dict[str, Task] = {
    "arithmetic": Task(
        ("<pad>", "<cls>", "<eos>", "+", "-", "*", "/", "(", ")", "=", *_numbers(PRIME)),
        "=",
        _draw_arithmetic,
        range(1, 1001),
    ),
    "equation": Task(
        ("<pad>", "=", "<eos>", "<sep>", "+", ",", *LETTERS[:5], *_numbers(PRIME)), "<sep>", _draw_equation, range(2, 6)
    ),
    "lis": Task(("<pad>", "<sep>", "<eos>", *_numbers(LIS_NUMBERS)), "<sep>", _draw_lis, range(3, LIS_NUMBERS // 2)),
    "edit_distance": Task(
        ("<pad>", "<sep>", "<eos>", "|", ",", *LETTERS, *_numbers(60)), "<sep>", _draw_edit, range(4, 21)
    ),
}
