"""Figures of plans that were not measured: formulae, calibrated by the nearest evidence, with an interval.

Loss: the nearest measured recipe's, moved by the bits between both. Rounding error has a variance of 4^-bits, and the loss is
about linear in it, so log10 loss moves by -0.6 a bit. A measured loss within its own 95 % interval says only how large it may be:
its upper end is moved, the least is 0, and recipes whose loss is beyond their interval count as nearer.

Latency: the original's, with the linear layers' share changed by the kernels' speed on this machine. Memory: the original's, less
what its weights shrink by. Both are moved by how far the nearest recipe measured on this machine was from its prediction.

What is farther has a wider interval. The widths (NEAR, FAR, SPEED_NEAR, SPEED_FAR, MEMORY) were set by hand: they come from no
measurement and promise no share of the cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tersor.advise.evidence import Evidence
from tersor.advise.plans import Figure, Recipe, name_of
from tersor.advise.workloads import loss_between
from tersor.evaluate.machine import SIZE, Machine

A_BIT = -0.6  # of log10 loss
LEAST = 1e-4  # loss below which nothing is told apart
NOISY = 2.0  # added to the distance of a recipe whose loss is within its interval
NEAR, FAR = (
    0.12,
    0.35,
)  # log10 of half an interval: for the same method at the next bits, and more for each unit of distance
SPEED_NEAR, SPEED_FAR = 1.25, 1.6  # factors of the interval of a latency: with evidence on this machine, without
MEMORY = 1.1
LINEAR = 0.9  # of the original's time
FEW = 16  # rows, below which reading a layer takes the time


@dataclass(frozen=True)
class Layers:
    """Sizes of a model's linear layers."""

    packed: int  # numbers in the layers that are packed
    all: int  # numbers in all linear layers, the head included
    width: int  # bytes that the original reads of each number


def bits_of(recipe: Recipe) -> float:
    """Bits of a weight, with its share of the steps; 16 where nothing is quantized."""
    bits = 16.0
    for step in recipe:
        said = step.get("bits", step.get("w_bits"))
        if said is not None:
            group = step.get("group_size", -1)
            bits = (2.0 if said == "ternary" else float(said)) + (
                16 / group if isinstance(group, int) and group > 0 else 0
            )
    return bits


def distance(one: Recipe, other: Recipe) -> float:
    """0 for the same; a bit counts 1, another way of rounding at the same bits 0.5, another kind of method 3."""
    if one == other:
        return 0.0
    a, b = ({step["name"] for step in each} for each in (one, other))
    packed = [any("bits" in step or "w_bits" in step for step in each) for each in (one, other)]
    apart = 0.0 if a == b else 0.5 if all(packed) else 3.0
    others = sum(
        x.get(key) != y.get(key)
        for x, y in zip(one, other, strict=False)
        for key in (x.keys() | y.keys()) - {"bits", "w_bits", "group_size", "name"}
    )
    bits = abs(bits_of(one) - bits_of(other))
    return bits + apart + 0.1 * min(int(others), 5) + 0.05


def _alike(one: Recipe, other: Recipe) -> bool:
    """Whether the loss of one tells anything about the other's: both round weights, or both are of the same methods."""
    rounds = all(any("bits" in step or "w_bits" in step for step in each) for each in (one, other))
    return rounds or [step["name"] for step in one] == [step["name"] for step in other]


def predicted_loss(recipe: Recipe, rows: Sequence[Evidence], *, model: str, data: str, machine: str) -> Figure | None:
    """rows: of models of the same kind. None where none is near enough to say anything."""

    def farness(row: Evidence) -> tuple[float, bool, str]:
        foreign = 0.0 if row.model_mark == model else 2.0
        return (distance(recipe, row.steps) + foreign + (row.data_mark != data), row.machine != machine, row.id)

    def preference(row: Evidence) -> tuple[float, bool, str]:
        apart, elsewhere, mark = farness(row)
        return apart + NOISY * (row.loss <= noise_of(row, rows)), elsewhere, mark

    known = [row for row in rows if row.recipe and _alike(recipe, row.steps)]
    if not known:
        return None
    row = min(known, key=preference)
    apart, noise = farness(row)[0], noise_of(row, rows)
    within = row.loss <= noise
    level = max(row.loss, 0.0) + noise if within else row.loss
    moved = math.log10(max(level, LEAST)) + A_BIT * (bits_of(recipe) - bits_of(row.steps))
    half = NEAR + FAR * apart
    where = "" if row.model_mark == model else f" on {row.model}"
    source = f"from {name_of(row.steps)}{where}" + (", whose loss is within its interval" if within else "")
    low = 0.0 if within or moved - half <= math.log10(LEAST) else 10 ** (moved - half)
    return Figure(10**moved, low, 10 ** (moved + half), False, source, row.id)


def noise_of(row: Evidence, rows: Sequence[Evidence]) -> float:
    """Half of the 95 % interval of a row's loss; 0 where it is not known."""
    for base in reversed(rows):
        if not base.recipe and (base.model_mark, base.data_mark) == (row.model_mark, row.data_mark):
            half = loss_between(row.kind, base.scores, row.scores)[1]
            return half if math.isfinite(half) else 0.0
    return 0.0


def kernel_ratio(machine: Machine, bits: int, rows: int) -> float:
    """Seconds of a packed layer over those of a dense one, by the doctor's two sizes."""
    found = next((each for each in machine.kernels if each.bits == bits), None)
    if found is None:
        return 1.0
    size = 1 if rows < FEW else 64
    return 1 / found.speedup[size]


def bandwidth(machine: Machine) -> float:
    """Bytes a second at which a dense matrix is read by a product with one row."""
    return SIZE * SIZE * _width(machine) / (machine.dense[1] / 1e3)


def _width(machine: Machine) -> int:
    return 4 if machine.dtype == "float32" else 2


def latency_formula(base: float, layers: Layers, packed: Mapping[str, int], machine: Machine, *, rows: int) -> float:
    """base: seconds of the original; packed: bits by layer, each taken as an equal part of the layers.

    Linear layers take LINEAR of the time, each by its numbers. With few rows a dense layer's time is that of reading it, so the
    kernels' ratios, which are to the probe's dtype, are scaled by the bytes of both.
    """
    if not packed:
        return base
    share = LINEAR * layers.packed / layers.all
    scale = _width(machine) / layers.width if rows < FEW else 1.0
    ratios = [scale * kernel_ratio(machine, bits, rows) for bits in packed.values()]
    return base * (1 - share + share * sum(ratios) / len(ratios))


def fitted(value: float, recipe: Recipe, others: Sequence[tuple[Recipe, float]]) -> tuple[float, str]:
    """A prediction moved by measured / predicted of the nearest recipe; `others`: that ratio of the measured ones."""
    if not others:
        return value, ""
    nearest, ratio = min(others, key=lambda each: (distance(recipe, each[0]), name_of(each[0])))
    return value * ratio, name_of(nearest)
