"""What a user is told when a disk refuses."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tersor.errors import TersorError


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """A failure to write is a TersorError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full:
            raise TersorError(f"the disk of {out} is full; make room and give the same command again") from None
        raise TersorError(f"cannot write to {out}: {error}") from None
