"""Compiles a C++ file of this package into a shared library, once per machine, with the machine's own compiler.

The source has a plain C interface and is called through ctypes: no torch headers are needed and one build serves every version
of torch. The library is kept in the user's cache directory under a hash of source, headers, compiler and flags, and one of its
own bytes: a file that a full disk or a power cut left truncated, whose use would end in a bus error, is built again. It gets
its name when it is complete, so processes that build at the same time all end up with a whole file.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CACHE = Path.home() / ".cache" / "tersor" / "kernels"
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.M)
COMPILERS = ("c++", "g++", "clang++")


class CompileError(RuntimeError):
    """The machine has no compiler, or the compiler refuses the source or a flag."""


@functools.cache
def compiler() -> tuple[str, str]:
    """Path and version text of the C++ compiler."""
    if sys.platform == "win32":
        raise CompileError("no build for Windows")
    for name in COMPILERS:
        if path := shutil.which(name):
            version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            if version.returncode == 0:
                return path, version.stdout
    raise CompileError(f"no C++ compiler on the PATH (looked for {', '.join(COMPILERS)})")


def build(source: Path, flags: Sequence[str], *, cache: Path | None = None) -> Path:
    """The shared library of `source`, from the cache if it was built before. Raises CompileError with the compiler's message."""
    path, version = compiler()
    flags = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", *flags)
    key = hashlib.sha256("\0".join([_text(source), path, version, *flags]).encode()).hexdigest()[:24]
    directory = CACHE if cache is None else cache
    stem = f"{source.stem}-{key}"
    for library in directory.glob(f"{stem}-*.so"):
        if library.name == _named(stem, library):
            return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".so", dir=directory)
    except OSError:  # no home directory to write to: build for this process only
        directory = Path(tempfile.mkdtemp(prefix="tersor-"))
        handle, name = tempfile.mkstemp(suffix=".so", dir=directory)
    os.close(handle)
    try:
        result = subprocess.run([path, *flags, str(source), "-o", name], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise CompileError(f"{path} {' '.join(flags)} failed: {result.stderr.strip()[:2000]}")
        library = directory / _named(stem, Path(name))
        os.replace(name, library)
    finally:
        Path(name).unlink(missing_ok=True)
    return library


def _text(source: Path) -> str:
    """Of a source and the headers of this package that it includes."""
    text = source.read_text()
    return "\0".join([text, *(_text(source.parent / name) for name in _INCLUDE.findall(text))])


def _named(stem: str, library: Path) -> str:
    return f"{stem}-{hashlib.sha256(library.read_bytes()).hexdigest()[:24]}.so"


def load(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Builds and loads the library: with OpenMP where the compiler has it, else for one thread.

    torch must be imported before. The library then uses torch's OpenMP runtime, and both share one pool of threads.
    """
    try:
        return ctypes.CDLL(str(build(source, (*flags, "-fopenmp"))))
    except CompileError:
        return ctypes.CDLL(str(build(source, flags)))
