"""Places of a text file, plain or gzipped, that is too long to be held in memory as tokens."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tersor.errors import TersorError
from tersor.untrusted import TEXT_BYTES, regular_file

LONG = 1 << 21  # bytes; a shorter text is read whole, at about 150 bytes of memory a byte while it is tokenized
CHUNK = 1 << 20


def text_length(path: Path) -> int:
    """Bytes of a text, unpacked. Raises TersorError where it is no file, or unpacks to too much."""
    size = regular_file(path)
    if path.suffix != ".gz":
        return size
    length = 0
    for chunk in _chunks(path):
        length += len(chunk)
        if length > TEXT_BYTES:
            raise TersorError(f"{path} unpacks to more than {TEXT_BYTES:,} bytes; give a part of it")
    return length


def pieces(path: Path, starts: Sequence[int], size: int) -> Iterator[str]:
    """The text of `size` bytes from each place on, whole characters only. starts: in rising order."""
    if path.suffix == ".gz":
        waiting, buffer, first = list(starts), b"", 0  # buffer: what is unpacked, from the byte `first` on
        for chunk in _chunks(path):
            buffer += chunk
            while waiting and waiting[0] + size <= first + len(buffer):
                yield _text(path, buffer[waiting[0] - first :][:size], waiting.pop(0))
            if not waiting:
                return
            past = min(waiting[0] - first, len(buffer))
            buffer, first = buffer[past:], first + past
        for start in waiting:
            yield _text(path, buffer[start - first :][:size], start)
        return
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            yield _text(path, file.read(size), start)


def _chunks(path: Path) -> Iterator[bytes]:
    """A gzipped file, unpacked part by part."""
    try:
        with gzip.open(path) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise TersorError(f"{path} cannot be read: {error}") from None


def _text(path: Path, data: bytes, start: int) -> str:
    """Without the parts of characters at both ends."""
    first = next((n for n in range(min(4, len(data))) if data[n] & 0xC0 != 0x80), 0) if start else 0
    for last in range(len(data), max(first, len(data) - 4), -1):
        try:
            text = data[first:last].decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start + first < len(data) - 4:
                raise TersorError(
                    f"{path} is not UTF-8 text: byte {start + first + error.start} is {data[first + error.start]:#04x}"
                ) from None
            continue
        if "\0" in text:
            raise TersorError(f"{path} is a binary file, not text")
        return text
    raise TersorError(f"{path} is not UTF-8 text near byte {start}")
