"""One result that several processes work on. The first writes it and reads its journal; the others ask the first."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from tersor import processes
from tersor.checkpoint.source import Checkpoint
from tersor.checkpoint.writer import ResultWriter
from tersor.compress.result import Compressed
from tersor.compress.summary import Summary
from tersor.errors import TersorError


def open_writer(out: Path, source: Checkpoint, **more: Any) -> ResultWriter:
    """A writer for `out`: this process's own, or one that all share. `ResultWriter` explains the arguments."""
    return ResultWriter(out, source, **more) if processes.processes() == 1 else _SharedWriter(out, source, **more)


class _SharedWriter(ResultWriter):
    def __init__(self, out: Path, source: Checkpoint, **more: Any) -> None:
        super().__init__(out, source, **more)
        self._writer = ResultWriter(out, source, **more)

    def mark(self, name: str) -> str | None:
        return processes.once(lambda: self._writer.mark(name))

    def check(self, fingerprint: Mapping[str, str], **how: bool) -> bool:
        _compare(fingerprint)
        return processes.once(lambda: self._writer.check(fingerprint, **how))

    def start(self, fingerprint: Mapping[str, str], **how: bool) -> None:
        _compare({"weights": self.seen.whole()})

        def begin() -> dict[str, list[dict[str, Any]]]:
            self._writer.start(fingerprint, **how)
            return self._writer.done

        self.done = processes.once(begin)

    def redo(
        self, blocks: set[str], layers: Mapping[str, Mapping[str, Sequence[str]]], suffixes: Collection[str]
    ) -> None:
        def forget() -> dict[str, list[dict[str, Any]]]:
            self._writer.redo(blocks, layers, suffixes)
            return self._writer.done

        self.done = processes.once(forget)

    def write_block(self, name: str, tensors: Mapping[str, Tensor], reports: list[dict[str, Any]]) -> None:
        processes.once(lambda: self._writer.write_block(name, tensors, reports))
        self.done[name] = reports

    def read_block(self, name: str) -> dict[str, Tensor] | None:
        found = processes.once(lambda: self._writer.read_block(name))
        if found is None:
            self.done.pop(name, None)
        return found

    def place(self, *result: Any) -> None:
        """Only the first process calls this and `seal`."""
        self._writer.place(*result)

    def seal(self) -> None:
        self._writer.seal()


def _compare(mine: Mapping[str, str]) -> None:
    """Raise TersorError where the processes read different files or were asked for different things."""
    for rank, other in enumerate(processes.gather(dict(mine))):
        different = [key for key in mine if other[key] != mine[key]]
        if different:
            raise TersorError(
                f"processes {processes.rank()} and {rank} of this job differ in {' and '.join(different)}; "
                "all machines need the same files"
            )


def lead(result: Compressed) -> Compressed:
    """The first process's result; the others, which wait in `follow`, are told and end too."""
    processes.agree(result.summary)
    return result


def follow(target: Path) -> Compressed:
    """Wait for the first process to write and verify the result."""
    return Compressed(processes.agree(cast(Summary, None)), target)
