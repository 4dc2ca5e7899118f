"""One linear map's weight in plain numbers, for methods that do not round to a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseWeight:
    """A weight in plain numbers."""

    matrix: Tensor  # floating [out, in], in the dtype in which it is stored

    @property
    def out_features(self) -> int:
        return self.matrix.shape[0]

    @property
    def in_features(self) -> int:
        return self.matrix.shape[1]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.matrix.to(dtype or self.matrix.dtype)

    def rows(self, start: int, stop: int) -> DenseWeight:
        """Outputs start .. stop - 1 as a weight of their own."""
        return DenseWeight(self.matrix[start:stop])

    @classmethod
    def stack_rows(cls, parts: Sequence[DenseWeight]) -> DenseWeight:
        """Inverse of `rows`."""
        return cls(torch.cat([part.matrix for part in parts]))

    def to(self, device: torch.device | str) -> DenseWeight:
        return DenseWeight(self.matrix.to(device))
