"""Furthest point sampling: what is taken, what never is, and that it is one op."""

from __future__ import annotations

import torch

from tersor.kernels.furthest_points import furthest_points, reference


def test_each_point_is_as_far_as_any_from_those_before() -> None:
    points = torch.rand(3, 40, 3, generator=torch.Generator().manual_seed(0)) + 1
    taken = furthest_points(points, 12)
    for cloud, rows in zip(points, taken, strict=True):
        assert rows[0] == 0
        for step in range(1, 12):
            nearest = torch.cdist(cloud, cloud[rows[:step]]).amin(1)
            assert nearest[rows[step]] == nearest.max()


def test_points_at_the_origin_are_padding() -> None:
    points = torch.tensor([[[0.5, 0, 0], [0.02, 0, 0], [0, 0, 0], [0, 0.4, 0], [0, 0, 0.1]]])
    assert furthest_points(points, 3).tolist() == [[0, 3, 4]]
    assert furthest_points(torch.zeros(1, 4, 3), 3).tolist() == [[0, 0, 0]]


def test_the_op_is_one_node_with_the_rows_of_the_reference() -> None:
    class Sample(torch.nn.Module):
        def forward(self, points: torch.Tensor) -> torch.Tensor:
            return furthest_points(points, 20)

    points = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(1))
    exported = torch.export.export(Sample(), (points,))
    assert len([node for node in exported.graph.nodes if node.op == "call_function"]) <= 2  # detach, and the op
    assert torch.equal(exported.module()(points), reference(points, 20))
