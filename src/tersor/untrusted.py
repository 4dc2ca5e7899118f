"""The door: files and numbers that others made. Whatever is read from a model, a recipe or a data file comes through here.

A file must be a regular one of bounded size, a path in it must stay in its directory, JSON and YAML are bounded in depth and
length, a pattern has a second to match, an archive is opened for what it really holds. What does not do is a TersorError that
names the file and the value. Nothing is allocated because a file says so: only what the file's own bytes can fill.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import stat
import tomllib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from tersor.errors import TersorError

JSON_BYTES = 64 << 20  # the index of a model of a trillion weights has a fifth of this
TEXT_BYTES = 1 << 30
DEPTH = 64  # of nested lists and mappings
NODES = 100_000  # of a YAML file, whose aliases can stand for more than it holds
SECONDS_A_PATTERN = 1.0
PATTERN_LENGTH = 4096
LAYERS_AT_LEAST = 256  # so many layers a config may name whatever the file holds: layers may share their weights
SIZE_AT_LEAST = 1 << 20
LABELS = EXPERTS = 1 << 20
NUMBERS = range(-(2**63), 2**64)  # counts, and the seeds that torch's generators take

_LAYERS = re.compile(r"(^depths?|layers?|blocks?|block_count|stages)$")
_EXPERTS = re.compile(r"experts?$")
_LABELS = re.compile(r"^num_(labels|classes)$")
_SIZES = re.compile(
    r"(size|dims?|width|channels|chans|features|heads|d_model|d_ff|d_inner|n_embd|n_inner|n_head|rank)$"
)
_POSITIVE = re.compile(
    r"^(hidden_size|d_model|n_embd|embed_dim|num_hidden_layers|n_layer|depth|patch_size|image_size|img_size)$"
)


# ---- files


def regular_file(path: Path, *, most: int | None = None) -> int:
    """The size of a regular file. Raises TersorError for anything else (a FIFO would hang), and above `most` bytes."""
    with readable(path):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise TersorError(f"{path} is no regular file")
    if most is not None and found.st_size > most:
        raise TersorError(f"{path} has {found.st_size:,} bytes; at most {most:,} are read of such a file")
    return found.st_size


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """What the system says of a path, a name too long for it or no permission, as one line."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        name = str(path) if len(str(path)) <= 200 else f"{str(path)[:80]}..."
        raise TersorError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def no_special_files(directory: Path) -> None:
    """Raise TersorError where the directory holds a FIFO, a socket or a device: others that read it would hang."""
    with readable(directory), os.scandir(directory) as entries:
        for each in entries:
            try:
                mode = each.stat().st_mode
            except OSError:  # a dangling link
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise TersorError(f"{each.path} is no regular file")


def inside(directory: Path, name: Any) -> Path:
    """The path of a file that another names. Raises TersorError where it is no text or would leave the directory."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise TersorError(f"{directory} names a file {name!r}, which is no file name")
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or "\\" in name:
        raise TersorError(f"{directory} names the file {name!r}, which lies outside of it")
    return directory / name


def read_bytes(path: Path, *, most: int = TEXT_BYTES) -> bytes:
    """A file's content, unpacked where its name ends in .gz; at most `most` bytes of either."""
    regular_file(path, most=most)
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise TersorError(f"{path} cannot be read: {error}") from None
    if len(content) > most:
        raise TersorError(f"{path} unpacks to more than {most:,} bytes; give a part of it")
    return content


def read_json(path: Path) -> Any:
    """A JSON file. Raises TersorError where it is none, or nested deeper than anything that is meant."""
    content = read_bytes(path, most=JSON_BYTES)
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise TersorError(f"{path} is not valid JSON: {error}") from None
    check_depth(path, found)
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise TersorError(f"{path} holds no object but {type(found).__name__}")
    return found


def read_toml(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(read_bytes(path, most=JSON_BYTES).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TersorError(f"{path} is not valid TOML: {error}") from None
    check_depth(path, found)
    return found


def read_yaml(path: Path) -> Any:
    """A YAML file of plain values, keys all text. Raises TersorError where it contains itself, or aliases blow it up."""
    import yaml

    try:
        text = read_bytes(path, most=JSON_BYTES).decode("utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # which takes the square of the depth, so it is stopped
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                raise TersorError(f"{path} is nested more than {DEPTH} deep, contains itself, or says too much")
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise TersorError(f"{path} is not valid YAML: {error}") from None  # ValueError: a date that is none
    check_depth(path, found, nodes=NODES)
    return found


def check_depth(path: Path | str, value: Any, *, nodes: int | None = None) -> None:
    """Raise TersorError where lists and mappings are nested too deeply, hold too much, or have keys that are no text."""
    waiting, count = [(value, 0)], 0
    while waiting:
        each, depth = waiting.pop()
        count += 1
        if depth > DEPTH or (nodes is not None and count > nodes):
            raise TersorError(f"{path} is nested more than {DEPTH} deep, contains itself, or says too much")
        if isinstance(each, Mapping):
            if (key := next((key for key in each if not isinstance(key, str)), None)) is not None:
                raise TersorError(f"{path}: {key!r} is no name; put it in quotes if it is meant as one")
            waiting.extend((inner, depth + 1) for inner in each.values())
        elif isinstance(each, list | tuple | set):
            waiting.extend((inner, depth + 1) for inner in each)


# ---- what transformers reads for us


def pretrained(auto: Any, place: Path | str, what: str) -> Any:
    """`auto.from_pretrained(place)` of an Auto class of transformers. The model's own code is never run, and nobody is asked
    whether it may be. Raises TersorError where it would be needed, or the files are broken."""
    if Path(place).is_dir():
        no_special_files(Path(place))
    try:
        return auto.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # the libraries raise errors of all kinds, Rust's as a bare Exception
        if "trust_remote_code" in str(error):
            raise TersorError(
                f"the {what} of {place} needs the model's own code, which tersor does not run; save it as one of "
                "transformers' own kinds, or give another"
            ) from None
        raise TersorError(f"the {what} of {place} cannot be loaded: {first_words(error)}") from error


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey: names in it may come from foreign files."""
    return "".join(each if each.isprintable() else "?" for each in text)


def first_words(error: BaseException, most: int = 300) -> str:
    """An error's message in one line, or its kind where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}..."


# ---- patterns


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    import regex  # transformers needs it too; unlike `re`, it stops when told

    if len(pattern) > PATTERN_LENGTH:
        raise TersorError(f"the pattern {pattern[:40]!r}... has {len(pattern)} characters; {PATTERN_LENGTH} are read")
    try:
        return regex.compile(pattern)
    except (regex.error, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise TersorError(f"the pattern {pattern!r} is no regular expression: {error}") from None


def matches(pattern: Any, name: str) -> bool:
    """Whether a config's regular expression matches the begin of a name. Raises TersorError where it takes a second."""
    if not isinstance(pattern, str):
        raise TersorError(f"a pattern is {pattern!r}; text is expected")
    try:
        return _compiled(pattern).match(name, timeout=SECONDS_A_PATTERN) is not None
    except TimeoutError:
        raise TersorError(f"the pattern {pattern!r} takes too long on {name}: it could run for ever") from None


# ---- the numbers of a config


def check_config(path: Path | str, config: Mapping[str, Any], *, tensors: int, size: int) -> None:
    """Raise TersorError where a config names what no file of so many tensors and bytes can hold.

    Counts of layers are bounded by the tensors, for each layer has some; widths by the weights, at
    most 8 in a byte. These bounds are wide: they only keep a module from being built for hours that the file cannot fill.
    """
    most = {
        _LAYERS: max(LAYERS_AT_LEAST, tensors),
        _EXPERTS: EXPERTS,
        _LABELS: LABELS,
        _SIZES: max(SIZE_AT_LEAST, 8 * size),
    }
    waiting: list[tuple[str, str, Any]] = [("", key, value) for key, value in config.items()]
    while waiting:
        above, key, value = waiting.pop()
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            waiting.extend((f"{name}.", str(inner), each) for inner, each in value.items())
            continue
        bound = next((bound for pattern, bound in most.items() if pattern.search(key)), None)
        if bound is None:
            continue
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                if _POSITIVE.match(key) and number is not None and not isinstance(number, list):
                    raise TersorError(f"{path}: {name} is {number!r}; a whole number is expected")
                continue
            if not number <= bound:  # also NaN
                raise TersorError(
                    f"{path}: {name} is {_short(number)}, more than a checkpoint of {tensors} tensors in {size:,} bytes can hold"
                )
            if number <= 0 and _POSITIVE.match(key):
                raise TersorError(f"{path}: {name} is {_short(number)}; it must be positive")


def _short(number: float) -> str:
    try:
        return str(number)
    except ValueError:  # more digits than Python writes out
        return "a number of thousands of digits"


def check_seed(seed: int) -> None:
    check_number("the seed", seed)


def check_number(name: str, value: Any) -> None:
    """Raise TersorError for a whole number that no program takes."""
    if isinstance(value, int) and value not in NUMBERS:
        raise TersorError(f"{name} {_short(value)} does not fit in 64 bits")


def check_at_once(what: str, number: int) -> None:
    """Raise TersorError where more processes or threads are asked for than a machine of this size can have any use for."""
    most = max(256, 8 * (os.cpu_count() or 1))
    if not 0 <= number <= most:
        raise TersorError(f"{what} {number}: this machine has {os.cpu_count()} cores; at most {most} make sense")


# ---- archives of numpy


def read_npz(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Arrays of an .npz file. Each must be as long as its header says, hold no Python objects, and all together no more than
    twenty times the file: a header can claim any size, and a few kilobytes can unpack to gigabytes."""
    import numpy as np

    size = regular_file(path)
    left = max(64 << 20, 20 * size)
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                entry = archive.getinfo(f"{name}.npy")
                left -= entry.file_size
                if left < 0:
                    raise ValueError(f"{name} unpacks to {entry.file_size:,} bytes, far more than the file's {size:,}")
                with archive.open(entry) as file:
                    content = file.read(entry.file_size + 1)
                found[name] = _array(np, name, content)
    except (
        KeyError,
        ValueError,
        OSError,
        EOFError,
        RuntimeError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise TersorError(f"{path} cannot be read: {' '.join(reason.split())}") from None
    return found


def read_npy(path: Path, *, most: int = TEXT_BYTES) -> Any:
    """The array of an .npy file, as long as its header says and without Python objects, at most `most` bytes."""
    import numpy as np

    try:
        return _array(np, "the array", read_bytes(path, most=most))
    except ValueError as error:
        raise TersorError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _array(np: Any, name: str, content: bytes) -> Any:
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} is of version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # the header is Python source, and its parser has errors of its own
        raise ValueError(f"{name} has a header that is none: {error}") from None
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled Python objects, which could run code")
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"{name} says it is {shape} of {dtype}; it holds {len(content) - file.tell():,} bytes")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
