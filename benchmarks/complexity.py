"""Measured time of attention and of what takes its place, over n: its slope beside the stated order.

    OMP_NUM_THREADS=1 python benchmarks/complexity.py

Width 64 in one head, n = 1k, 2k, 4k, 8k, so that the length and not the width decides; window 64, k 64. One sequence in float32,
the fastest of five passes, as other work on the machine only adds to them. The slope is that of log time over log n by least
squares; a stated n log n has a slope of about 1.1 here. Faster from: the length where the layer overtakes attention.
"""

from __future__ import annotations

from common import machine, write_table

from tersor.advise.complexity import KINDS, Shape, crossover, measured, slope

LENGTHS = (1024, 2048, 4096, 8192)


def main() -> None:
    lines = ["| layer | order | ms at 1k, 2k, 4k, 8k | slope | stated | within 0.25 | faster from |"]
    lines += ["| --- | --- | --- | ---: | ---: | --- | ---: |"]
    base: list[float] = []
    for kind in KINDS:
        shapes = [Shape(n, 64, heads=1, window=64, k=64) for n in LENGTHS]
        seconds = [measured(kind, shape, turns=5, most=30.0, least=True) for shape in shapes]
        base = base or seconds
        found = slope(LENGTHS, seconds)
        near = "yes" if abs(found - kind.exponent) <= 0.25 else "no"
        cross = None if kind.name == "attention" else crossover(LENGTHS, base, seconds)
        faster = "" if kind.name == "attention" else "never here" if cross is None else f"{cross:,.0f}"
        times = ", ".join(f"{1e3 * each:.3g}" for each in seconds)
        lines.append(f"| {kind.name} | {kind.order} | {times} | {found:.2f} | {kind.exponent:g} | {near} | {faster} |")
        print(lines[-1], flush=True)
    described = (__doc__ or "").strip()
    text = ["# Time over length", "", described[described.index("Width 64") :], "", *lines, "", machine()]
    write_table("complexity", "\n".join([*text, "`OMP_NUM_THREADS=1 python benchmarks/complexity.py`", ""]))


if __name__ == "__main__":
    main()
