"""Average precision of scores: the area under precision over recall."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.errors import TersorError


def average_precision(scores: Tensor, target: Tensor) -> float:
    """scores [n], target [n] of 0 and 1 -> the sum over thresholds of (recall gained) x precision; ties are one threshold."""
    if not target.any() or bool(scores.isnan().any()):
        raise TersorError("average precision needs scores that are numbers, and at least one true pair")
    order = scores.argsort(descending=True)
    ranked, hits = scores[order], target[order].double().cumsum(0)
    last = torch.cat((ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool, device=ranked.device)))  # of a tie
    found = hits[last]
    precision = found / (torch.arange(1, len(ranked) + 1, device=ranked.device)[last])
    gained = torch.diff(found, prepend=found.new_zeros(1))
    return float((gained * precision).sum() / hits[-1])
