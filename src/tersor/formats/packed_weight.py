"""What the driver, the readers and the writers need of a compressed weight, whatever its numbers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor


class PackedWeight(Protocol):
    """A weight [out, in] as a method returns it and a format stores it: integers on grids (`QuantizedWeight`) or plain numbers
    (`DenseWeight`). Another kind needs a `Layout` that writes it and, to run packed, a `Kernel` (`quantized_matmul.py`)."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers [out, in]."""

    def rows(self, start: int, stop: int) -> Self:
        """Outputs start .. stop - 1 as a weight of their own."""

    @classmethod
    def stack_rows(cls, parts: Sequence[Self]) -> Self:
        """Inverse of `rows`."""

    def to(self, device: torch.device | str) -> Self: ...
