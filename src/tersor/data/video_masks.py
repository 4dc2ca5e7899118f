"""Masks for videos: which latents a model is given, and which it generates (VDT, arXiv 2305.13311).

masks = VideoMasks(frames=16, height=32, width=32)
mask = masks.draw("predict")          # (16, 32, 32), 1 = generate, 0 = given
mask = masks.draw_for_training()      # one for the whole batch: "spatial" one time in five, else any other kind
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.errors import TersorError

KINDS = ("predict", "backward", "interpolation", "unconditional", "one_frame", "random_frames", "spatial")
SPATIAL_SHARE = 0.2  # of training
FRAME_RATE = 0.8  # "random_frames": how likely a frame is to be generated
SMALLEST_BLOCK, SLIMMEST_BLOCK = 4, 0.3  # patches, height over width
ATTEMPTS = 10  # to place a block, before the mask is taken as it is


@dataclass(frozen=True, kw_only=True)
class VideoMasks:
    frames: int
    height: int
    width: int
    predict_given: int = 8  # first frames given
    backward_given: int = 8  # last frames given
    interpolation_step: int = 4  # every so many frames one is given
    spatial_ratio: float = 0.5  # share of a frame that blocks cover
    published_slice: bool = False  # "spatial" that would reach the last frame masks nothing, as in the published code

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width, self.interpolation_step) < 1:
            raise TersorError(f"video masks need sizes and an interpolation_step of at least 1, not {self}")

    def draw(self, kind: str, generator: torch.Generator | None = None) -> Tensor:
        """(frames, height, width), float32."""
        if kind not in KINDS:
            raise TersorError(f"the kind of a video mask is one of {', '.join(KINDS)}, not {kind!r}")
        mask, index = torch.zeros(self.frames, self.height, self.width), torch.arange(self.frames)
        if kind == "spatial":
            start, end = (int(torch.randint(4, (), generator=generator)) for _ in range(2))
            stop = 0 if self.published_slice and end == 0 else max(self.frames - end, 0)
            mask[start:stop] = block_mask(self.height, self.width, self.spatial_ratio, generator)
            return mask
        generated = {
            "predict": index >= self.predict_given,
            "backward": index < self.frames - self.backward_given,
            "interpolation": index % self.interpolation_step != 0,
            "unconditional": index >= 0,
        }.get(kind)
        if kind == "one_frame":
            generated = index != torch.randint(self.frames, (), generator=generator)
        elif kind == "random_frames":
            generated = torch.rand(self.frames, generator=generator) < FRAME_RATE
        assert generated is not None
        mask[generated] = 1
        return mask

    def draw_for_training(self, generator: torch.Generator | None = None) -> Tensor:
        if torch.rand((), generator=generator) < SPATIAL_SHARE:
            return self.draw("spatial", generator)
        return self.draw(KINDS[int(torch.randint(len(KINDS) - 1, (), generator=generator))], generator)


def block_mask(height: int, width: int, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """(height, width): random rectangles of at least four patches, at most 1 : 0.3, until `ratio` of the area is covered."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    mask, left = torch.zeros(height, width), int(ratio * height * width)
    while left > 0:
        for _ in range(ATTEMPTS):
            area = uniform(SMALLEST_BLOCK, max(left, SMALLEST_BLOCK))
            aspect = math.exp(uniform(math.log(SLIMMEST_BLOCK), -math.log(SLIMMEST_BLOCK)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top = int(torch.randint(height - h + 1, (), generator=generator))
            side = int(torch.randint(width - w + 1, (), generator=generator))
            block = mask[top : top + h, side : side + w]
            new = block.numel() - int(block.sum())
            if 0 < new <= left:
                block.fill_(1)
                left -= new
                break
        else:
            break
    return mask
