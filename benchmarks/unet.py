"""A plain U-Net (Ronneberger et al., arXiv 1505.04597) with BatchNorm, the small network that people try first for segmentation.

image (B, 3, H, W), sides multiples of 8 -> logits (B, classes, H, W)
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    def __init__(self, num_classes: int, widths: tuple[int, ...] = (24, 48, 96, 192)) -> None:
        super().__init__()
        self.down = nn.ModuleList(twice(d_in, d) for d_in, d in zip((3, *widths), widths, strict=False))
        pairs = list(pairwise(widths))
        self.up = nn.ModuleList(twice(d + below, d) for d, below in reversed(pairs))
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        maps = [self.down[0](image)]
        for stage in self.down[1:]:
            maps.append(stage(F.max_pool2d(maps[-1], 2)))
        x = maps.pop()
        for stage in self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = stage(torch.cat((maps.pop(), x), 1))
        logits: Tensor = self.head(x)
        return logits


def twice(d_in: int, d: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (d_in, d):
        layers += [nn.Conv2d(width, d, 3, padding=1, bias=False), nn.BatchNorm2d(d), nn.ReLU()]
    return nn.Sequential(*layers)
