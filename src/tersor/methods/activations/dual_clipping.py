"""Per-channel dual clipping (RepQuant, arXiv 2402.05628): the two ends of an activation's range learn separately.

Channel c of x has the range [sigmoid(beta_c) · min_c, sigmoid(alpha_c) · max_c], and the uniform grid of that range. The
factors learn by gradient descent, straight through the rounding, to minimise the output error of the layers that read x, ‖W (x̂
- x)‖² over calibration tokens. This is our reading of the paper, whose code is not public.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.formats.activation_grid import grid_of_range
from tersor.formats.grid import Grid
from tersor.layers.straight_through import round_through

STEPS, RATE = 100, 0.05  # of Adam
TOKENS = 1024  # in each step; all tokens decide whether the result is taken
NEAREST, FARTHEST = 0.999, 0.05  # factors that learning may start from


def clipped_grid(low: Tensor, high: Tensor, lower: Tensor, upper: Tensor, bits: int) -> Grid:
    """The grids of the ranges [lower · low, upper · high], all [channels]; lower = upper = 1 gives minimum and maximum."""
    return grid_of_range(lower * low, upper * high, bits)


def learn_clipping(x: Tensor, weight: Tensor, start: Grid) -> Grid:
    """The grids with the least error among `start` and those that learning found.

    x [tokens, channels]; weight [outputs, channels] of all layers that read x; start: scale and zero [channels].
    """
    x, gram, bits = x.detach(), (weight.t() @ weight).detach(), start.bits
    assert isinstance(bits, int)
    some = x[:: -(-len(x) // TOKENS)]
    low, high = x.aminmax(dim=0)
    first_low, first_high = -start.zero * start.scale, (2**bits - 1 - start.zero) * start.scale
    best, least = start, float(output_error(start.round(some) - some, gram))
    with torch.enable_grad():
        lower, upper = (
            torch.nan_to_num(end / whole, nan=NEAREST).clamp(FARTHEST, NEAREST).logit().requires_grad_()
            for end, whole in ((first_low, low), (first_high, high))
        )
        optimizer = torch.optim.Adam([lower, upper], lr=RATE)
        for _ in range(STEPS):
            grid = clipped_grid(low, high, lower.sigmoid(), upper.sigmoid(), bits)
            loss = output_error(_rounded(some, low * lower.sigmoid(), grid) - some, gram)
            if float(loss.detach()) < least:  # never true for a loss that is NaN
                best, least = Grid(grid.scale.detach(), grid.zero.detach(), bits), float(loss.detach())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    better = output_error(best.round(x) - x, gram) < output_error(start.round(x) - x, gram)
    return best if bool(better) else start


def output_error(E: Tensor, gram: Tensor) -> Tensor:
    """‖E Wᵀ‖² of input errors E [tokens, channels], as tr(E gram Eᵀ) with gram = Wᵀ W [channels, channels]."""
    return ((E @ gram) * E).sum()


def _rounded(x: Tensor, low: Tensor, grid: Grid) -> Tensor:
    """grid.round(x). Gradients reach the scale and `low` as if x were only clipped."""
    assert isinstance(grid.bits, int)
    zero = round_through(-low / grid.scale)
    codes = torch.clamp(round_through(x / grid.scale) + zero, 0, 2**grid.bits - 1)
    return (codes - zero) * grid.scale
