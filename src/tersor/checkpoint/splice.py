"""Make a safetensors file from tensors in other files, by copying bytes. Only a buffer is in memory.

A safetensors file is 8 bytes with the header's length (little-endian), the header (JSON: name -> dtype, shape and the two ends of
its bytes, counted from the header's end), and the bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tersor.checkpoint.hashes import tensor_hash

BUFFER = 2**20  # bytes
ALIGNMENT = 8  # bytes; the header is padded to a multiple with blanks


@dataclass(frozen=True)
class Piece:
    """A tensor's bytes in a file."""

    path: Path
    start: int
    size: int
    described: dict[str, Any]  # its dtype and shape, as the header writes them


def pieces_of(path: Path) -> dict[str, Piece]:
    """Every tensor of a safetensors file, in the file's order."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        described = {key: entry[key] for key in ("dtype", "shape")}
        found[name] = Piece(path, 8 + length + first, last - first, described)
    return found


def splice(pieces: Mapping[str, Piece], target: BinaryIO, *, note: Callable[[str, str], None] | None = None) -> None:
    """Write a safetensors file of these tensors. Those of wider numbers come first, so that all stay aligned.

    note: called with each tensor's name and hash.
    """
    ordered = dict(sorted(pieces.items(), key=lambda item: (-_width(item[1]), item[0])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, piece in ordered.items():
        header[name] = {**piece.described, "data_offsets": [end, end + piece.size]}
        end += piece.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    target.write(len(text).to_bytes(8, "little") + text)
    for name, piece in ordered.items():
        digest = tensor_hash(piece.described["dtype"], piece.described["shape"])
        with piece.path.open("rb") as source:
            source.seek(piece.start)
            _copy(source, target, piece.size, digest if note is not None else None)
        if note is not None:
            note(name, digest.hexdigest())


def _width(piece: Piece) -> int:
    """Bits of one number: 8 for `F8_E4M3`."""
    found = re.search(r"\d+", piece.described["dtype"])
    return int(found[0]) if found else 8  # BOOL


def _copy(source: BinaryIO, target: BinaryIO, size: int, digest: Any) -> None:
    while size > 0:
        part = source.read(min(size, BUFFER))
        if not part:
            raise OSError(f"{source.name} ends before the tensor that its header names does")
        target.write(part)
        if digest is not None:
            digest.update(part)
        size -= len(part)
