"""`--method best` and `best-fast`: the recipes that lose least at a number of bits, and how long they take.

    best-fast   gptq (act-order, static groups, ranges by the Hessian, asymmetric), then one pass of `scales --integers`
    best        the same with eight passes

Where the integers of all layers cannot learn together in the memory at hand, `best` learns them block by block (`rounding`) and
tunes the scales after that; `best-fast` tunes the scales only. At 8 bits there is nothing left to gain, and both are gptq alone.
benchmarks/results/ladder.md shows what each step is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tersor.checkpoint.lazy_model import LazyModel, compute_dtype
from tersor.checkpoint.load import has_tokenizer
from tersor.checkpoint.positions import positions_of
from tersor.checkpoint.source import Checkpoint
from tersor.compress.forecast import COMPARED, PASSES, products_per_second
from tersor.compress.recipe import Recipe
from tersor.compress.settings import Settings
from tersor.devices import memory_total, pick_device
from tersor.errors import TersorError
from tersor.layers.linear_map import linear_maps, matrix_shape
from tersor.methods.method import Method
from tersor.methods.training.rounding import Rounding
from tersor.methods.training.scales import Scales
from tersor.methods.weights.gptq import GPTQ

NAMES = ("best", "best-fast")
TAKEN = ("bits", "group_size", "sym")  # the options that they leave to the user
TOKENS = 4096  # a step of learning takes about so many
STEPS = 32  # a pass over the samples takes at least so many
ROWS = 64  # of a sample that is no text, such as a picture's patches
LEARNING_BYTES = 22  # a weight: its offset, gradient and Adam's two means, its integer, and W while it is made
ROOM = 0.9  # of the memory


def best_steps(
    name: str, options: Mapping[str, Any], *, samples: int = 128, seq_len: int = 2048, together: bool = True
) -> list[Recipe]:
    """The steps of `best` or `best-fast`.

    options: those of bits, group_size and sym that the user gave. samples, seq_len: of the calibration, whose tokens are shared
    out to steps of learning. together: whether the integers of all layers learn at once. Raises TersorError for another option.
    """
    for given in options:
        if given not in TAKEN:
            raise TersorError(
                f"{name} chooses {given} itself; it takes {', '.join(TAKEN)}. For all options use --method gptq"
            )
    base = GPTQ(**options, desc_act=True, static_groups=True, weighted=True, asymmetric=0.5)
    size = max(1, min(TOKENS // seq_len, samples // STEPS))
    steps: list[Method] = [base]
    if base.bits != 8 and name == "best-fast":
        steps += [Scales(integers=together, epochs=1, travel=1.0, batch_size=size)]
    elif base.bits != 8 and together:
        steps += [Scales(integers=True, epochs=8, travel=4.0, batch_size=size)]
    elif base.bits != 8:
        steps += [Rounding(batch_size=size), Scales(batch_size=size)]
    return [Recipe(step) for step in steps]


def learns_together(weights: int, size: int, total: int | None) -> bool:
    """Whether the integers of all layers can learn at once. weights: how many there are. size: bytes of the original. total:
    bytes of memory, None where nobody knows."""
    return total is None or LEARNING_BYTES * weights + 2 * size < ROOM * total


def steps_for(name: str, checkpoint: Checkpoint, options: Mapping[str, Any], asked: Settings) -> list[Recipe]:
    """The steps for a checkpoint. A line tells them, and for a model of text about how long they take."""
    place = pick_device(asked.device)
    dtype = compute_dtype(checkpoint, place, asked.dtype)
    lazy = LazyModel(checkpoint, dtype=dtype, device=place)
    shapes = [matrix_shape(each) for each in linear_maps(lazy.module).values()]
    weights = sum(rows * columns for rows, columns in shapes)
    text = has_tokenizer(checkpoint.directory)
    length = min(asked.seq_len, positions_of(lazy.module) or asked.seq_len) if text else ROWS
    together = learns_together(weights, checkpoint.size(), memory_total(place))
    steps = best_steps(name, options, samples=asked.samples, seq_len=length, together=together)
    words = ", ".join(step.method.name for step in steps)
    line = f"{name}: {words}"
    if text:
        seconds = weights * asked.samples * length * passes(steps) / products_per_second(place, dtype)
        line += f"; about {seconds / 60:.0f} min" if seconds > 90 else f"; about {seconds:.0f} s"
    asked.progress(line, 0, 0)
    return steps


def passes(steps: Sequence[Recipe]) -> float:
    """How often all steps multiply every weight with every token. A gradient counts twice."""
    total = 0.0
    for step in steps:
        method = step.method
        if isinstance(method, Scales):
            total += 5 * method.epochs + 1  # original, packed, again, gradient; and the samples kept apart
        elif isinstance(method, Rounding):
            total += 3 * method.epochs + 4
        else:
            total += PASSES * (COMPARED if isinstance(method, GPTQ) and method.compares else 1)
    return total
