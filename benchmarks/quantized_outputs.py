"""How far GPTQ moves the outputs of every architecture of the tree, at 8 and 4 bits.

    python benchmarks/quantized_outputs.py --write      every system in the small form of its tests, but for kept ones
    python benchmarks/quantized_outputs.py shvit_s1 vssd_micro --write   these variants, in their published sizes

Random weights, because there are none to download here: the figure tells that the whole model goes through quantization and how
rounding adds up over its layers, not what accuracy is lost. Every weight matrix that GPTQ packs, one scale a row, calibrated on
eight samples of the model's own example inputs; error: of the outputs on eight others, as a share of their norm, all outputs of
a model together. Packed: share of the parameters. What is trained has its accuracy in `vision_training.md`,
`forecasting_quantized.md`, `node_classification.md`, `policies.md`, `speech.md`, `video.md` and `clouds.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import command, kept_numbers, machine, write_numbers, write_table
from torch import Tensor
from torch.utils._pytree import tree_leaves

import tersor
import tersor.models
from tersor.models import ModelInfo

NAME, BITS, SAMPLES, SEEN = "quantized_outputs", (8, 4), 2, 4  # samples of a batch, batches


@dataclass(frozen=True)
class Row:
    name: str
    task: str
    parameters: int
    packed: float = 0.0  # share of the parameters
    layers: int = 0
    errors: tuple[float, ...] = ()
    reason: str = ""  # why there is no result
    run: str = ""


def outputs(model: Any, batches: Iterable[dict[str, Any]]) -> Tensor:
    """All floating-point outputs in one row; what is drawn inside is drawn alike."""
    torch.manual_seed(0)
    with torch.no_grad():
        found = [leaf for batch in batches for leaf in tree_leaves(model(**batch)) if isinstance(leaf, Tensor)]
    return torch.cat([each.float().flatten() for each in found if each.is_floating_point()])


def measured(info: ModelInfo, small: bool, run: str) -> Row:
    torch.manual_seed(0)
    model: Any = (tersor.models.create(info.system, **info.small) if small else tersor.models.create(info.name)).eval()
    name = f"{info.system} (small)" if small else info.name
    seen, others = ([model.example_inputs(SAMPLES) for _ in range(SEEN)] for _ in range(2))
    count = sum(each.numel() for each in model.parameters())
    base, errors, layers, packed = outputs(model, others), [], 0, 0
    for bits in BITS:
        try:
            result = tersor.compress(model, tersor.GPTQ(bits=bits, group_size=-1), calibration=seen, format=None)
        except tersor.TersorError as error:
            return Row(name, info.task, count, reason=str(error).partition("\n")[0], run=run)
        found = outputs(result.model, others)
        if found.shape != base.shape:
            return Row(name, info.task, count, reason="how much it returns depends on the values", run=run)
        errors.append(float((found - base).norm() / base.norm()))
        layers = len(result.summary.layers)
        shapes: dict[str, Any] = dict(model.named_modules())
        packed = sum(shapes[layer.name].weight.numel() for layer in result.summary.layers)
    return Row(name, info.task, count, packed / count, layers, tuple(errors), run=run)


def table(rows: list[Row]) -> str:
    lines = [
        "# How far GPTQ moves the outputs of every architecture",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
    ]
    for title, small in (("Published sizes", False), ("Small forms", True)):
        part = [row for row in rows if row.name.endswith(" (small)") == small]
        if not part:
            continue
        lines += [f"## {title}", "", "| model | task | parameters | packed | layers | 8 bits | 4 bits |"]
        lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
        for row in sorted(part, key=lambda row: (row.task, row.name)):
            told = [f"{100 * error:.2g} %" for error in row.errors] or [row.reason, ""]
            name = row.name.removesuffix(" (small)")
            share = f"{row.packed:.0%} | {row.layers}" if row.layers else " | "
            lines.append(f"| `{name}` | {row.task} | {row.parameters:,} | {share} | {' | '.join(told)} |")
        lines += ["", *dict.fromkeys(row.run for row in part), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="VARIANT", help="in its published size; none: all systems, small")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    asked = parser.parse_args()
    kept = {each["name"]: Row(**each) for each in (kept_numbers(NAME) if asked.write else {}).get("rows", [])}
    run = f"`{command()}`; {machine()}"
    known = {info.name: info for info in tersor.models.list()}
    if unknown := set(asked.names) - set(known):
        parser.error(f"{sorted(unknown)[0]!r} is no variant; see tersor models")
    systems = {info.system: info for info in known.values()}
    jobs = [(known[name], False) for name in asked.names]
    jobs = jobs or [(info, True) for name, info in systems.items() if f"{name} (small)" not in kept]
    for info, small in jobs:
        row = measured(info, small, run)
        print(row, flush=True)
        kept[row.name] = row
        if asked.write:
            write_numbers(NAME, {"rows": [asdict(each) for each in kept.values()]})
            write_table(NAME, table(list(kept.values())))


if __name__ == "__main__":
    main()
