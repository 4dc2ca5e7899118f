"""The mean of few samples and its 95 % interval, by Student's t distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

FEW = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)  # of 1 to 10 degrees of freedom
NORMAL = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    half_width: float | None  # half the width of the interval; None for one sample


def estimate(values: Tensor) -> Estimate:
    """The mean of samples [samples, ...]; each sample counts by its own mean."""
    values = values.double()
    means = values if values.dim() == 1 else values.flatten(1).mean(1)
    return Estimate(float(means.mean()), half_width(means))


def half_width(values: Tensor) -> float | None:
    """Half the width of the 95 % interval of the samples' mean; None for one sample."""
    n = len(values)
    return None if n < 2 else t_quantile(n - 1) * float(values.std()) / math.sqrt(n)


def t_quantile(freedom: int) -> float:
    """The quantile 0.975 of Student's t with so many degrees of freedom (samples - 1): half of the 95 % interval of a mean, in
    standard errors.

    Above the table the expansion in 1 / freedom about the normal quantile (Abramowitz and Stegun, 26.7.5), which is right to
    0.0001 there. Raises ValueError where freedom is below 1.
    """
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom have no interval")
    if freedom <= len(FEW):
        return FEW[freedom - 1]
    z = NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
