"""A file that is replaced at once: at any moment the old one or the new one, also after a kill or a power cut."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write, beside `path`, which takes its place in the end. An error leaves `path` as it was."""
    handle, name = tempfile.mkstemp(prefix=".tersor-", suffix=".partial", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~umask())  # such files are made for their owner alone
        settle(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def settle(partial: Path, path: Path) -> None:
    """Rename a file once it has reached the disk: after a power cut it is the old one or the new one, never an empty one."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def umask() -> int:
    """The user's mask for new files. Linux tells it; elsewhere it has to be set for a moment, which other threads would see."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Umask:")), 8)
    except (OSError, StopIteration, ValueError):
        mask = os.umask(0)
        os.umask(mask)
        return mask
