"""Fold a BatchNorm into the convolution or linear map before it, for inference: w' = w g, b' = (b - mean) g + beta."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode as x * scale + shift, both (channels,)."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    shift = -norm.running_mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight.detach(), shift * norm.weight.detach() + norm.bias.detach()
    return scale, shift


@torch.no_grad()
def fold(layer: nn.Conv1d | nn.Conv2d | nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    """A copy of `layer` that computes norm(layer(x)); it has a bias. Not for transposed convolutions."""
    folded = copy.deepcopy(layer)
    scale, shift = scale_and_shift(norm)
    folded.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    bias = shift if layer.bias is None else layer.bias * scale + shift
    folded.bias = nn.Parameter(bias.to(layer.weight.dtype))
    return folded
