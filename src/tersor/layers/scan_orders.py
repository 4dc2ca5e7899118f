"""The orders in which state-space models read a grid of tokens: rows, columns, back and forth.

x (B, C, H, W) -> sequences (B, K, C, H W), one per order; `unscan` puts the results back and adds them. An order
is a permutation of the positions: `sequence k = x.flatten(2)[..., order[k]]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_orders(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """(4, H W): rows, columns, rows backward, columns backward (VMamba, arXiv 2401.10166)."""
    rows = torch.arange(height * width, device=device)
    columns = rows.reshape(height, width).t().reshape(-1)
    return torch.stack((rows, columns, rows.flip(0), columns.flip(0)))


def snake_orders(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """(4, H W): like `cross_orders`, but every second row (or column) is read backward, so that neighbours in the sequence
    are neighbours in the grid (PlainMamba, arXiv 2403.17695)."""
    grid = torch.arange(height * width, device=device).reshape(height, width)

    def snake(g: Tensor) -> Tensor:
        return torch.stack([row.flip(0) if number % 2 else row for number, row in enumerate(g)]).reshape(-1)

    rows, columns = snake(grid), snake(grid.t())
    return torch.stack((rows, columns, rows.flip(0), columns.flip(0)))


def scan(x: Tensor, orders: Tensor) -> Tensor:
    """x (B, C, H, W) or (B, C, L), orders (K, L) -> (B, K, C, L)."""
    return x.flatten(2)[:, :, orders].transpose(1, 2)


def unscan(y: Tensor, orders: Tensor) -> Tensor:
    """y (B, K, C, L) -> (B, C, L): each sequence back in place, summed over the orders."""
    inverse = torch.argsort(orders, dim=1)  # (K, L)
    back = y.gather(-1, inverse[None, :, None, :].expand_as(y))
    return back.sum(1)
