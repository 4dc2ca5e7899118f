"""What was measured, kept: one JSON object a line, in the user's cache file.

A row says on which machine it was measured. Speed and memory are never taken from another machine; losses are,
where this machine has nothing nearer.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from tersor.advise.plans import Recipe
from tersor.checkpoint.source import Checkpoint
from tersor.errors import TersorError
from tersor.methods.method import from_options
from tersor.untrusted import readable

DEFAULT = Path("~/.cache/tersor/evidence.jsonl")
EDGE = 1 << 20  # bytes at both ends of each weight file that its mark is made of


@dataclass(frozen=True)
class Evidence:
    """One measured run."""

    model: str
    model_mark: str  # see `model_mark`
    kind: str
    data_mark: str  # see `data_mark`
    recipe: list[dict[str, Any]]
    machine: str  # see `machine_mark`
    version: str
    settings: dict[str, Any]
    disk: int  # bytes
    memory: int  # bytes
    latency: float  # seconds: the median of the turns
    latency_p95: float  # their 95th percentile
    latency_quarters: tuple[float, float]  # their quarters
    scores: list[float]  # the loss of each window or picture
    answers: list[int]  # the classes that it chose
    seconds: float  # of the compression
    loss: float  # against the original on the same data
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            content = json.dumps({**asdict(self), "id": ""}, sort_keys=True)
            object.__setattr__(self, "id", hashlib.sha256(content.encode()).hexdigest()[:8])

    @property
    def steps(self) -> Recipe:
        return tuple(self.recipe)

    @property
    def current(self) -> bool:
        """Whether this version has the methods and the options of the recipe."""
        try:
            for step in self.recipe:
                from_options(step["name"], {key: value for key, value in step.items() if key != "name"})
        except (TersorError, ValueError, TypeError):
            return False
        return True


def read_evidence(path: Path) -> list[Evidence]:
    """The rows of a file; empty where there is no file. Raises TersorError naming a line that is no row."""
    path = path.expanduser()
    with readable(path):
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
    names, rows = {each.name for each in fields(Evidence)}, []
    for number, line in enumerate(lines, 1):
        try:
            said = json.loads(line)
            if not isinstance(said, dict) or set(said) != names:
                raise ValueError("its names are not those of a measured run")
            row = Evidence(**{**said, "latency_quarters": tuple(said["latency_quarters"])})
            if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in row.recipe):
                raise ValueError("its recipe is no list of steps")
        except (ValueError, TypeError) as error:
            if number == len(lines) and not line.endswith("}"):
                continue  # a run was killed while it wrote its last line
            raise TersorError(
                f"{path}, line {number}, is no evidence ({error}); remove the line, or give --evidence"
            ) from None
        rows.append(row)
    return rows


def keep_evidence(path: Path, row: Evidence) -> None:
    """Append a row; whole lines, so that several runs may write to one file."""
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(asdict(row)) + "\n")
    except OSError as error:
        raise TersorError(f"the evidence cannot be kept in {path}: {error.strerror}; give --evidence FILE") from None


def machine_mark(device: torch.device) -> str:
    """This machine as far as speed depends on it: processor, threads, memory, GPU, torch."""
    processor = str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())
    parts: list[Any] = [processor, os.cpu_count(), torch.get_num_threads(), torch.__version__, platform.system()]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    mark = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    return f"{parts[-1] if device.type == 'cuda' else processor}, {torch.get_num_threads()} threads, {mark}"


def model_mark(checkpoint: Checkpoint) -> str:
    """A hash of the config, of all tensors' names and sizes, and of both ends of each weight file."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    digest.update(json.dumps(sorted(checkpoint.bytes_of_tensors().items())).encode())
    for path in sorted(set(checkpoint.shard_of.values())):
        with path.open("rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(0, path.stat().st_size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()[:16]


def data_mark(parts: Sequence[object], files: Sequence[Path]) -> str:
    """A hash of the data that it is evaluated with: settings, and the files' contents (of a folder: names too)."""
    digest = hashlib.sha256(json.dumps([str(part) for part in parts]).encode())
    for path in files:
        if path.is_dir():
            for each in sorted(each for each in path.rglob("*") if each.is_file()):
                with each.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"{each.relative_to(path)} {content}\n".encode())
        else:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
