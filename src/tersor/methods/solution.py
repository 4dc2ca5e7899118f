"""What a method finds for one linear map: its new weight, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tersor.formats.dense_weight import DenseWeight
from tersor.formats.grid import Stored
from tersor.formats.packed_weight import PackedWeight


class AnySolution(Protocol):
    """A frozen dataclass; its tensors may be sent to other processes. `weights/gptq_solver.py` has one of integers on grids."""

    @property
    def error(self) -> float:
        """The method's own measure."""

    @property
    def damp(self) -> float: ...
    @property
    def condition(self) -> float | None:
        """A lower bound of the damped Hessian's condition number, where it was factorized."""

    @property
    def sparsity(self) -> float | None:
        """Share of the weights that are zero; None where the method does not prune."""

    @property
    def width(self) -> int:
        """Bits of a number in the result."""

    @property
    def group_size(self) -> int:
        """Columns that share a grid; -1: all of a row, or there are no grids."""

    def dequantize(self) -> Tensor:
        """The weight that a reader of the result gets back, [rows, columns]."""

    def pack(self, stored: Stored | None) -> PackedWeight | None:
        """The weight as a file stores it; None where no file format can hold it."""


@dataclass(frozen=True)
class DenseSolution:
    """A weight in plain numbers."""

    weight: Tensor  # [rows, columns], in the dtype in which it is stored
    error: float
    damp: float = 0.0
    sparsity: float | None = None
    condition: float | None = None
    group_size: ClassVar[int] = -1

    @property
    def width(self) -> int:
        return torch.finfo(self.weight.dtype).bits

    def dequantize(self) -> Tensor:
        return self.weight

    def pack(self, stored: Stored | None) -> DenseWeight:
        return DenseWeight(self.weight)


def dense_solution(
    weight: Tensor, stored: Stored | None, *, error: float, damp: float = 0.0, sparsity: float | None = None
) -> DenseSolution:
    """weight [rows, columns] in the dtype that config.json names: the file holds all of them in it, whatever single tensors
    had."""
    kept = weight if stored is None else weight.to(stored.scale_dtype)
    return DenseSolution(kept, error, damp, sparsity)
