"""What a packed weight is worth at every batch size: x · Wᵀ in 4 bits against cuBLAS in float16, on one GPU.

    python benchmarks/gpu_matmul.py            # prints the tables and writes benchmarks/results/gpu_matmul.md
    python benchmarks/gpu_matmul.py --mma      # the kernel of other GPUs than Hopper's: benchmarks/results/gpu_matmul_mma.md

Method: one CUDA graph of launches that take turns over copies of the weight, which together exceed the L2 cache several
times; the median of its replays, over the number of launches; cuBLAS timed right before. Weights and x are random.
`tinygemm` is torch's own int4 kernel (bfloat16, groups of 128). With --mma the kernel for compute capability 8.0 runs, which
the driver translates for the GPU at hand; its cut is measured by the kernel's own code at the first call.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from common import RESULTS, gpu
from torch import Tensor

from tersor.formats.quantized_weight import QuantizedWeight
from tersor.kernels.quantized_matmul import quantized_matmul
from tersor.kernels.quantized_matmul_cuda import HOPPER, architecture_of, launch
from tersor.kernels.quantized_matmul_mma import chosen
from tersor.kernels.tiled_weight import TiledWeight, prepare

# K x N and the speed-ups over cuBLAS float16 that are aimed at, by the largest M they hold for.
SHAPES: dict[tuple[int, int], dict[int, float]] = {
    (4096, 4096): {16: 2.0},
    (4096, 14336): {16: 2.6, 32: 2.1},
    (14336, 4096): {16: 2.6, 32: 2.1},
    (8192, 28672): {16: 3.3, 32: 2.8, 64: 2.2, 128: 1.5},
    (12288, 49152): {16: 3.3, 32: 2.8, 64: 2.2, 128: 1.5},
}
ROWS = (1, 8, 16, 32, 64, 128, 192, 256, 512, 1024, 4096)
TINYGEMM_ROWS = (1, 16, 64)
MMA = "compute_80"
# What Marlin takes on an H200, in microseconds by M: the kernel by mma.sync is to be faster.
MARLIN: dict[tuple[int, int], dict[int, float]] = {
    (4096, 14336): {1: 17.0, 16: 17.2, 64: 29.5},
    (8192, 28672): {1: 49.5, 16: 50.8, 64: 85.2},
    (12288, 49152): {1: 113.8, 16: 118.3, 64: 203.0},
}
MMA_ROWS = (1, 8, 16, 32, 64, 128)
ROTATED_BYTES = 256 * 2**20
WARM_UP = 5


def goal(shape: tuple[int, int], rows: int) -> float:
    return next((speedup for most, speedup in SHAPES[shape].items() if rows <= most), 1.0)


def random_weight(inputs: int, outputs: int, bits: int, group_size: int = 128) -> QuantizedWeight:
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(inputs // group_size, outputs, device="cuda") * 0.01 + 0.005).half()
    zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedWeight.from_codes(codes, scales, zeros, bits=bits, group_size=group_size)


def microseconds(launches: list[Callable[[], object]], replays: int = 21) -> float:
    """The median time of one launch of these, captured in one graph."""
    for run in launches:
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in launches:
            run()
    times = []
    for _ in range(WARM_UP + replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times[WARM_UP:])


def copies(tensor: Tensor) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(max(1, ROTATED_BYTES // tensor.nbytes)))]


def rotated(weight: TiledWeight) -> list[TiledWeight]:
    return [replace(weight, tiles=tiles) for tiles in copies(weight.tiles)]


def time_dense(x: Tensor, weights: list[Tensor]) -> float:
    y = x.new_empty(x.shape[0], weights[0].shape[0])
    return microseconds([lambda w=w: torch.mm(x, w.t(), out=y) for w in weights])  # type: ignore[misc]


def time_packed(x: Tensor, weights: list[TiledWeight]) -> float:
    return microseconds([lambda w=w: quantized_matmul(x, w) for w in weights])  # type: ignore[misc]


def time_mma(x: Tensor, weights: list[TiledWeight]) -> float:
    return microseconds([lambda w=w: launch(x, w, architecture=MMA) for w in weights])  # type: ignore[misc]


def time_tinygemm(x: Tensor, weights: list[Tensor], scales_and_zeros: Tensor) -> float:
    x = x.bfloat16()
    run = torch.ops.aten._weight_int4pack_mm
    return microseconds([lambda w=w: run(x, w, 128, scales_and_zeros) for w in weights])  # type: ignore[misc]


def memory_bandwidth() -> float:
    """Bytes a microsecond, read and written, of an elementwise kernel over 4 GiB."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds([lambda: torch.neg(source, out=target)] * 3)


def random_rows(rows: int, inputs: int) -> Tensor:
    return torch.randn(rows, inputs, dtype=torch.float16, device="cuda")


def four_bits(bandwidth: float) -> list[str]:
    lines = [
        "| K x N | M | cuBLAS fp16 us | 4 bits us | speed-up | goal | TB/s | share of that bandwidth | tinygemm us |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape in SHAPES:
        inputs, outputs = shape
        dense = copies(torch.randn(outputs, inputs, dtype=torch.float16, device="cuda"))
        packed = rotated(prepare(random_weight(inputs, outputs, 4)))
        nibbles = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
        tiny = copies(torch.ops.aten._convert_weight_to_int4pack(nibbles, 8))
        tiny_scales = torch.rand(inputs // 128, outputs, 2, dtype=torch.bfloat16, device="cuda")
        time_dense(random_rows(1, inputs), dense)  # the first one after all this allocation comes out slow
        for rows in ROWS:
            x = random_rows(rows, inputs)
            fp16, ours = time_dense(x, dense), time_packed(x, packed)
            rate = packed[0].tiles.nbytes / ours
            peer = f"{time_tinygemm(x, tiny, tiny_scales):.1f}" if rows in TINYGEMM_ROWS else ""
            missed = "" if fp16 / ours >= goal(shape, rows) else " (missed)"
            lines.append(
                f"| {inputs} x {outputs} | {rows} | {fp16:.1f} | {ours:.1f} | {fp16 / ours:.2f} | "
                f"{goal(shape, rows)}{missed} | {rate / 1e6:.2f} | {rate / bandwidth:.0%} | {peer} |"
            )
            print(lines[-1], flush=True)
    return lines


def other_bits(bandwidth: float) -> list[str]:
    lines = [
        "| K x N | M | bits | us | faster than 4 bits | fewer bytes than 4 bits | TB/s | share of that bandwidth |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for inputs, outputs in ((8192, 28672), (12288, 49152)):
        weights = {bits: rotated(prepare(random_weight(inputs, outputs, bits))) for bits in (4, 8, 3, 2)}
        for rows in (1, 16):
            x = random_rows(rows, inputs)
            times = {bits: time_packed(x, weight) for bits, weight in weights.items()}
            for bits, ours in times.items():
                size = weights[bits][0].tiles.nbytes
                lines.append(
                    f"| {inputs} x {outputs} | {rows} | {bits} | {ours:.1f} | {times[4] / ours:.2f} | "
                    f"{weights[4][0].tiles.nbytes / size:.2f} | {size / ours / 1e6:.2f} | {size / ours / bandwidth:.0%} |"
                )
                print(lines[-1], flush=True)
    return lines


def mma_four_bits(bandwidth: float) -> list[str]:
    hopper = architecture_of(torch.device("cuda", 0)) == HOPPER
    lines = [
        "| K x N | M | cuBLAS fp16 us | 4 bits by wgmma us | 4 bits by mma.sync us | over cuBLAS | Marlin us | share of that "
        "bandwidth | cut |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (inputs, outputs), marlin in MARLIN.items():
        dense = copies(torch.randn(outputs, inputs, dtype=torch.float16, device="cuda"))
        packed = rotated(prepare(random_weight(inputs, outputs, 4)))
        time_dense(random_rows(1, inputs), dense)  # the first one after all this allocation comes out slow
        for rows in MMA_ROWS:
            x = random_rows(rows, inputs)
            fp16, ours = time_dense(x, dense), time_mma(x, packed)
            sibling = f"{time_packed(x, packed):.1f}" if hopper else ""
            peer = f"{marlin[rows]:.1f}{'' if ours < marlin[rows] else ' (missed)'}" if rows in marlin else ""
            lines.append(
                f"| {inputs} x {outputs} | {rows} | {fp16:.1f} | {sibling} | {ours:.1f} | {fp16 / ours:.2f} | {peer} | "
                f"{packed[0].tiles.nbytes / ours / bandwidth:.0%} | {chosen(rows, x.dtype, packed[0], MMA)} |"
            )
            print(lines[-1], flush=True)
    return lines


def mma_other_bits(bandwidth: float) -> list[str]:
    lines = ["| K x N | M | bits | us | share of that bandwidth | cut |", "| --- | --- | --- | --- | --- | --- |"]
    inputs, outputs = 8192, 28672
    for bits in (8, 3, 2):
        weights = rotated(prepare(random_weight(inputs, outputs, bits)))
        for rows in (1, 16):
            x = random_rows(rows, inputs)
            ours = time_mma(x, weights)
            share = weights[0].tiles.nbytes / ours / bandwidth
            cut = chosen(rows, x.dtype, weights[0], MMA)
            lines.append(f"| {inputs} x {outputs} | {rows} | {bits} | {ours:.1f} | {share:.0%} | {cut} |")
            print(lines[-1], flush=True)
    return lines


MMA_WORDS = """\
Compiled for compute capability 8.0, translated by the driver; no launch begins before the one ahead of it has ended, unlike
those by wgmma. Weights in groups of 128, symmetric; x in float16. Marlin: on an H200, measured apart from this run. A cut:
rows of x, then strips of 16 outputs a warp x warps along the outputs x warps along the inputs, tiles of 128 inputs a stage,
thread blocks a multiprocessor; chosen by measuring the candidates at the first call."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mma", action="store_true", help="the kernel of GPUs other than Hopper's")
    parser.add_argument("--out", type=Path, help="default: the file named above")
    args = parser.parse_args()
    bandwidth = memory_bandwidth()
    machine = f"{gpu()}; an elementwise kernel reads and writes {bandwidth / 1e6:.2f} TB/s."
    print(machine)
    if args.mma:
        out = args.out or RESULTS / "gpu_matmul_mma.md"
        sections = [
            "# y = x · Wᵀ with a packed weight, by mma.sync",
            f"{machine} Command: `python benchmarks/gpu_matmul.py --mma`. {MMA_WORDS}",
            "## 4 bits\n\n" + "\n".join(mma_four_bits(bandwidth)),
            "## Other bits\n\n" + "\n".join(mma_other_bits(bandwidth)),
        ]
    else:
        out = args.out or RESULTS / "gpu_matmul.md"
        sections = [
            "# y = x · Wᵀ with a packed weight",
            f"{machine} Command: `python benchmarks/gpu_matmul.py`. Weights in groups of 128, symmetric; x in float16. Every\n"
            "launch may begin to fetch its weight while the one before ends (programmatic dependent launch), as in decoding.",
            "## 4 bits\n\n" + "\n".join(four_bits(bandwidth)),
            "## Other bits\n\n" + "\n".join(other_bits(bandwidth)),
        ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
