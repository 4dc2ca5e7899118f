"""A packed layer's weight while it learns: the steps, and the offsets of the integers, in full precision.

    W[o, i] = s[o, g] (q[o, i] - z[o, g])        s = s_0 exp(r) in the file's dtype, q = round(q_0 + v) within the levels in use

r [out, groups] and v [out, in] learn; the gradient passes through both roundings. A forward pass uses W as the file will hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from tersor.formats.grid import Stored, as_stored
from tersor.formats.packing import pack
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.layers.quantized_linear import QuantizedLinear
from tersor.layers.straight_through import straight_through


class TunedWeight:
    """log_step: r [out, groups]. offset: v [out, in]; None where the integers do not move.

    least, largest: the codes that the layer uses, so that ternary levels stay ternary.
    """

    def __init__(self, layer: QuantizedLinear, *, moves: bool = False) -> None:
        self.layer, self.packed = layer, layer.packed
        self.stored = Stored(self.packed.scales.dtype)
        self.start = self.packed.scales.t().float().contiguous()
        self.zeros = self.packed.zeros.t().float().contiguous()
        self.codes = self.packed.codes().contiguous()
        self.least, self.largest = int(self.codes.min()), int(self.codes.max())
        self.log_step = torch.zeros_like(self.start)
        self.offset = torch.zeros(self.codes.shape, device=self.codes.device) if moves else None

    def steps(self) -> Tensor:
        """s [out, groups], as the file holds them."""
        exact = self.start * self.log_step.exp()
        return straight_through(as_stored(exact, self.stored), exact)

    def integers(self) -> Tensor:
        """q [out, in], whole numbers in float32."""
        if self.offset is None:
            return self.codes.float()
        exact = (self.codes + self.offset).clamp(self.least - 0.5, self.largest + 0.5)
        return straight_through(exact.round().clamp(self.least, self.largest), exact)

    def matrix(self) -> Tensor:
        """W [out, in] in float32."""
        return self._by_column(self.steps()) * (self.integers() - self._by_column(self.zeros))

    def _by_column(self, x: Tensor) -> Tensor:
        """x [out, groups] as [out, in]."""
        rows, columns = self.codes.shape
        if self.packed.g_idx is not None:
            return x.index_select(1, self.packed.groups())
        size = columns if self.packed.group_size == -1 else self.packed.group_size
        return x[:, :, None].expand(-1, -1, size).reshape(rows, -1)[:, :columns]

    def forward(self, x: Tensor) -> Tensor:
        bias = self.layer.bias
        return nn.functional.linear(x, self.matrix().to(x.dtype), None if bias is None else bias.to(x.dtype))

    @torch.no_grad()
    def weight(self) -> QuantizedWeight:
        """The weight as the file holds it."""
        scales = self.steps().to(self.packed.scales.dtype).t().contiguous()
        qweight = self.packed.qweight
        if self.offset is not None:
            qweight = pack(self.integers().to(torch.uint8).t(), self.packed.bits, dim=0)
        return replace(self.packed, qweight=qweight, scales=scales)

    def moved(self) -> int:
        """How many integers differ from the start."""
        return int((self.integers() != self.codes).sum())


@contextmanager
def learning(weights: Iterable[TunedWeight]) -> Iterator[None]:
    """Meanwhile the layers compute with the learning weights; in the end they keep what was learned."""
    held = list(weights)
    for each in held:
        each.layer.forward = each.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for each in held:
            del each.layer.forward
    for each in held:
        each.layer.put(each.weight())


@contextmanager
def requiring(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Meanwhile these tensors gather gradients."""
    for each in parameters:
        each.requires_grad_(True)
    try:
        yield
    finally:
        for each in parameters:
            each.requires_grad_(False)
