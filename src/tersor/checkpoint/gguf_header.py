"""The header of a GGUF file: its metadata, and the type, shape and place of every tensor.

The `gguf` package makes an array of every token, which is slow for a large vocabulary, so the header is read here. Layout, all
little-endian: magic, version, numbers of tensors and fields; for each field name, type and value; for each tensor name,
dimensions from the innermost on, type and offset; then, aligned, the tensors. Source: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tersor.errors import TersorError
from tersor.untrusted import regular_file

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_SIZES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20)}
_SIZES |= {6: ("Q5_0", 32, 22), 8: ("Q8_0", 32, 34)}  # number: name, weights and bytes of a block


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    number: int  # its type's
    kind: str  # its type's name
    shape: tuple[int, ...]  # outermost dimension first
    start: int  # its first byte in the file
    stop: int  # the byte behind its last


def gguf_package() -> ModuleType:
    """The `gguf` package. Raises TersorError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise TersorError("GGUF files need the package gguf: pip install 'tersor[gguf]'") from None
    return gguf


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Place]]:
    """Metadata and tensors by name. Raises TersorError where the file is no whole GGUF file."""
    regular_file(path)
    try:
        return _parse(np.memmap(path, mode="r"))
    except (ValueError, TypeError, struct.error, OverflowError, OSError, RecursionError, MemoryError) as error:
        raise TersorError(f"{path} cannot be read as a GGUF file: {error}") from None


def _parse(data: Any) -> tuple[dict[str, Any], dict[str, Place]]:
    reader = _Reader(memoryview(data))
    if bytes(data[:4]) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    _, version = reader.take("II")
    if version not in (2, 3):  # in the other byte order the version is a huge number
        raise ValueError(f"its version is {version}; versions 2 and 3 in little-endian order are read")
    tensors, fields = reader.take("QQ")
    said = {}
    for _ in range(fields):
        name = reader.string()
        said[name] = reader.value(reader.take("I")[0])
    found = []
    for _ in range(tensors):
        name, (dimensions,) = reader.string(), reader.take("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"its tensor {name} has {dimensions} dimensions")
        shape = reader.take(f"{dimensions}Q")
        found.append((name, tuple(reversed(shape)), *reader.take("IQ")))
    alignment = said.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise ValueError(f"its alignment is {alignment!r}")
    begin = -(-reader.at // alignment) * alignment
    places = {}
    for name, shape, number, offset in found:
        kind, block, size = _type(number)
        if name in places:
            raise ValueError(f"it has two tensors {name}")
        if min(shape) < 1 or shape[-1] % block:
            raise ValueError(f"its tensor {name} of {kind} is {shape}, which are no whole blocks of {block}")
        start = begin + offset
        stop = start + prod(shape) // block * size
        if stop > len(data):
            raise ValueError(f"it ends before its tensor {name} does")
        places[name] = Place(number, kind, shape, start, stop)
    return said, places


def _type(number: int) -> tuple[str, int, int]:
    if number in _SIZES:
        return _SIZES[number]
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType(number)  # ValueError where there is none
    return (str(kind.name), *gguf.GGML_QUANT_SIZES[kind])


class _Reader:
    """A position in the file; each read moves it on. Raises struct.error and ValueError past the end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def string(self) -> str:
        (length,) = self.take("Q")
        if self.at + length > len(self.data):
            raise ValueError("it ends within its metadata")
        text = str(self.data[self.at : self.at + length], "utf-8")
        self.at += length
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.take("IQ")
            if inner not in _SCALARS:
                return [self.value(inner) for _ in range(count)]
            dtype = np.dtype(f"<{_SCALARS[inner]}")
            array = np.frombuffer(self.data, dtype, count, self.at)
            self.at += array.nbytes
            return [_shortest(each) for each in array.tolist()] if inner == _FLOAT32 else array.tolist()
        if kind not in _SCALARS:
            raise ValueError(f"a field has the unknown type {kind}")
        (found,) = self.take(_SCALARS[kind])
        return _shortest(found) if kind == _FLOAT32 else found


def _shortest(value: float) -> float:
    """The shortest decimal number that rounds to this float32: most likely the one that was meant."""
    return float(str(np.float32(value)))
