from __future__ import annotations

import pytest
import torch

from tersor.layers.windows import fit_window, merge, pad_to, partition, relative_index, shift_mask


@pytest.mark.parametrize(("grid", "window"), [((6, 4), (3, 2)), ((4, 6, 8), (2, 3, 4)), ((8,), (4,))])
def test_merging_undoes_partitioning(grid: tuple[int, ...], window: tuple[int, ...]) -> None:
    x = torch.randn(2, *grid, 5)
    windows = partition(x, window)
    assert torch.equal(merge(windows, window, grid), x)


def test_a_window_holds_neighbours() -> None:
    x = torch.arange(16.0).reshape(1, 4, 4, 1)
    assert partition(x, (2, 2))[1].flatten().tolist() == [2, 3, 6, 7]


def test_masked_pairs_are_those_that_were_no_neighbours_before_the_roll() -> None:
    grid, window, shift = (6, 6), (3, 3), (1, 2)
    place = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), -1)[None].float()
    rows = partition(torch.roll(place, (-1, -2), (1, 2)), window)  # (4, 9, 2): where each token was
    apart = (rows[:, :, None] - rows[:, None]).abs().amax(-1) >= 3  # beyond one window: it came around the edge
    assert torch.equal(shift_mask(grid, window, shift) < 0, apart)


def test_relative_index_counts_offsets() -> None:
    index = relative_index((2, 3))
    assert index[0, 5] == 0  # the most negative offset
    assert index[5, 0] == 3 * 5 - 1
    assert len(index.unique()) == 15
    assert torch.equal(index.diagonal(), torch.full((6,), 7))


def test_windows_shrink_to_the_grid_and_padding_is_behind() -> None:
    assert fit_window((4, 9), (7, 7), (3, 3)) == ([4, 7], [0, 3])
    padded = pad_to(torch.ones(1, 5, 7, 2), (4, 7))
    assert padded.shape == (1, 8, 7, 2)
    assert padded[:, 5:].eq(0).all()
