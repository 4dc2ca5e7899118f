"""Recurrent networks with heads on a GPU: our op beside a loop in PyTorch, that loop compiled, and cuDNN's LSTM.

    python benchmarks/flashrnn.py                    prints the tables for this machine's GPU
    python benchmarks/flashrnn.py --write            and keeps them in benchmarks/results/flashrnn.md

Forward and backward at batch 16, 1024 steps, 768 hidden in heads of 64, float32; all competitors once a turn, the median of the
turns. cuDNN's LSTM has no heads: its R is dense, 12 times the products in the recurrence; it is given the width of one head as
well, 12 networks of 64 one after another, which is the same mathematics. The ladder of widths is one head as wide as the layer.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import gpu, gpu_seconds, write_table
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.kernels.flashrnn import flashrnn, reference
from tersor.kernels.flashrnn_cells import CELLS

BATCH, STEPS, HIDDEN, HEAD = 16, 1024, 768, 64


def inputs(function: str, batch: int, steps: int, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Wx, R, b, with gradients."""
    cell = CELLS[function]
    Wx = torch.randn(batch, steps, cell.input_gates, heads, width, device="cuda")
    R = torch.randn(cell.recurrent_gates, heads, width, width, device="cuda") * width**-0.5 / 2
    b = torch.zeros(cell.gates, heads, width, device="cuda")
    return Wx.requires_grad_(), R.requires_grad_(), b.requires_grad_()


def training(form: Callable[..., Any], leaves: tuple[Tensor, ...], **options: Any) -> Callable[[], None]:
    def run() -> None:
        states, _ = form(*leaves, **options)
        states[0].mean().backward()

    return run


def cudnn(width: int, networks: int) -> Callable[[], None]:
    """LSTMs whose input is as wide as they are; the product with x is in the time, as it cannot be left out."""
    kinds = [nn.LSTM(width, width, batch_first=True).cuda() for _ in range(networks)]
    x = torch.randn(BATCH, STEPS, width, device="cuda", requires_grad=True)

    def run() -> None:
        for each in kinds:
            each(x)[0].mean().backward()

    return run


def medians(competitors: dict[str, Callable[[], Any]], turns: int) -> dict[str, float | str]:
    """Milliseconds; the reason where one fails."""
    times: dict[str, list[float]] = {label: [] for label in competitors}
    failed: dict[str, str] = {}
    for turn in range(turns + 1):
        for label, call in competitors.items():
            if label in failed:
                continue
            try:
                taken = gpu_seconds(call)
            except (TersorError, RuntimeError) as error:
                failed[label] = str(error).splitlines()[0][:60]
                continue
            times[label] += [taken] if turn else []
    return {label: failed.get(label) or statistics.median(each) * 1e3 for label, each in times.items()}


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument(
        "--compiled", action="store_true", help="also the loop under torch.compile, which takes minutes"
    )
    arguments = parser.parse_args()
    lines = [
        "# Recurrent networks with heads, forward and backward\n",
        f"{gpu()}, float32 (TF32 "
        f"{'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}), batch {BATCH}, {STEPS} steps, "
        f"{HIDDEN} hidden, heads of {HEAD}.",
        f"Command: `python benchmarks/flashrnn.py --write{' --compiled' if arguments.compiled else ''}`. Milliseconds.\n",
        "| cell | loop | loop, compiled | op, plain | op, fused | cuDNN, dense | cuDNN, 12 of 64 | fused over the loop |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for function in CELLS:
        leaves = inputs(function, BATCH, STEPS, HIDDEN // HEAD, HEAD)
        competitors = {
            "loop": training(reference, leaves, function=function),
            "plain": training(flashrnn, leaves, function=function, fused=False),
            "fused": training(flashrnn, leaves, function=function, fused=True),
        }
        if function == "lstm":
            competitors |= {"dense": cudnn(HIDDEN, 1), "heads": cudnn(HEAD, HIDDEN // HEAD)}
            if arguments.compiled:
                short = inputs(
                    function, BATCH, 64, HIDDEN // HEAD, HEAD
                )  # unrolled: 1024 steps take too long to compile
                compiled = training(torch.compile(reference), short, function=function)
                competitors["compiled"] = compiled
        found = medians(competitors, arguments.turns)
        if "compiled" in found and isinstance(found["compiled"], float):
            found["compiled"] = f"{found['compiled'] * STEPS / 64:.2f} (16 x 64 steps)"
        columns = [shown(found.get(label, "")) for label in ("loop", "compiled", "plain", "fused", "dense", "heads")]
        loop, fused = found["loop"], found["fused"]
        times = f"{loop / fused:.1f}" if isinstance(loop, float) and isinstance(fused, float) else ""
        lines.append(f"| {function} | {' | '.join(columns)} | {times} |")
        print(lines[-1], flush=True)
    lines += [
        "\nOne head as wide as the layer, lstm, 256 steps, batch 16:\n",
        "| width | op, fused | cuDNN |",
        "| ---: | ---: | ---: |",
    ]
    for width in (32, 64, 128, 256, 512, 1024):
        leaves = inputs("lstm", BATCH, 256, 1, width)
        found = medians(
            {
                "fused": training(flashrnn, leaves, function="lstm", fused=True),
                "plain": training(flashrnn, leaves, function="lstm", fused=False),
            },
            3,
        )
        lines.append(f"| {width} | {shown(found['fused'])} | plain {shown(found['plain'])} |")
        print(lines[-1], flush=True)
    text = (
        "\n".join(lines)
        .replace("| width | op, fused | cuDNN |", "| width | op, fused | op, plain |")
        .replace("| plain ", "| ")
        + "\n"
    )
    print(text)
    if arguments.write:
        write_table("flashrnn", text)


if __name__ == "__main__":
    main()
