"""`tersor demo`: the main job on the model that comes with the package, and what it costs and saves, in one table."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.checkpoint.names import JOB_FOLDER
from tersor.checkpoint.room import check_free
from tersor.checkpoint.source import open_checkpoint
from tersor.cli.options import AsJson, Samples, print_json
from tersor.cli.progress import progress_bar
from tersor.cli.table import print_table, wrapped
from tersor.compress import GPTQ, RTN, Method, compress
from tersor.compress.settings import counting
from tersor.evaluate.inspection import inspect_checkpoint
from tersor.evaluate.perplexity import perplexity
from tersor.progress import Progress
from tersor.report.collect import collect
from tersor.report.page import check_page, write_page
from tersor.runtime.generate import stream

MODEL = "demo"
PROMPT = "It is a truth universally acknowledged, that"


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Keep the quantized model here; a temporary directory if unset.")
    ] = None,
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    samples: Samples = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens a sample and an evaluation window.")] = 512,
    max_windows: Annotated[int, typer.Option(help="Evaluate only the first windows.")] = 16,
    report: Annotated[Path, typer.Option(help="The page about both results; a report there is replaced.")] = Path(
        "tersor-demo.html"
    ),
    as_json: AsJson = False,
) -> None:
    """Quantize the built-in model and see what was lost. By rounding and by GPTQ, beside the original; then the result writes a
    text.

    Example: `tersor demo --bits 3 --out demo-3bit`.
    """
    if out is not None and not (out / JOB_FOLDER).exists():  # an unfinished job goes on
        check_free(out, overwrite=False)
    if find_spec("plotly") is not None:
        check_page(report)
    rows: list[dict[str, Any]] = []

    def measure(name: str, model: str | Path, seconds: float | None, progress: Progress) -> None:
        def evaluating(what: str, done: int, total: int) -> None:
            progress(f"{name}: {what}", done, total)

        found = perplexity(model, "builtin", seq_len=seq_len, max_windows=max_windows, progress=evaluating)
        size = open_checkpoint(model).size()
        figures = {"size": size, "bits_per_weight": _bits_a_weight(model), "perplexity": found.perplexity}
        rows.append({"name": name, **figures, "seconds": seconds})

    def quantize(name: str, method: Method, target: Path, progress: Progress) -> None:
        def compressing(what: str, done: int, total: int) -> None:
            progress(f"{name}: {what}", done, total)

        started = time.perf_counter()
        asked = counting({"samples": samples, "seq_len": seq_len}, [method])  # rounding looks at none
        compress(MODEL, method, out=target, progress=compressing, **asked)
        measure(name, target, time.perf_counter() - started, progress)

    said = (
        f"The built-in model, a LLaMA of 12.6 million parameters, is quantized to {bits} bits twice: by rounding each weight "
        f"to the nearest level, and by GPTQ with {samples} samples of {seq_len} tokens. Both texts, for calibration and for "
        f"perplexity ({max_windows} windows of {seq_len} tokens), are from Python's own documentation."
    )
    if not as_json:
        for line in wrapped([said], indent=0):
            typer.echo(line)
        typer.echo()
    with tempfile.TemporaryDirectory(prefix="tersor-demo-") as folder:
        target = out.absolute() if out else Path(folder) / "gptq"  # `demo` is the user's directory here
        rounded = Path(folder) / "rtn"
        with progress_bar(quiet=as_json) as progress:
            measure("original", MODEL, None, progress)
            quantize("round to nearest", RTN(bits=bits), rounded, progress)
            quantize("GPTQ", GPTQ(bits=bits), target, progress)
            told = _report([target, rounded], report, seq_len, max_windows, progress)
        written = "".join(stream(target, PROMPT, max_new_tokens=48, temperature=0.7, seed=1))
        end = written.find(".") + 1
        text = PROMPT + written[: end or None]
        if as_json:
            print_json({"models": rows, "text": text})
            return
        print_table(("", "size on disk", "bits a weight", "perplexity", "seconds"), map(_cells, rows))
        typer.echo(f"\n{told}")
        typer.echo(f"\nThe GPTQ model goes on with a sentence:\n\n{text}")
    if out is not None:
        typer.echo(f"\nThe quantized model is in {out}: tersor generate {out} --prompt '...'")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
    size, bits = f"{row['size'] / 1e6:.1f} MB", f"{row['bits_per_weight']:.2f}"
    return row["name"], size, bits, f"{row['perplexity']:.2f}", seconds


def _report(results: Sequence[Path], page: Path, seq_len: int, windows: int, progress: Progress) -> str:
    """Write the page, and say where it is."""
    if find_spec("plotly") is None:
        return "A page with what was lost, and where, needs plotly: pip install 'tersor[report]'"
    found = collect(results, against=MODEL, seq_len=seq_len, max_windows=windows, progress=progress)
    write_page(found, page)
    return f"What was lost, and where, is a page: open {page.absolute()}"


def _bits_a_weight(model: str | Path) -> float:
    """Over the linear layers of all blocks, scales and zero points included."""
    bits = weights = 0.0
    for group in inspect_checkpoint(model).blocks:
        for (rows, columns), each in zip(group.shapes, group.bits, strict=True):
            bits += group.count * rows * columns * each
            weights += group.count * rows * columns
    return bits / weights
