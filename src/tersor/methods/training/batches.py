"""Training batches from calibration samples, in epochs: each is a pass over all samples in an order of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tersor.calibrate.batches import Batch, each_tensor, without_target
from tersor.errors import TersorError

OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids")


class Drawn:
    """`batch(step)` depends on the step alone, so that a training can go on from any step. Labels are left out.

    Samples of one shape are put together as they are. Texts of several lengths are padded at the end with token 0, which
    `attention_mask` hides. Raises TersorError where there are no samples, or where other samples differ in shape.
    """

    def __init__(self, samples: Sequence[Batch], size: int, seed: int) -> None:
        if not samples:
            raise TersorError("training needs samples: give --calibration a text, a folder of images or a packed .npz")
        self.samples = [self.cast(without_target(dict(each))) for each in samples]
        self.size, self.seed = min(size, len(samples)), seed
        names = {tuple(each) for each in self.samples}
        if len(names) > 1:
            raise TersorError(f"the calibration samples have unlike inputs: {' and '.join(map(str, sorted(names)))}")
        if len({shapes_of(each) for each in self.samples}) > 1 and not all(map(_is_text, self.samples)):
            shapes = sorted({str(shapes_of(each)) for each in self.samples})
            raise TersorError(
                f"the calibration samples differ in shape, so they make no batch: {', '.join(shapes[:3])}"
            )

    @staticmethod
    def cast(batch: Batch) -> Batch:
        """The batch with floating tensors in float32: all models are trained in it."""
        return each_tensor(batch, lambda value: value.float() if value.is_floating_point() else value)

    def batch(self, step: int) -> Batch:
        count = len(self.samples)
        places = range(step * self.size, (step + 1) * self.size)
        orders = {epoch: order_of(epoch, count, self.seed) for epoch in {place // count for place in places}}
        return joined([self.samples[orders[place // count][place % count]] for place in places])


def order_of(epoch: int, count: int, seed: int) -> list[int]:
    """The order in which an epoch takes `count` samples. Each epoch has another; every run has the same."""
    chance = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(count, generator=chance).tolist()
    return order


def joined(samples: Sequence[Batch]) -> Batch:
    if len({shapes_of(each) for each in samples}) > 1:
        samples = _of_one_length(samples)
    return {name: _cat([each[name] for each in samples]) for name in samples[0]}


def _cat(values: list[Any]) -> Any:
    if isinstance(values[0], tuple | list):
        return type(values[0])(_cat(list(each)) for each in zip(*values, strict=True))
    if isinstance(values[0], Tensor) and values[0].dim():
        return torch.cat(values)
    return torch.stack(values) if isinstance(values[0], Tensor) else values[0]


def _of_one_length(samples: Sequence[Batch]) -> list[Batch]:
    longest = max(each["input_ids"].shape[1] for each in samples)
    found = []
    for each in samples:
        shown = each.get("attention_mask", torch.ones_like(each["input_ids"]))
        more = longest - each["input_ids"].shape[1]
        found.append({name: _filled(value, more) for name, value in {**each, "attention_mask": shown}.items()})
    return found


def _filled(value: Tensor, more: int) -> Tensor:
    return torch.nn.functional.pad(value, (0, more))


def _is_text(sample: Batch) -> bool:
    ids = sample.get("input_ids")
    return isinstance(ids, Tensor) and all(
        name in OF_TOKENS and isinstance(value, Tensor) and value.shape == ids.shape for name, value in sample.items()
    )


def shapes_of(sample: Batch) -> tuple[Any, ...]:
    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape[1:])
        return tuple(map(shape, value)) if isinstance(value, tuple | list) else None

    return tuple((name, shape(value)) for name, value in sample.items())
