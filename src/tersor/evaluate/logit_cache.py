"""Logits of an original, window by window on disk, exactly: computed once, so that no second model has to be in memory.

A file holds one window: the logits in the model's own dtype, their bytes sorted by significance (the high ones are alike and
pack well), through zlib. Its name is a hash of the model's files, the window's tokens, the dtype and the device. A folder keeps
to a size: the files that were used longest ago go first.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tersor.checkpoint.disk import disk_errors
from tersor.checkpoint.hashes import bytes_of
from tersor.errors import TersorError
from tersor.files import replacing

SUFFIX = ".logits"
LEVEL = 1
DTYPES = {
    str(each).removeprefix("torch."): each for each in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Kept:
    """What the cache holds of one window."""

    logits: Tensor  # [tokens, vocabulary]
    noise: Tensor | None  # [tokens]: divergence of the original in bfloat16; None where it was not asked for


@dataclass(frozen=True)
class LogitCache:
    """A folder that keeps a model's logits."""

    folder: Path  # it exists
    most: int  # bytes that its files may take
    key: str  # of the model, its dtype and its device

    def path_of(self, window: Tensor) -> Path:
        digest = hashlib.sha256(self.key.encode() + bytes(bytes_of(window.to(torch.int64))))
        return self.folder / f"{digest.hexdigest()[:40]}{SUFFIX}"

    def get(self, window: Tensor, *, noise: bool) -> Kept | None:
        """The window's logits. None where they are not there, are broken, or lack the noise that is asked for."""
        path = self.path_of(window)
        try:
            found = load(zlib.decompress(path.read_bytes()))
            name = next(each for each in DTYPES if each in found)
            planes, shape = found[name], found["shape"].tolist()
            logits = planes.t().contiguous().view(DTYPES[name]).reshape(shape)
            os.utime(path)
        except (OSError, zlib.error, SafetensorError, StopIteration, KeyError, RuntimeError):
            return None
        kept = found.get("noise")
        return None if noise and kept is None else Kept(logits, kept)

    def put(self, window: Tensor, kept: Kept) -> None:
        """Keep a window. Raises TersorError where the disk does not take it."""
        logits = kept.logits.detach().cpu().contiguous()
        name = str(logits.dtype).removeprefix("torch.")
        planes = logits.reshape(-1, 1).view(torch.uint8).t().contiguous()  # [bytes of a number, numbers]
        tensors = {name: planes, "shape": torch.tensor(logits.shape)}
        if kept.noise is not None:
            tensors["noise"] = kept.noise
        with disk_errors(self.folder), replacing(self.path_of(window)) as partial:
            partial.write_bytes(zlib.compress(save(tensors), LEVEL))

    def trim(self, *, keep: frozenset[Path] = frozenset()) -> None:
        """Remove the files that were used longest ago until the folder keeps to its size, but never those of `keep`."""
        files = sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        size = sum(path.stat().st_size for path in files)
        for path in files:
            if size <= self.most:
                return
            if path not in keep:
                size -= path.stat().st_size
                path.unlink(missing_ok=True)


def opened_folder(folder: Path) -> Path:
    """The folder of a cache, made where it does not exist. Raises TersorError where the path is something else."""
    folder = folder.expanduser()
    if folder.exists() and not folder.is_dir():
        raise TersorError(f"--cache {folder} is a file; a folder is expected")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def bytes_in(text: str) -> int:
    """2GB, 500MB, 1e9: bytes. Raises TersorError for anything else."""
    units = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "b": 1.0}
    lowered = text.strip().lower()
    unit = next((each for each in units if lowered.endswith(each)), "")
    try:
        found = float(lowered.removesuffix(unit)) * units.get(unit, 1.0)
    except ValueError:
        found = 0.0
    if not 1 <= found < 1e18:
        raise TersorError(f"--cache-size {text}: a size such as 500MB or 4GB is expected")
    return int(found)
