"""The recurrences of Mamba and Mamba-2, token by token against chunked torch and, on a GPU, Triton: ratios of times.

    python benchmarks/scan.py                    prints the table for this machine's GPU, or else its CPU
    python benchmarks/scan.py --device cpu --write      and keeps it in benchmarks/results/scan_cpu.md

One layer of the 130m models, on a GPU of the 2.8b ones in batches of 8. All competitors run once per turn; a ratio is
the median over the turns. "training" is forward and backward. On a CPU it is one thread, and the seconds are those that
the process had it: what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import processor, versions, write_table
from torch import Tensor

from tersor.kernels import selective_scan, ssd

Tensors = tuple[Tensor, ...]
Competitors = dict[str, Callable[..., Any]]


def mamba1(device: str, batch: int, length: int, channels: int) -> tuple[Tensors, Competitors]:
    x, dt = (torch.randn(batch, length, channels, device=device) for _ in range(2))
    B, C = (torch.randn(batch, length, 16, device=device) for _ in range(2))
    A = -torch.arange(1.0, 17, device=device).repeat(channels, 1)
    tensors = (x, torch.nn.functional.softplus(dt - 4), A, B, C)
    state = x.new_zeros(batch, channels, 16)
    return tensors, {
        "reference": selective_scan.reference,
        "torch": lambda *tensors: selective_scan.chunked(*tensors, state, chunk_size=32),
        "op": selective_scan.selective_scan,
    }


def mamba2(device: str, batch: int, length: int, channels: int) -> tuple[Tensors, Competitors]:
    heads, dtype = channels // 64, torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.randn(batch, length, heads, 64, device=device, dtype=dtype)
    B, C = (torch.randn(batch, length, 1, 128, device=device, dtype=dtype) for _ in range(2))
    dt = torch.nn.functional.softplus(torch.randn(batch, length, heads, device=device) - 4)
    state = torch.zeros(batch, heads, 64, 128, device=device)
    return (x, dt, -torch.linspace(1, 16, heads, device=device), B, C), {
        "reference": ssd.reference,
        "torch": lambda *tensors: ssd.chunked(*tensors, state, chunk_size=64),
        "op": ssd.ssd,
    }


def seconds(call: Callable[..., Any], tensors: Tensors, training: bool) -> float:
    leaves = [each.detach().requires_grad_(training) for each in tensors]
    finish(leaves[0])
    clock = time.perf_counter if leaves[0].is_cuda else time.process_time
    start = clock()
    y = call(*leaves)[0]
    if training:
        y.float().mean().backward()
    finish(y)
    return clock() - start


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def finish(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def rows(device: str, turns: int) -> list[str]:
    batch, channels = (1, 1536) if device == "cpu" else (8, 5120)
    lines = []
    for name, make in (("Mamba", mamba1), ("Mamba-2", mamba2)):
        for length in (256, 1024):
            tensors, competitors = make(device, batch, length, channels)
            for kind in ("forward", "training"):
                if kind == "training":  # plain torch differentiates only some of them: what models call is the op
                    competitors = {label: competitors[label] for label in ("reference", "op")}
                times: dict[str, list[float]] = {label: [] for label in competitors}
                for turn in range(turns + 1):
                    for label, call in competitors.items():
                        taken = seconds(call, tensors, kind == "training")
                        times[label] += [taken] if turn else []
                ratios = {k: ratio(times["reference"], v) for k, v in times.items()}
                torch_ratio = f"{ratios['torch']:.1f}" if "torch" in ratios else ""
                cells = (name, length, kind, f"{min(times['op']) * 1e3:.2f}", torch_ratio, f"{ratios['op']:.1f}")
                lines.append(f"| {' | '.join(map(str, cells))} |")
                print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
    header = f"""# Mamba's recurrences, times faster than token by token

{machine}, one thread, {versions()}.
Command: `python benchmarks/scan.py --device {arguments.device} --turns {arguments.turns} --write`.
The op is `chunked` torch on a CPU, Triton on a GPU, there with bfloat16 for Mamba-2.

| model | tokens | | op, ms | chunked torch | op |
| --- | ---: | --- | ---: | ---: | ---: |
"""
    text = header + "\n".join(rows(arguments.device, arguments.turns)) + "\n"
    print(text)
    if arguments.write:
        write_table(f"scan_{arguments.device}", text)


if __name__ == "__main__":
    main()
