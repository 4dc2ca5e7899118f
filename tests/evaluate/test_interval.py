"""Half widths of intervals of few samples, against tables of Student's t."""

import math

import pytest
import torch

from tersor.evaluate.interval import half_width, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (10, 2.228), (11, 2.201), (15, 2.131), (29, 2.045), (99, 1.984)],
)
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=0.0005)


def test_many_samples_have_the_normal_quantile_and_one_has_none() -> None:
    assert t_quantile(10**7) == pytest.approx(1.96, abs=0.0001)
    quantiles = [t_quantile(n) for n in range(1, 200)]
    assert quantiles == sorted(quantiles, reverse=True)
    with pytest.raises(ValueError, match="0 degrees"):
        t_quantile(0)
    assert half_width(torch.tensor([1.0])) is None
    assert half_width(torch.tensor([1.0, 3.0])) == pytest.approx(12.7062 * math.sqrt(2) / math.sqrt(2))
