"""FlatFormer beyond its golden cases: groups, order of rows, samples apart, small samples, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.errors import TersorError
from tersor.models.points.flatformer import group_rows, sort_orders

SMALL = {
    "in_channels": 8,
    "num_heads": 2,
    "num_blocks": 1,
    "window_shape": (3, 3, 1),
    "sparse_shape": (8, 8, 1),
    "output_shape": (8, 8),
    "group_size": 4,
}


def build(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("flatformer", **{**SMALL, **config}).double().eval()


def scan(*counts: int) -> tuple[Tensor, Tensor]:
    """Random pillars in an 8 x 8 grid, so many in each sample."""
    torch.manual_seed(1)
    parts = []
    for sample, count in enumerate(counts):
        cells = torch.randperm(64)[:count]
        parts.append(torch.stack((torch.full_like(cells, sample), cells * 0, cells // 8, cells % 8), 1))
    return torch.randn(sum(counts), 8, dtype=torch.float64), torch.cat(parts)


@pytest.mark.parametrize("counts", [(9, 4, 13), (3, 8), (2, 0, 5)])
def test_every_row_has_a_place_of_its_own_and_groups_stay_in_a_sample(counts: tuple[int, ...]) -> None:
    sample = torch.cat([torch.full((count,), index) for index, count in enumerate(counts)])
    groups = group_rows(sample, 4)
    assert torch.equal(groups.rows[groups.places], torch.arange(len(sample)))
    assert len(groups.places.unique()) == len(sample)
    assert len(groups.rows) % 4 == 0
    of_groups = sample[groups.rows].view(-1, 4)
    assert torch.equal(of_groups, of_groups[:, :1].expand(-1, 4))


def test_whole_groups_hold_no_copies() -> None:
    groups = group_rows(torch.zeros(12), 4)
    assert torch.equal(groups.rows, torch.arange(12))
    assert groups.real is None


@torch.no_grad()
def test_permuted_rows_give_permuted_results() -> None:
    model, (x, coords) = build(), scan(11, 6)
    order = torch.cat((torch.randperm(11), 11 + torch.randperm(6)))
    torch.testing.assert_close(model.encode(x[order], coords[order]), model.encode(x, coords)[order])
    torch.testing.assert_close(model(x[order], coords[order]), model(x, coords))


@torch.no_grad()
@pytest.mark.parametrize("counts", [(11, 6), (3, 6), (6, 2)])
def test_samples_do_not_see_each_other(counts: tuple[int, int]) -> None:
    model, (x, coords) = build(), scan(*counts)
    first = counts[0]
    alone = model.encode(x[:first], coords[:first])
    torch.testing.assert_close(model.encode(x, coords)[:first], alone)


@torch.no_grad()
def test_one_large_group_is_plain_attention_over_the_sample() -> None:
    model, (x, coords) = build(group_size=40, window_shape=(8, 8, 1)), scan(20)
    exact = build(group_size=20, window_shape=(8, 8, 1))  # without an empty place
    exact.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.encode(x, coords), exact.encode(x, coords))


def test_orders_walk_back_and_forth() -> None:
    cells = torch.arange(64)
    coords = torch.stack((cells * 0, cells * 0, cells // 8, cells % 8), 1)
    config = build(window_shape=(4, 4, 1)).config
    for name, order in sort_orders(coords, config).items():
        if name.endswith("_shift"):
            continue
        steps = coords[order][:, 2:].diff(dim=0).abs().sum(1)
        assert sorted(steps.tolist()) == [1] * 62 + [4], name  # a jump only to the next row of windows
        windows = (coords[order][:, 2] // 4 * 2 + coords[order][:, 3] // 4)[::16].tolist()
        assert windows == ([0, 1, 3, 2] if name == "x" else [0, 2, 3, 1])


@torch.no_grad()
def test_map_holds_tokens_at_their_cells_and_zeros_elsewhere() -> None:
    model, (x, coords) = build(), scan(11, 6)
    bev, tokens = model(x, coords, batch_size=3), model.encode(x, coords)
    assert bev.shape == (3, 8, 8, 8)
    sample, _, row, column = coords.unbind(1)
    assert torch.equal(bev[sample, :, row, column], tokens)
    assert int((bev != 0).any(1).sum()) == 17


def test_cells_outside_the_grid_are_refused() -> None:
    x, coords = scan(5)
    coords[0, 3] = 8
    with pytest.raises(TersorError, match=r"from 0 to below \[8, 8\]"):
        build()(x, coords)
    with pytest.raises(TersorError, match=r"coords \(N, 4\), not \[5, 7\]"):
        build()(x[:, :7], coords)
