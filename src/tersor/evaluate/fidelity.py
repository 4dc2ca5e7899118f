"""How near a restored picture is to its original: PSNR and SSIM, as papers on super-resolution report them.

    fidelity(result, original, border=4)        # both (H, W, 3), uint8

Both on luma, Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255, without `border` pixels at each side (papers: the scale):

    PSNR = 10 log10(255^2 / mean (Y - Y0)^2)
    SSIM = mean of (2 m m0 + C1)(2 c + C2) / ((m^2 + m0^2 + C1)(v + v0 + C2)),   C1 = (0.01 255)^2, C2 = (0.03 255)^2

with means m, variances v and covariance c under a Gaussian of 11 x 11 pixels and deviation 1.5, where all of it lies in the
picture (Wang et al., IEEE TIP 2004). Works in bands of rows, so that the memory does not grow with the height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.errors import TersorError

WINDOW, DEVIATION = 11, 1.5
BAND = 256  # rows
LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)


@dataclass(frozen=True)
class Fidelity:
    psnr: float  # dB; infinite where both are equal
    ssim: float  # 1: equal


def fidelity(result: Any, original: Any, *, border: int = 0) -> Fidelity:
    """result, original: numpy arrays (H, W, 3) of uint8. Raises TersorError where too little is left to compare."""
    if result.shape != original.shape:
        raise TersorError(f"pictures of {result.shape[:2]} and {original.shape[:2]} pixels cannot be compared")
    height, width = (side - 2 * border for side in result.shape[:2])
    if min(height, width) < WINDOW:
        raise TersorError(
            f"{result.shape[1]} x {result.shape[0]} pixels without a border of {border} are too few for SSIM: "
            f"{WINDOW} x {WINDOW} is the least"
        )
    squares = similar = 0.0
    for top in range(0, height, BAND):
        rows = slice(border + top, border + min(top + BAND + WINDOW - 1, height))  # the next band's windows begin in it
        y, y0 = (_luma(each[rows, border : border + width]) for each in (result, original))
        squares += float((y[:BAND] - y0[:BAND]).square().sum())
        if len(y) >= WINDOW:
            similar += float(_similarity(y, y0).sum())
    error = squares / (height * width)
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    return Fidelity(psnr, similar / ((height - WINDOW + 1) * (width - WINDOW + 1)))


def _luma(pixels: Any) -> Tensor:
    values = torch.from_numpy(pixels.copy()).double()
    luma: Tensor = values @ torch.tensor(LUMA, dtype=torch.float64) + 16
    return luma


def _similarity(y: Tensor, y0: Tensor) -> Tensor:
    """The fraction of the module docstring at every place of the window."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    places = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-places.square() / (2 * DEVIATION**2))
    weights /= weights.sum()
    maps = torch.stack((y, y0, y * y, y0 * y0, y * y0))[:, None]
    down = F.conv2d(maps, weights.view(1, 1, -1, 1))
    m, m0, s, s0, t = F.conv2d(down, weights.view(1, 1, 1, -1))[:, 0]
    v, v0, c = s - m * m, s0 - m0 * m0, t - m * m0
    similarity: Tensor = (2 * m * m0 + c1) * (2 * c + c2) / ((m * m + m0 * m0 + c1) * (v + v0 + c2))
    return similarity
