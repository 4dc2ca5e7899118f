"""The cells of FlashRNN: how many states and gates each has, and which gates read the input or the last output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cell:
    states: int
    gates: int  # all gates; the bias has as many
    inputs: slice  # which of them x has a part in
    recurrents: slice  # which of them h has a part in

    @property
    def input_gates(self) -> int:
        return int(self.inputs.stop - self.inputs.start)

    @property
    def recurrent_gates(self) -> int:
        return int(self.recurrents.stop - self.recurrents.start)


CELLS = {
    "lstm": Cell(states=2, gates=4, inputs=slice(0, 4), recurrents=slice(0, 4)),
    "gru": Cell(states=1, gates=4, inputs=slice(1, 4), recurrents=slice(0, 3)),
    "elman": Cell(states=1, gates=1, inputs=slice(0, 1), recurrents=slice(0, 1)),
    "slstm": Cell(states=4, gates=4, inputs=slice(0, 4), recurrents=slice(0, 4)),
}


def with_input(Wx: Tensor, b: Tensor, cell: Cell) -> Tensor:
    """The gates without their recurrent part, [T, N, B, G, D]."""
    T, N, B, _, D = Wx.shape
    gates = b[:, None].expand(T, N, B, cell.gates, D).clone(memory_format=torch.contiguous_format)
    gates[..., cell.inputs, :] += Wx
    return gates
