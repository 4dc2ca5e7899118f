"""Samples without the positions that their attention mask hides; the model's output does not depend on these.

Hidden positions cost time and must not count in statistics. A sample with padding becomes one sample per row, each with only the
positions that its mask shows. So padded and plain samples calibrate alike, on whichever side the padding is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.calibrate.batches import Batch
from tersor.errors import TersorError

SIDES = ("", "decoder_")  # prefixes of the inputs' names: an encoder-decoder reads two texts
TOKENS = ("input_ids", "inputs_embeds")


@dataclass(frozen=True)
class _Text:
    """One of the texts of a sample."""

    prefix: str
    shown: Tensor  # the positions that its mask shows, [rows, tokens]

    def owns(self, name: str, value: Any, *, labels: bool) -> bool:
        """Whether an input, already cut to one row, has one entry for each of the text's positions."""
        if name == "labels":
            mine = labels
        else:
            mine = name.startswith("decoder_") == (self.prefix == "decoder_")
        if not mine or not isinstance(value, Tensor):
            return False
        tokens = self.shown.shape[1]
        if name.endswith("position_ids") and value.dim() == 3:  # [axes, rows, tokens]
            return value.shape[2] == tokens
        embedded = name.endswith("inputs_embeds") and value.dim() == 3
        return (value.dim() == 2 or embedded) and tuple(value.shape[:2]) == (1, tokens)


def shown_only(batch: Batch, number: int, *, encoder_decoder: bool) -> list[Batch]:
    """The sample as it is where nothing is hidden, else each row without its hidden positions.

    number: of the sample, for errors. encoder_decoder: whether labels belong to the decoder's text instead of input_ids.
    Raises TersorError where everything is hidden, or the sample has other inputs that cannot be split by row.
    """
    texts = list(_texts(batch))
    if all(bool(text.shown.all()) for text in texts):
        return [batch]
    found = []
    for row in range(len(texts[0].shown)):
        if not all(bool(text.shown[row].any()) for text in texts):
            continue
        part = {name: _row(name, value, row, texts[0], number) for name, value in batch.items()}
        for text in texts:
            keep = text.shown[row].nonzero().flatten()
            for name, value in part.items():
                if text.owns(name, value, labels=not encoder_decoder and text.prefix == ""):
                    part[name] = value.index_select(value.dim() - 1 if _has_axes(name, value) else 1, keep)
        part.pop("cache_position", None)  # it counts hidden positions too
        found.append(part)
    if not found:
        raise TersorError(f"calibration sample {number} has no position that its attention_mask shows")
    return found


def _texts(batch: Batch) -> Iterator[_Text]:
    for prefix in SIDES:
        mask = batch.get(f"{prefix}attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or not mask.numel():
            continue
        tokens = [batch.get(f"{prefix}{name}") for name in TOKENS]
        if any(isinstance(each, Tensor) and each.shape[:2] == mask.shape for each in tokens):
            yield _Text(prefix, mask != 0)


def _row(name: str, value: Any, row: int, text: _Text, number: int) -> Any:
    rows = len(text.shown)
    if rows == 1 or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if _has_axes(name, value) and value.shape[1] == rows:
        return value[:, row : row + 1]
    if value.shape[0] == rows:
        return value[row : row + 1]
    if name == "cache_position":
        return value
    raise TersorError(
        f"calibration sample {number} has {rows} rows with padding, and its {name!r} is {tuple(value.shape)}, which does not "
        "say what belongs to which row; give each row as a sample of its own"
    )


def _has_axes(name: str, value: Tensor) -> bool:
    """Whether positions are counted along several axes: [axes, rows, tokens]."""
    return name.endswith("position_ids") and value.dim() == 3


def decoder_inputs(batch: Batch, start: int) -> Batch:
    """The sample with a text for the decoder: its own text, shifted by one, after the token that starts a text."""
    ids: Tensor = batch["input_ids"]
    shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return {**batch, "decoder_input_ids": shifted}
    first = (mask != 0).int().argmax(1, keepdim=True)  # the first position that is shown
    return {**batch, "decoder_input_ids": shifted.scatter(1, first, start), "decoder_attention_mask": mask}
