"""Furthest point sampling (PointNet++, arXiv 1706.02413): of a cloud, points that lie far from each other.

    i_0 = 0,    i_k = argmax_j min_{l < k} |p_j - p_{i_l}|^2

points [b, n, 3] -> [b, count], int64: the rows that are taken, in this order. Points with |p|^2 <= 1e-3 are never taken, as in
the usual CUDA operator, whose padding is zeros; where no other point is left, row 0 is taken again.

`reference` is the loop. Models call `furthest_points`: the op `tersor::furthest_points`, one node of an exported graph instead of
thousands.
"""

from __future__ import annotations

import torch
from torch import Tensor

ORIGIN = 1e-3  # squared radius around the origin in which points count as padding


def reference(points: Tensor, count: int) -> Tensor:
    batch = torch.arange(len(points), device=points.device)
    eligible = points.square().sum(-1) > ORIGIN  # [b, n]
    nearest = torch.where(eligible, torch.inf, -1.0)  # squared distance to the points taken so far
    taken = torch.zeros(len(points), count, dtype=torch.int64, device=points.device)
    for step in range(1, count):
        distance = (points - points[batch, taken[:, step - 1], None]).square().sum(-1)
        nearest = torch.where(eligible, torch.minimum(nearest, distance), nearest)
        taken[:, step] = nearest.argmax(1)  # of equals the first: row 0 where none is eligible
    return taken


def furthest_points(points: Tensor, count: int) -> Tensor:
    """As `reference`. The choice has no gradient."""
    rows: Tensor = _furthest_points(points.detach(), count)
    return rows


@torch.library.custom_op("tersor::furthest_points", mutates_args=())
def _furthest_points(points: Tensor, count: int) -> Tensor:
    return reference(points, count)


@_furthest_points.register_fake
def _(points: Tensor, count: int) -> Tensor:
    return points.new_empty(points.shape[0], count, dtype=torch.int64)
