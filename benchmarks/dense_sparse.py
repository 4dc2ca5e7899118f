"""How fast products with dense x sparse weights are, beside dense ones.

    OMP_NUM_THREADS=1 python benchmarks/dense_sparse.py     # writes results/dense_sparse.md

Products: times faster than nn.Linear of the same shape at ratio 2.8 (the weight is stored 2.8 times smaller, places of the sparse
numbers counted), CPU time, median of 7, by number of tokens.
"""

from __future__ import annotations

import torch
from common import machine, speed_ratios, write_table
from torch import nn

from tersor.methods.structure.dsformer import DSFormer, StraightThroughFactors

SHAPES = ((768, 768), (768, 3072), (3072, 768), (384, 1024), (1024, 384))
TOKENS = (1, 16, 64, 256)


def main() -> None:
    lines = [f"| outputs x inputs | {' | '.join(map(str, TOKENS))} |", "| --- |" + " ---: |" * len(TOKENS)]
    for outputs, inputs in SHAPES:
        lines.append(f"| {outputs} x {inputs} | {' | '.join(products(outputs, inputs))} |")
        print(lines[-1], flush=True)
    described = (__doc__ or "").strip()
    heading = ["# Products with dense x sparse weights", "", described[described.index("Products:") :], ""]
    ending = ["", machine(), "`OMP_NUM_THREADS=1 python benchmarks/dense_sparse.py`", ""]
    write_table("dense_sparse", "\n".join([*heading, *lines, *ending]))


def products(outputs: int, inputs: int) -> list[str]:
    """How many times faster than nn.Linear, by number of tokens."""
    chance = torch.Generator().manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    p, q, k, s = DSFormer(ratio=2.8).sizes("the layer", outputs, inputs)
    S, D = torch.randn(1, p, k, generator=chance), torch.randn(1, k, q, generator=chance)
    sparse = StraightThroughFactors(layer, S, D, s).exported(layer)
    found = []
    for tokens in TOKENS:
        x = torch.randn(tokens, inputs, generator=chance)
        tasks = {name: lambda m=m, x=x: [m(x) for _ in range(10)] for name, m in (("dense", layer), ("sparse", sparse))}
        found.append(f"{speed_ratios(tasks, turns=7)['sparse']:.2f}")
    return found


if __name__ == "__main__":
    main()
