"""Sequences with holes and what stood in them: the data of self-pretraining (Amos, Berant and Gupta, ICLR 2024).

    inputs, target = denoise_numbers(x, mask)      # x (L, c), mask (L, 1) -> (L, c + 1), (L, c)
    inputs, target = denoise_tokens(ids, mask)     # ids (L,), mask (L, 1) -> (L,), (L,)
    inputs, target = next_element(x)               # nothing is hidden: each position predicts the next one

    data = Denoising(labelled, DenoisingConfig(ratio=0.5))       # labelled: items {"x" or "input_ids", "target", ...}

A mask is 1 where an element is hidden. Hidden numbers become 0, and the mask is one more channel; hidden tokens become
token 0, <mask>. Every position may be hidden, padding too. The target is IGNORED_NUMBER or IGNORED_TOKEN where nothing is
asked: those positions enter neither the loss nor its mean. Masks hide the share `ratio` of the positions, either one by one or
in spans of equal length that do not overlap.

Published ratios: 0.5 for images and Pathfinder, 0.15 for Text and Retrieval, 0.1 for ListOps.

Rules: IdoAmos/not-from-scratch at f919137 (MIT); `span_mask` draws what it draws there from NumPy's generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tersor.data.seeding import mixed_seed
from tersor.errors import TersorError
from tersor.untrusted import check_seed

IGNORED_NUMBER, IGNORED_TOKEN = -10_000, -100
MASK_TOKEN = 0
PIXEL_CLASSES = 256
OBJECTIVES = ("masked", "causal")
_TRIES = 1000


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    objective: str = "masked"  # "causal": the next element, for models that see only what came before
    ratio: float = 0.5  # of the positions that are hidden
    span: float = (
        0.0  # length of a hidden span: positions, or below 1 a share of the length; 0: every position by itself
    )
    pixel_classes: bool = False  # numbers in [-1, 1] are asked for as one of 256 grey values
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.objective not in OBJECTIVES:
            raise TersorError(f"objective is one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
        if not 0 < self.ratio < 1:
            raise TersorError(f"the ratio of hidden positions is {self.ratio}; it lies between 0 and 1")
        if self.span < 0:
            raise TersorError(f"a span is {self.span} positions long; 0 or more are expected")


def bernoulli_mask(length: int, ratio: float, random: np.random.RandomState) -> Tensor:
    """(length, 1) float32: each position is hidden with the chance `ratio`."""
    return torch.from_numpy((random.random_sample((length, 1)) < ratio).astype(np.float32))


def span_mask(length: int, ratio: float, span: float, random: np.random.RandomState) -> Tensor:
    """(length, 1) float32: int(length ratio / span) spans of `span` positions, which do not overlap.

    span below 1 is a share of the length. Starts are drawn from 0 to length - span - 1; a start within `span` before or
    behind another is not drawn again. Where no place is left, all spans are drawn anew (published: an error of NumPy's).
    Raises TersorError where there is no room for the spans.
    """
    s = int(span * length) if span < 1 else int(span)
    if not 1 <= s < length:
        raise TersorError(f"a span of {span} covers {s} of {length} positions; 1 to {length - 1} can be hidden")
    count = int(length * ratio / s)
    for _ in range(_TRIES):
        free, mask = np.ones(length - s), np.zeros((length, 1), np.float32)
        for _ in range(count):
            if not free.any():
                break
            start = random.choice(length - s, p=free / free.sum())
            mask[start : start + s] = 1
            free[max(0, start - s) : start + s] = 0
        else:
            return torch.from_numpy(mask)
    raise TersorError(f"{count} spans of {s} do not find room in {length} positions; lower the ratio {ratio}")


def draw_mask(length: int, config: DenoisingConfig, random: np.random.RandomState) -> Tensor:
    """(length, 1), of the kind that the config says."""
    if config.span:
        return span_mask(length, config.ratio, config.span, random)
    return bernoulli_mask(length, config.ratio, random)


def denoise_numbers(x: Tensor, mask: Tensor, *, pixel_classes: bool = False) -> tuple[Tensor, Tensor]:
    """x (..., L, c), mask (..., L, 1) -> inputs (..., L, c + 1) and target (..., L, c), or (..., L) where c is 1.

    pixel_classes: x in [-1, 1] is asked for as its grey value 0 to 255, int64.
    """
    mask = mask.to(x.dtype)
    inputs = torch.cat((x * (1 - mask), mask), -1)
    wanted = pixel_class(x) if pixel_classes else x
    target = torch.where(mask == 1, wanted, IGNORED_TOKEN if pixel_classes else IGNORED_NUMBER)
    return inputs, target[..., 0] if x.shape[-1] == 1 else target


def denoise_tokens(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """ids (..., L) int64, mask (..., L, 1) -> inputs and target (..., L), int64."""
    hidden = mask[..., 0] == 1
    return ids.masked_fill(hidden, MASK_TOKEN), ids.masked_fill(~hidden, IGNORED_TOKEN)


def next_element(sequence: Tensor, *, pixel_classes: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens (..., L) or numbers (..., L, c) -> themselves and the following elements; nothing is asked at the last."""
    if not sequence.is_floating_point():
        return sequence, _shifted(sequence, IGNORED_TOKEN, -1)
    wanted = pixel_class(sequence) if pixel_classes else sequence
    target = _shifted(wanted, IGNORED_TOKEN if pixel_classes else IGNORED_NUMBER, -2)
    return sequence, target[..., 0] if sequence.shape[-1] == 1 else target


def pixel_class(x: Tensor) -> Tensor:
    """Numbers in [-1, 1] -> grey values 0 to 255, int64. As published, rounded down; a little is added, for x = 2 k / 255 - 1 is
    not exact."""
    return ((x + 1) / 2 * (PIXEL_CLASSES - 1) + 1e-4).long().clamp(0, PIXEL_CLASSES - 1)


class Denoising(Dataset[dict[str, Tensor]]):
    """Labelled sequences as a denoising task: items {"x" or "input_ids", "target"}; labels and lengths are left out.

    Masks follow from (seed, epoch, index) alone, so that an interrupted training goes on with the same ones.
    """

    def __init__(self, labelled: Any, config: DenoisingConfig) -> None:
        self.labelled, self.config = labelled, config
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw other masks; the trainer calls it at the start of each epoch."""
        self.epoch = epoch
        if hasattr(self.labelled, "set_epoch"):
            self.labelled.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.labelled[index]
        name = "x" if "x" in item else "input_ids"
        sequence: Tensor = item[name]
        if self.config.objective == "causal":
            inputs, target = next_element(sequence, pixel_classes=self.config.pixel_classes)
            return {name: inputs, "target": target}
        random = np.random.RandomState(mixed_seed(self.config.seed, self.epoch, index))
        mask = draw_mask(len(sequence), self.config, random)
        if sequence.is_floating_point():
            inputs, target = denoise_numbers(sequence, mask, pixel_classes=self.config.pixel_classes)
        else:
            inputs, target = denoise_tokens(sequence, mask)
        return {name: inputs, "target": target}


def _shifted(x: Tensor, ignored: int, axis: int) -> Tensor:
    last = torch.full_like(x.narrow(axis, 0, 1), ignored)
    return torch.cat((x.narrow(axis, 1, x.shape[axis] - 1), last), axis)
