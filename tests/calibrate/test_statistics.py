"""Which linear maps of a block share the statistics of their input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.calibrate.activations import Activations
from tersor.calibrate.hessian import Hessian
from tersor.calibrate.lockstep import Call
from tersor.calibrate.routing import Rows
from tersor.calibrate.statistics import gather_hessians
from tersor.layers.linear_map import input_matrix


class Parallel(nn.Module):
    """Convolutions of one input: two alike, one of them dilated, one of 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 3, 3, padding=1)
        self.second = nn.Conv2d(4, 5, 3, padding=1)
        self.dilated = nn.Conv2d(4, 3, 3, padding=2, dilation=2)
        self.point = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.first(x), self.second(x), self.dilated(x), self.point(x)


def test_convolutions_of_one_input_share_them_where_they_read_the_same_windows() -> None:
    block, x = Parallel(), torch.randn(2, 4, 6, 5)
    maps = dict(block.named_children())
    call = Call(0, (0,), (x,), {}, block, Activations("memory"))
    gathered = gather_hessians(maps, [call], Rows(), once=True)
    assert gathered["first"] is gathered["second"]
    for name, each in maps.items():
        alone = Hessian(gathered[name].total.shape[0])
        alone.add(*input_matrix(each, x))
        torch.testing.assert_close(gathered[name].total, alone.total)
