"""ConstrINT: positive integers that satisfy divisibility, equality and size constraints (FlashRNN, arXiv 2412.07752).

What it is for: choosing the tiles of a kernel. A text says what must hold, and the search finds the first numbers that satisfy
it:

    constraint, variables = parse_expression("WIDTH == 768; WIDTH % TILE == 0; TILE <= 128;")
    solve_constrint(constraint, variables, [ValueRefinement("TILE", ValueHeuristic.LARGEST_FIRST)])   # ({"TILE": 128},)

Grammar, loosest first: `;` and, `|` or, `A <= B`, `A % B == 0`, `A == B`, `+`, `*`, `X ^ 3`. Names of letters and underscores,
integers, lists `[1, 2, 3]` (any of these), comments from `#` to the line's end. Brackets are skipped and have no effect. Every
variable is an integer from 1 to 2^30.

Each variable has a `Domain`. A constraint computes the domains of its terms from those of the variables (up), and narrows the
variables to what it allows (down), again and again until nothing changes: `propagated`. A domain is an interval of multiples of
a factor, or, below 2048 values, a list. Propagation drops no solution, but may leave values that belong to none; where every
variable has one value it is exact. `solve_constrint` tries the values of the given variables in order, depth first, and
propagates after each choice, so solutions come in lexicographic order.

Origin: NX-AI/flashrnn at d73fb52, NXAI Community License; written from its documentation. The published solver repeats
the first solution where several are asked for, and does not end where the first is excluded; ours does as documented.
Unlike there, nothing is kept on disk and there is no command line. Our propagation leaves fewer values: of 768 % X == 0 the
divisors, not all 2^a 3^b.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import islice, product

from tersor.errors import TersorError

UPPER_LIMIT = 2**30
EXPANSION_LIMIT = 2048  # a domain with fewer values lists them
_PAIRS_LIMIT = 2**16  # pairs of two lists; where there are more, a sum or product is an interval


@dataclass(frozen=True)
class Domain:
    """The integers from low to high that `factor` divides; only those in `values` (rising) where it is given."""

    low: int = 1
    high: int = UPPER_LIMIT
    factor: int = 1
    values: tuple[int, ...] | None = None

    @staticmethod
    def of(values: Iterable[int]) -> Domain:
        listed = tuple(sorted(set(values)))
        if not listed:
            return EMPTY
        return Domain(listed[0], listed[-1], math.gcd(*listed), listed)

    @staticmethod
    def within(low: int, high: int, factor: int = 1) -> Domain:
        low, high = -(-low // factor) * factor, high // factor * factor
        if high < low:
            return EMPTY
        if (high - low) // factor + 1 < EXPANSION_LIMIT:
            return Domain.of(range(low, high + 1, factor))
        return Domain(low, high, factor)

    def __contains__(self, value: int) -> bool:
        if self.values is not None:
            return value in self.values
        return self.low <= value <= self.high and value % self.factor == 0

    def __and__(self, other: Domain) -> Domain:
        if self.values is None and other.values is not None:
            return other & self
        if self.values is not None:
            allowed = other if other.values is None else frozenset(other.values)
            return Domain.of(value for value in self.values if value in allowed)
        factor = math.lcm(self.factor, other.factor)
        return Domain.within(max(self.low, other.low), min(self.high, other.high), factor)

    def __or__(self, other: Domain) -> Domain:
        if not self or not other:
            return self or other
        if self.values is not None and other.values is not None:
            return Domain.of(self.values + other.values)
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Domain.within(low, high, math.gcd(self.factor, other.factor))

    def __bool__(self) -> bool:
        return self.values != ()

    def __iter__(self) -> Iterator[int]:
        return iter(self.values if self.values is not None else range(self.low, self.high + 1, self.factor))

    def __reversed__(self) -> Iterator[int]:
        return reversed(self.values if self.values is not None else range(self.low, self.high + 1, self.factor))


EMPTY = Domain(1, 0, 1, ())
Domains = dict[str, Domain]


class Term:
    """A term: `up` is the domain of its values, `down` narrows the variables in it to those that can give `target`."""

    def up(self, domains: Domains) -> Domain:
        raise NotImplementedError

    def down(self, target: Domain, domains: Domains) -> bool:
        """False where nothing is left."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Term):
    domain: Domain

    def up(self, domains: Domains) -> Domain:
        return self.domain

    def down(self, target: Domain, domains: Domains) -> bool:
        return bool(self.domain & target)

    def __str__(self) -> str:
        return str(self.domain.low) if self.domain.low == self.domain.high else str(list(self.domain))


@dataclass(frozen=True)
class Variable(Term):
    name: str

    def up(self, domains: Domains) -> Domain:
        return domains[self.name]

    def down(self, target: Domain, domains: Domains) -> bool:
        domains[self.name] = domains[self.name] & target
        return bool(domains[self.name])

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Sum(Term):
    left: Term
    right: Term

    def up(self, domains: Domains) -> Domain:
        a, b = self.left.up(domains), self.right.up(domains)
        return _combined(a, b, int.__add__, math.gcd(a.factor, b.factor))

    def down(self, target: Domain, domains: Domains) -> bool:
        for term, other in ((self.left, self.right), (self.right, self.left)):
            known = other.up(domains)
            if known.values is not None and target.values is not None and _few(known, target):
                allowed = Domain.of(t - o for t, o in product(target.values, known.values) if t > o)
            else:
                factor = math.gcd(target.factor, known.factor)
                allowed = Domain.within(max(1, target.low - known.high), target.high - known.low, factor)
            if not term.down(allowed, domains):
                return False
        return True

    def __str__(self) -> str:
        return f"{self.left} + {self.right}"


@dataclass(frozen=True)
class Product(Term):
    left: Term
    right: Term

    def up(self, domains: Domains) -> Domain:
        a, b = self.left.up(domains), self.right.up(domains)
        return _combined(a, b, int.__mul__, a.factor * b.factor)

    def down(self, target: Domain, domains: Domains) -> bool:
        for term, other in ((self.left, self.right), (self.right, self.left)):
            known = other.up(domains)
            if known.values is not None and target.values is not None and _few(known, target):
                allowed = Domain.of(t // o for t, o in product(target.values, known.values) if t % o == 0)
            else:
                single = known.low == known.high
                factor = target.factor // math.gcd(target.factor, known.low) if single else 1
                allowed = Domain.within(max(1, -(-target.low // known.high)), target.high // known.low, factor)
                if target.values is not None:
                    allowed = allowed & _divisors_of(target.values)
            if not term.down(allowed, domains):
                return False
        return True

    def __str__(self) -> str:
        return f"{self.left} * {self.right}"


@dataclass(frozen=True)
class Power(Term):
    base: Term
    exponent: int

    def up(self, domains: Domains) -> Domain:
        base = self.base.up(domains)
        if base.values is not None:
            return Domain.of(value**self.exponent for value in base.values)
        return Domain(base.low**self.exponent, base.high**self.exponent, base.factor**self.exponent)

    def down(self, target: Domain, domains: Domains) -> bool:
        if target.values is not None:
            roots = (_root(value, self.exponent) for value in target.values)
            allowed = Domain.of(
                root for root, value in zip(roots, target.values, strict=True) if root**self.exponent == value
            )
        else:
            lowest = _root(target.low, self.exponent)
            lowest += lowest**self.exponent < target.low
            allowed = Domain.within(lowest, _root(target.high, self.exponent))
        return self.base.down(allowed, domains)

    def __str__(self) -> str:
        return f"{self.base} ^ {self.exponent}"


class Constraint:
    def narrow(self, domains: Domains) -> bool:
        """Drop from `domains` what cannot hold; False where nothing is left."""
        raise NotImplementedError


@dataclass(frozen=True)
class Equal(Constraint):
    left: Term
    right: Term

    def narrow(self, domains: Domains) -> bool:
        both = self.left.up(domains) & self.right.up(domains)
        return bool(both) and self.left.down(both, domains) and self.right.down(both, domains)

    def __str__(self) -> str:
        return f"{self.left} == {self.right}"


@dataclass(frozen=True)
class AtMost(Constraint):
    left: Term
    right: Term

    def narrow(self, domains: Domains) -> bool:
        small, large = self.left.up(domains), self.right.up(domains)
        return self.left.down(small & Domain.within(1, large.high), domains) and self.right.down(
            large & Domain.within(small.low, max(large.high, small.low)), domains
        )

    def __str__(self) -> str:
        return f"{self.left} <= {self.right}"


@dataclass(frozen=True)
class Divisible(Constraint):
    dividend: Term
    divisor: Term

    def narrow(self, domains: Domains) -> bool:
        whole, part = self.dividend.up(domains), self.divisor.up(domains)
        part = part & Domain.within(1, whole.high)
        if whole.values is not None:
            part = part & _divisors_of(whole.values)
        if not part:
            return False
        if whole.values is not None and part.values is not None and _few(whole, part):
            divisors = part.values
            whole = Domain.of(w for w in whole.values if any(w % d == 0 for d in divisors))
        else:
            whole = whole & Domain.within(part.low, max(whole.high, part.low), part.factor)
        return bool(whole) and self.dividend.down(whole, domains) and self.divisor.down(part, domains)

    def __str__(self) -> str:
        return f"{self.dividend} % {self.divisor} == 0"


@dataclass(frozen=True)
class Or(Constraint):
    alternatives: tuple[Constraint, ...]

    def narrow(self, domains: Domains) -> bool:
        left: Domains = {}
        for alternative in self.alternatives:
            copy = dict(domains)
            if alternative.narrow(copy):
                left = {name: left.get(name, EMPTY) | domain for name, domain in copy.items()}
        domains.update(left)
        return bool(left)

    def __str__(self) -> str:
        return " | ".join(map(str, self.alternatives))


@dataclass(frozen=True)
class And(Constraint):
    constraints: tuple[Constraint, ...]

    def narrow(self, domains: Domains) -> bool:
        """To the fixed point."""
        while True:
            before = dict(domains)
            if not all(constraint.narrow(domains) for constraint in self.constraints):
                return False
            if domains == before:
                return True

    def __str__(self) -> str:
        return ";\n".join(map(str, self.constraints)) + ";"


class ValueHeuristic(Enum):
    SMALLEST_FIRST = "smallest first"
    LARGEST_FIRST = "largest first"


@dataclass(frozen=True)
class ValueRefinement:
    name: str
    heuristic: ValueHeuristic = ValueHeuristic.SMALLEST_FIRST


def propagated(constraint: Constraint, variables: Mapping[str, Domain]) -> Domains:
    """The domains that propagation alone leaves; empty where the constraint cannot hold."""
    domains = dict(variables)
    return domains if And((constraint,)).narrow(domains) else {}


def solve_constrint(
    constraint: Constraint,
    variables: Mapping[str, Domain],
    refinements: Sequence[ValueRefinement] = (),
    *,
    num_solutions: int = 1,
    exclude_solutions: Sequence[Mapping[str, int]] = (),
) -> tuple[dict[str, int], ...]:
    """The first solutions in the order of the refinements; () where there is none. Without refinements all variables are decided,
    smallest values first. With them, variables without a refinement stay open and are not in the solutions."""
    order = tuple(refinements) or tuple(map(ValueRefinement, variables))
    for each in order:
        if each.name not in variables:
            raise TersorError(f"there is no variable {each.name!r} in the constraint; it has {', '.join(variables)}")
    names = [each.name for each in order]
    excluded = [{name: solution[name] for name in names if name in solution} for solution in exclude_solutions]
    found = (each for each in _solutions(constraint, variables, order, {}) if each not in excluded)
    return tuple(islice(found, num_solutions))


def _solutions(
    constraint: Constraint, variables: Mapping[str, Domain], order: Sequence[ValueRefinement], chosen: dict[str, int]
) -> Iterator[dict[str, int]]:
    domains = propagated(constraint, variables)
    if not domains and variables:
        return
    if not order:
        yield dict(chosen)
        return
    name, heuristic = order[0].name, order[0].heuristic
    domain = domains[name]
    for value in reversed(domain) if heuristic is ValueHeuristic.LARGEST_FIRST else domain:
        decided = {**domains, name: Domain.of((value,))}
        yield from _solutions(constraint, decided, order[1:], {**chosen, name: value})


def parse_expression(text: str) -> tuple[Constraint, Domains]:
    """The constraint, and its variables with all values allowed."""
    text = re.sub(r"#[^\n]*", "", text).replace("(", "").replace(")", "")
    variables: Domains = {}
    parts = [part for part in text.split(";") if part.strip()]
    return And(tuple(_alternatives(part, variables) for part in parts)), variables


def _alternatives(text: str, variables: Domains) -> Constraint:
    parts = tuple(_relation(part, variables) for part in text.split("|"))
    return parts[0] if len(parts) == 1 else Or(parts)


def _relation(text: str, variables: Domains) -> Constraint:
    if "%" in text:
        match = re.fullmatch(r"([^%=<]+)%([^%=<]+)==\s*0\s*", text)
        if match:
            return Divisible(_term(match[1], variables), _term(match[2], variables))
    for sign, kind in (("<=", AtMost), ("==", Equal)):
        sides = text.split(sign)
        if len(sides) == 2 and "%" not in text:
            return kind(_term(sides[0], variables), _term(sides[1], variables))
    raise TersorError(f"{text.strip()!r} is none of A == B, A <= B and A % B == 0")


def _term(text: str, variables: Domains) -> Term:
    text = text.strip()
    for sign, kind in (("+", Sum), ("*", Product)):
        first, found, rest = text.partition(sign)
        if found:
            return kind(_term(first, variables), _term(rest, variables))
    base, found, exponent = text.partition("^")
    if found:
        if not exponent.strip().isdigit() or int(exponent) < 1:
            raise TersorError(f"the exponent in {text!r} is not an integer of at least 1")
        return Power(_term(base, variables), int(exponent))
    listed = re.fullmatch(r"\[([\d\s,]+)\]|(\d+)", text)
    if listed:
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        if not numbers or min(numbers) < 1:
            raise TersorError(f"ConstrINT counts from 1, so {text!r} can never hold")
        return Constant(Domain.of(numbers))
    if not re.fullmatch(r"[A-Za-z_]+", text):
        raise TersorError(f"{text!r} is neither a name (letters and underscores), an integer nor a list of integers")
    variables.setdefault(text, Domain())
    return Variable(text)


def _few(a: Domain, b: Domain) -> bool:
    return len(a.values or ()) * len(b.values or ()) <= _PAIRS_LIMIT


def _combined(a: Domain, b: Domain, operation: Callable[[int, int], int], factor: int) -> Domain:
    if a.values is not None and b.values is not None and _few(a, b):
        results = {operation(x, y) for x, y in product(a.values, b.values)}
        if len(results) < EXPANSION_LIMIT:
            return Domain.of(results)
    return Domain(operation(a.low, b.low), operation(a.high, b.high), factor)


def _divisors_of(numbers: Sequence[int]) -> Domain:
    """The divisors of at least one of the numbers, listed where there are not too many."""
    if len(numbers) > 64:
        return Domain.within(1, numbers[-1])
    return Domain.of(divisor for number in numbers for divisor in _divisors(number))


@lru_cache(maxsize=4096)
def _divisors(number: int) -> tuple[int, ...]:
    divisors, rest, prime = [1], number, 2
    while rest > 1:
        if prime * prime > rest:
            prime = rest
        power, powers = 1, [1]
        while rest % prime == 0:
            rest, power = rest // prime, power * prime
            powers.append(power)
        divisors = [divisor * power for divisor in divisors for power in powers]
        prime += 1
    return tuple(divisors)


def _root(value: int, exponent: int) -> int:
    """The largest integer whose power is not above `value`."""
    low, high = 0, 1 << -(-value.bit_length() // exponent)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**exponent <= value else (low, middle - 1)
    return low
