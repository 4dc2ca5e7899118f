"""How long GPTQ takes for a layer on a CPU: the columns of a block solved in compiled code, beside torch.

    OMP_NUM_THREADS=1 python benchmarks/solve_cpu.py     # writes results/solve_cpu.md

Seconds of processor time for a layer's integers, 4 bits in groups of 128, statistics and their factorization given: the best of
three, both in turns. "Plain": the same bits, which is checked here. "Advised": activation order with static groups and weighted
grids, whose search is compiled too and sums up errors in another order; the share of integers that are equal is shown.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import machine, write_table

from tersor.formats.grid import ClipSearch
from tersor.kernels import gptq_cpu
from tersor.methods.weights import gptq_solver
from tersor.methods.weights.gptq_solver import factorize, solve_factorized

SHAPES = ((768, 768), (768, 3072), (4096, 1024), (4096, 4096))
TURNS = 3


def seconds(W: torch.Tensor, factor: gptq_solver.Factor, compiled: bool, search: bool) -> tuple[float, torch.Tensor]:
    takes = gptq_cpu.takes
    gptq_cpu.takes = takes if compiled else lambda W: False
    options: dict[str, Any] = {"clip_search": ClipSearch(norm=2.0), "weighted": True} if search else {}
    try:
        started = time.process_time()
        found = solve_factorized(W, factor, bits=4, group_size=128, sym=True, static_groups=search, **options)
        return time.process_time() - started, found.codes
    finally:
        gptq_cpu.takes = takes


def main() -> None:
    lines = ["# GPTQ of a layer on a CPU", "", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    lines += [
        "| outputs x inputs | | torch, s | compiled, s | times as fast | equal |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for rows, columns in SHAPES:
        torch.manual_seed(0)
        X = torch.randn(2 * columns, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / columns)
        W, H = torch.randn(rows, columns), X.T @ X / len(X)
        for search in (False, True):
            factor = factorize(H, desc_act=search)
            took: dict[bool, list[float]] = {False: [], True: []}
            codes = {}
            for _ in range(TURNS):
                for compiled, found in took.items():
                    spent, codes[compiled] = seconds(W, factor, compiled, search)
                    found.append(spent)
            same = (codes[False] == codes[True]).float().mean().item()
            assert search or same == 1
            by_torch, compiled_time = min(took[False]), min(took[True])
            what = "advised" if search else "plain"
            lines.append(
                f"| {rows} x {columns} | {what} | {by_torch:.2f} | {compiled_time:.2f} | {by_torch / compiled_time:.1f} "
                f"| {same:.2%} |"
            )
            print(lines[-1], flush=True)
    write_table("solve_cpu", "\n".join([*lines, "", machine(), "`OMP_NUM_THREADS=1 python benchmarks/solve_cpu.py`"]))


if __name__ == "__main__":
    main()
