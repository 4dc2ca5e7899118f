"""How near a volume of probabilities is to the voxels of an object: the Dice loss, and the intersection over the union."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dice_loss(volume: Tensor, target: Tensor, *, smooth: float = 1.0, p: float = 2.0) -> Tensor:
    """Mean over the batch of 1 - (sum v t + smooth) / (sum v^p + sum t^p + smooth); the published form, without a 2."""
    v, t = volume.flatten(1), target.flatten(1)
    agreement = (v * t).sum(1) + smooth
    return (1 - agreement / (v.pow(p).sum(1) + t.pow(p).sum(1) + smooth)).mean()


def intersection_over_union(volume: Tensor, target: Tensor, thresholds: Sequence[float] = (0.3, 0.4, 0.5)) -> Tensor:
    """(thresholds, B). The published number is the best threshold's mean over all objects. Two empty volumes agree."""
    t = target.flatten(1) > 0.5
    rows = []
    for threshold in thresholds:
        v = volume.flatten(1) > threshold
        union = (v | t).sum(1)
        rows.append(torch.where(union > 0, (v & t).sum(1) / union.clamp(min=1), 1.0))
    return torch.stack(rows)
