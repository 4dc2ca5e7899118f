"""Which layers of a compressed model cost what: the result of `tersor attribute`, as plain values.

For a layer l, with D(model) the mean divergence of a model's predictions from the original's:

    kl        D(original with l compressed)                       l alone
    restored  D(compressed) - D(compressed with l original)       what the compressed model would gain

Their mean is the cost of l, by which rows are sorted: the first and the last term of its Shapley value. Divergence is the
Kullback-Leibler divergence of predictions in nats; of forecasts it is the mean squared difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tersor.errors import TersorError


@dataclass(frozen=True)
class Row:
    """A layer or a block. Half widths are those of 95 % intervals, paired over samples; None where there is one sample."""

    name: str
    kind: str  # its name within the block, such as self_attn.q_proj; `block` for a whole one
    depth: int | None  # the block's number; None outside the blocks
    bits: float | None  # of its weights' grid; None where they are on none
    kl: float
    half_width: float | None
    restored: float
    restored_half_width: float | None
    members: tuple[str, ...] = ()  # the modules that are exchanged together

    @property
    def cost(self) -> float:
        return (self.kl + self.restored) / 2


@dataclass(frozen=True)
class Suggestion:
    """More bits for some layers, as it was tried. Sizes in bytes of the tensor files."""

    layers: tuple[str, ...]
    bits: int
    size_before: int
    size_after: int
    kl_before: float
    kl_after: float
    change: float  # kl_after - kl_before
    change_half_width: float | None
    recipe: str  # YAML, as `tersor quantize --recipe` takes it


@dataclass(frozen=True)
class Attribution:
    """What each layer or block costs."""

    model: str
    base: str
    text: str  # what it was measured on
    by: str  # layer or block
    rows: tuple[Row, ...]  # the most costly first
    total_kl: float  # of the compressed model
    suggestion: Suggestion | None
    total_half_width: float | None = None
    measure: str = "KL"  # or MSE
    samples: int = 0  # windows, images
    blocks: tuple[Row, ...] = ()  # where rows are layers: the blocks that were measured first
    left: tuple[str, ...] = ()  # not measured in the time given
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "kind": "attribution"}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Attribution:
        """Raises TersorError where it is no result of `to_json`."""
        if found.get("kind") != "attribution":
            raise TersorError("the file holds no attribution: `tersor attribute ... --out FILE` writes one")
        values = {key: value for key, value in found.items() if key != "kind"}
        try:
            for key in ("rows", "blocks"):
                values[key] = tuple(Row(**{**row, "members": tuple(row["members"])}) for row in values[key])
            if values["suggestion"] is not None:
                layers = tuple(values["suggestion"]["layers"])
                values["suggestion"] = Suggestion(**{**values["suggestion"], "layers": layers})
            return cls(**{**values, "left": tuple(values["left"]), "notes": tuple(values["notes"])})
        except (KeyError, TypeError) as error:
            raise TersorError(f"the attribution cannot be read: {error}") from None


def cumulative(rows: Sequence[Row]) -> list[float]:
    """The share of the first n rows in the sum of all positive costs, n = 1, 2, ...; zeros where nothing costs anything."""
    sums = list(accumulate(max(row.cost, 0.0) for row in rows))
    return [each / sums[-1] if sums[-1] else 0.0 for each in sums]
