"""Grids hold their levels, round to the nearest of them, and are what a file can hold where they have to be."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tersor.formats.grid import Bits, ClipSearch, Grid, Stored, fit_grid

ALL_BITS: list[Bits] = [2, 3, 4, 8, "ternary"]
bits_and_sym = st.tuples(st.sampled_from(ALL_BITS), st.booleans())


@st.composite
def rows(draw: st.DrawFn, smallest: float = 1e-3, largest: float = 1e3) -> Tensor:
    """A few rows [rows, columns] in float64, of any scale, some shifted off zero, some all zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(draw(st.integers(1, 4)), draw(st.integers(1, 40)), generator=generator, dtype=torch.float64)
    x += draw(st.sampled_from([0.0, 3.0, -3.0]))
    x *= draw(st.floats(smallest, largest))
    if draw(st.booleans()):
        x[0] = 0
    return x


def levels_of(grid: Grid) -> Tensor:
    """All levels of each row, [rows, levels]."""
    count = 3 if grid.bits == "ternary" else 2**grid.bits
    codes = torch.arange(count, dtype=grid.scale.dtype).expand(grid.scale.shape[0], count)
    return grid.dequantize(codes)


@given(rows(), bits_and_sym)
def test_every_number_goes_to_the_nearest_level(x: Tensor, options: tuple[Bits, bool]) -> None:
    bits, sym = options
    grid = fit_grid(x, bits, sym=sym)
    distances = (x[:, :, None] - levels_of(grid)[:, None, :]).abs()
    assert torch.all((x - grid.round(x)).abs() <= distances.amin(-1) + 1e-9 * grid.scale)


@given(rows(), bits_and_sym)
def test_codes_stay_in_range_even_for_numbers_outside_the_fitted_ones(x: Tensor, options: tuple[Bits, bool]) -> None:
    bits, sym = options
    codes = fit_grid(x, bits, sym=sym).quantize(10 * x)
    assert codes.min() >= 0
    assert codes.max() <= (2 if bits == "ternary" else 2**bits - 1)
    assert torch.equal(codes, codes.round())


@given(rows(), bits_and_sym)
def test_zero_is_a_level(x: Tensor, options: tuple[Bits, bool]) -> None:
    bits, sym = options
    assert torch.all(fit_grid(x, bits, sym=sym).round(torch.zeros_like(x)) == 0)


@given(rows(), bits_and_sym)
def test_rounding_twice_is_rounding_once(x: Tensor, options: tuple[Bits, bool]) -> None:
    bits, sym = options
    grid = fit_grid(x, bits, sym=sym)
    once = grid.round(x)
    assert torch.equal(grid.round(once), once)


@given(rows(), st.sampled_from([2, 3, 4, 8]))
def test_symmetric_grids_have_their_zero_in_the_middle(x: Tensor, bits: int) -> None:
    grid = fit_grid(x, bits, sym=True)
    assert torch.all(grid.zero == 2 ** (bits - 1))
    negative = x.clone()
    negative[:, 0] = -2 * x.abs().amax(1) - 1
    steps = fit_grid(negative, bits, sym=True).scale
    torch.testing.assert_close(steps, -2 * negative[:, :1] / (2**bits - 1))  # from -largest to largest


@given(rows(), st.sampled_from([2, 3, 4, 8]))
def test_a_symmetric_grid_is_as_good_for_rows_of_one_sign(x: Tensor, bits: int) -> None:
    """Their range is mirrored, not halved: a step of 2 max|x| / (2^bits - 1) on either side, and nothing clipped by more than
    that step."""
    for signed in (x.abs(), -x.abs(), x.abs() * (torch.arange(x.shape[1]) % 3 == 0)):
        grid = fit_grid(signed, bits, sym=True)
        largest = signed.abs().amax(1, keepdim=True)
        torch.testing.assert_close(grid.scale, 2 * largest.where(largest > 0, 1.0) / (2**bits - 1))
        assert torch.all(
            (grid.round(signed) - signed).abs() <= grid.scale * (1 + 1e-9) / 2 + grid.scale * (signed > 0) / 2
        )


@given(rows(), st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_the_search_for_a_clipping_range_never_loses(x: Tensor, bits: int, sym: bool) -> None:
    search = ClipSearch(steps=20)

    def error(grid: Grid) -> Tensor:
        return (grid.round(x) - x).abs().pow(search.norm).sum(1)

    assert torch.all(error(fit_grid(x, bits, sym=sym, clip_search=search)) <= error(fit_grid(x, bits, sym=sym)))


@given(rows(1e-12, 1e12), bits_and_sym, st.sampled_from([torch.float16, torch.bfloat16]), st.sampled_from([0, 1]))
def test_a_grid_for_a_file_is_what_the_file_gives_back(
    x: Tensor, options: tuple[Bits, bool], dtype: torch.dtype, min_zero: int
) -> None:
    bits, sym = options
    grid = fit_grid(x, bits, sym=sym, stored=Stored(dtype, min_zero))
    assert torch.equal(grid.scale.to(dtype).double(), grid.scale)
    assert torch.isfinite(grid.scale).all()
    if bits != "ternary":
        assert torch.all(grid.scale > 0)
        assert torch.all((grid.zero >= min_zero) & (grid.zero <= 2**bits - 1))


@given(rows(1e-2, 1e2), st.sampled_from([3, 4, 8]))
def test_rows_of_one_sign_keep_their_range_where_the_file_has_no_zero_point_of_zero(x: Tensor, bits: int) -> None:
    x = x.abs() + 0.01
    grid = fit_grid(x, bits, sym=False, stored=Stored(torch.float16, 1))
    assert torch.all((grid.round(x) - x).abs() <= 0.51 * grid.scale + 1e-3 * x)
