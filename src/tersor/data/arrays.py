"""Arrays of one .npz as a data set: row i of each is sample i."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tersor.errors import TersorError
from tersor.untrusted import read_npz, readable


class Arrays(Dataset[dict[str, Tensor]]):
    def __init__(self, arrays: Mapping[str, Tensor]) -> None:
        self.arrays = dict(arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.arrays.items()}


def load_arrays(path: str | Path, names: Mapping[str, str]) -> Arrays:
    """names: array in the file -> name in the items. Numbers with a fraction become float32, whole ones int64.

    Raises TersorError where an array is missing, has another number of rows than the first, or is not finite.
    """
    path = Path(path).expanduser()
    with readable(path):
        if not path.is_file():
            raise TersorError(f"there is no file {path}; an .npz with {', '.join(names)} is expected")
    found = {}
    for stored, values in read_npz(path, names).items():
        if values.dtype.kind not in "fiu" or values.ndim < 1 or not len(values):
            raise TersorError(f"{path}: {stored} is {values.dtype} {list(values.shape)}, rows of numbers are expected")
        whole = values.dtype.kind in "iu"
        found[names[stored]] = torch.from_numpy(np.array(values, np.int64 if whole else np.float32))
        if not whole and not bool(torch.isfinite(found[names[stored]]).all()):
            raise TersorError(f"{path}: {stored} holds NaN or Inf")
    rows = {name: len(values) for name, values in found.items()}
    if len(set(rows.values())) > 1:
        raise TersorError(f"{path}: the arrays have unlike numbers of rows, {rows}")
    return Arrays(found)
