"""ListOps, the synthetic task of the Long Range Arena: what does a nested expression of small numbers evaluate to?

    [MAX 4 [MIN 2 9 ] 1 ]  =  4

Operators are MIN, MAX, MED (the median, halves cut off) and SM (the sum modulo 10) of 2 to `max_args` arguments, digits
or expressions. A tree grows from the root: an operator with probability 0.25 while its depth is below `max_depth`, else
a digit. Expressions whose length (a token for every digit, operator and bracket) is strictly between `min_length` and
`max_length` are kept, each only once. The published files write every application in parentheses, ( ( [MAX 4 ) ... ]
), which models do not get to see; a closing bracket is the token X for them.

    tokens, answers = make_listops(10_000, min_length=8, max_length=128, seed=0)     # [10000, 127], 0 is padding

Rules: google-research/long-range-arena at cd31e5c (Apache-2.0). A seed draws the same expressions as there; the
released split was drawn without one and put in a set's order, so it cannot be made again.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tersor.errors import TersorError

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
PADDING = 0
VOCABULARY = {token: i + 1 for i, token in enumerate([*map(str, range(10)), "X", *OPERATORS])}
_OPERATOR_PROBABILITY = 0.25


def make_listops(
    count: int,
    *,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_args: int = 10,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Tokens [count, max_length - 1], padded with 0 on the right, and answers [count] in 0..9; no two alike."""
    if not 0 <= min_length < max_length - 1:
        raise TersorError(f"listops has no length strictly between {min_length} and {max_length}")
    tokens = torch.full((count, max_length - 1), PADDING)
    answers = torch.empty(count, dtype=torch.long)
    drawn = expressions(
        count, min_length=min_length, max_length=max_length, max_depth=max_depth, max_args=max_args, seed=seed
    )
    for i, expression in enumerate(drawn):
        tokens[i, : len(expression)] = torch.tensor([VOCABULARY[token] for token in expression])
        answers[i] = evaluate(expression)
    return tokens, answers


def parse(text: str) -> list[str]:
    """The published text form, or an expression without parentheses, as tokens."""
    return ["X" if token == "]" else token for token in text.split() if token not in ("(", ")")]


def evaluate(tokens: Sequence[str]) -> int:
    open_operators: list[str] = []
    arguments: list[list[int]] = [[]]
    for token in tokens:
        if token in OPERATORS:
            open_operators.append(token)
            arguments.append([])
        elif token != "X":
            arguments[-1].append(int(token))
        elif open_operators:
            value = OPERATORS[open_operators.pop()](arguments.pop())
            arguments[-1].append(value)
        else:
            raise TersorError(f"a bracket of {' '.join(tokens)!r} closes nothing")
    if open_operators or len(arguments[0]) != 1:
        raise TersorError(f"{' '.join(tokens)!r} is not one whole expression")
    return arguments[0][0]


def expressions(
    count: int, *, min_length: int, max_length: int, max_depth: int = 10, max_args: int = 10, seed: int = 0
) -> Iterator[tuple[str, ...]]:
    """`count` different expressions as tokens; the same as the official generator's after random.seed(seed)."""
    generator, seen = random.Random(seed), set[tuple[str, ...]]()
    while len(seen) < count:
        expression = tuple(_grow(generator, 1, max_depth, max_args))
        if min_length < len(expression) < max_length and expression not in seen:
            seen.add(expression)
            yield expression


def _grow(generator: random.Random, depth: int, max_depth: int, max_args: int) -> list[str]:
    if depth >= max_depth or generator.random() >= _OPERATOR_PROBABILITY:
        return [str(generator.randrange(10))]
    arguments = [_grow(generator, depth + 1, max_depth, max_args) for _ in range(generator.randint(2, max_args))]
    operator = generator.choice(list(OPERATORS))  # drawn last, as published: a seed gives the same trees
    return [operator, *itertools.chain(*arguments), "X"]
