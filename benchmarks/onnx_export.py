"""Which architectures `tersor export --onnx` writes, and why the others are left out.

    python benchmarks/onnx_export.py [PATTERN]

Each registered architecture in its small form (the one that the tests build), with random weights. "any batch": the file takes
batches of any size. Difference: the largest between onnxruntime and torch in float32, as a share of the largest output.
Milliseconds: one call with a batch of 2, one thread; these models are tiny, so they show what a call costs, not how fast the
published sizes are. An architecture that takes over 60 seconds is given up.
"""

from __future__ import annotations

import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import tersor
import tersor.models
from tersor.errors import TersorError
from tersor.runtime.onnx_export import export_module

RESULT = Path(__file__).parent / "results" / "onnx_export.md"
SECONDS = 60


@contextmanager
def limited() -> Iterator[None]:
    """Raise TimeoutError after SECONDS."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def row(name: str, folder: Path) -> str:
    info = tersor.models.find(name)
    torch.manual_seed(0)
    try:
        with limited():
            model = tersor.models.create(name, **info.small).eval()
            found = export_module(model, folder / "model.onnx", overwrite=True)
    except TimeoutError:
        return f"| {name} | {info.family} | no | | | | took over {SECONDS} seconds |"
    except TersorError as error:
        reason = " ".join(str(error).split()).replace("|", "/").replace("<", "&lt;")
        return f"| {name} | {info.family} | no | | | | {reason} |"
    batch = "any batch" if any(each.endswith("[0]") for each in found.dynamic) else "fixed batch"
    return (
        f"| {name} | {info.family} | {batch} | {found.difference:.0e} | {found.onnx_ms:.2f} | {found.torch_ms:.2f} | |"
    )


def main() -> None:
    pattern = sys.argv[1] if len(sys.argv) > 1 else "*"
    systems = sorted({(each.family, each.system) for each in tersor.models.list(pattern)})
    began, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for _, system in systems:
            rows.append(row(system, Path(folder)))
            print(rows[-1], flush=True)
            if pattern == "*":
                write(rows, len(systems), time.perf_counter() - began)


def write(rows: list[str], total: int, seconds: float) -> None:
    kept = sum("| no |" not in each for each in rows)
    lines = ["# Which architectures export to ONNX", "", *(__doc__ or "").splitlines()[4:], ""]
    lines += [
        f"{kept} of {len(rows)} are exported." if len(rows) == total else f"{len(rows)} of {total} were tried.",
        "",
    ]
    lines += ["| architecture | family | ONNX | difference | onnxruntime, ms | torch, ms | why not |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |", *rows, ""]
    lines += [
        f"{seconds / 60:.0f} minutes on a shared machine, {_processor()}; {platform.system()}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, tersor "
        f"{tersor.__version__}.",
        "`python benchmarks/onnx_export.py`",
    ]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
