"""Which architectures `tersor export --onnx` writes, and why the others are left out.

    python benchmarks/onnx_export.py [PATTERN]

Each registered architecture in its small form (the one that the tests build), with random weights. "any batch": the file takes
batches of any size. Difference: the largest between onnxruntime and torch in float32, as a share of the largest output.
Milliseconds: one call with a batch of 2, one thread; these models are tiny, so they show what a call costs, not how fast the
published sizes are. An architecture that takes over 60 seconds of CPU time is given up.
"""

from __future__ import annotations

import platform
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import kept_numbers, processor, versions, write_numbers, write_table

import tersor
import tersor.models
from tersor.errors import TersorError
from tersor.runtime.onnx_export import export_module

SECONDS = 60


class Late(BaseException):
    """Not an Exception, so that no try on the way keeps it."""


@contextmanager
def limited() -> Iterator[None]:
    """Raise Late after SECONDS of this process's own time."""

    def stop(*_: Any) -> None:
        raise Late

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def tried(name: str, folder: Path) -> list[str]:
    """The cells of the architecture's row, after its name."""
    info = tersor.models.find(name)
    torch.manual_seed(0)
    try:
        with limited():
            model = tersor.models.create(name, **info.small).eval()
            found = export_module(model, folder / "model.onnx", overwrite=True)
    except Late:
        return [info.family, "no", "", "", "", f"took over {SECONDS} seconds of CPU time"]
    except TersorError as error:
        return [info.family, "no", "", "", "", one_line(str(error))]
    batch = "any batch" if found.fixed is None else "fixed batch"
    times = (f"{found.onnx_ms:.2f}", f"{found.torch_ms:.2f}")
    return [info.family, batch, f"{found.difference:.0e}", *times, one_line(found.fixed or "")]


def one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/").replace("<", "&lt;")


def main() -> None:
    pattern = sys.argv[1] if len(sys.argv) > 1 else "*"
    systems = sorted({each.system for each in tersor.models.list(pattern)})
    rows = kept_numbers("onnx_export")  # so that PATTERN adds to them
    with tempfile.TemporaryDirectory() as folder:
        for system in systems:
            rows[system] = tried(system, Path(folder))
            print(system, rows[system], flush=True)
            write_numbers("onnx_export", dict(sorted(rows.items())))
            write(rows)


def write(rows: dict[str, list[str]]) -> None:
    known = {each.system for each in tersor.models.list()}
    exported = sum(cells[1] != "no" for cells in rows.values())
    partial = f" (partial: {len(rows)} of {len(known)} tried)" if set(rows) < known else ""
    lines = [f"# Which architectures export to ONNX{partial}", "", *(__doc__ or "").splitlines()[4:], ""]
    lines += [f"{exported} of {len(rows)} are exported."]
    if missing := sorted(known - set(rows)):
        lines += [f"Not tried yet: {', '.join(missing)}."]
    lines += ["", "| architecture | family | ONNX | difference | onnxruntime, ms | torch, ms | why not, or why fixed |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {' | '.join([name, *cells])} |" for name, cells in sorted(rows.items(), key=lambda row: row[1][0])]
    lines += [
        "",
        f"On a shared machine: {processor()}; {platform.system()}; {versions('onnxruntime')}.",
        "",
        "`python benchmarks/onnx_export.py`",
    ]
    write_table("onnx_export", "\n".join(lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
