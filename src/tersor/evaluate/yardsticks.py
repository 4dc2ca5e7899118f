"""What every forecaster is compared with: repeating the last value, the last season, and one linear map.

    weights = fit_ridge([values], look_back=96, horizon=24)
    ridge(x, weights)                     # (B, L, N) -> (B, 24, N)

Ridge: one linear map from look_back to horizon steps, shared by all columns and series, on windows minus their last value
(added back), in closed form with penalty 10 from about 4,000 evenly spaced windows. On the usual benchmarks it is level with
or ahead of most transformers (see benchmarks/results/forecasting.md). The penalty is not tuned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.errors import TersorError

RIDGE_WINDOWS, RIDGE_PENALTY = 4000, 10.0


def repeat_last(x: Tensor, horizon: int) -> Tensor:
    """x (B, L, N) -> (B, horizon, N)."""
    return x[:, -1:].expand(-1, horizon, -1)


def seasonal_naive(x: Tensor, horizon: int, season: int) -> Tensor:
    """The last `season` steps of x (B, L, N), L at least that, again and again."""
    return x[:, -season:].repeat(1, -(-horizon // season), 1)[:, :horizon]


def fit_ridge(series: Sequence[Tensor], *, look_back: int, horizon: int) -> Tensor:
    """series: each (rows, N), scaled. Returns (look_back, horizon) float32. Raises TersorError where none is long enough."""
    length = look_back + horizon
    long = [each for each in series if len(each) >= length]
    windows = sum((len(each) - length + 1) * each.shape[1] for each in long)
    if not windows:
        raise TersorError(f"no series has the {length} rows that ridge needs to learn from")
    per_column = RIDGE_WINDOWS * long[0].shape[1]
    step = max(1, windows // per_column)
    gram = torch.zeros(look_back, look_back, dtype=torch.float64)
    cross = torch.zeros(look_back, horizon, dtype=torch.float64)
    for each in long[:: max(1, len(long) // RIDGE_WINDOWS)]:
        whole = each.unfold(0, length, 1)[::step].double()  # (windows, N, length)
        whole = (whole - whole[..., look_back - 1 : look_back]).flatten(0, 1)
        X, Y = whole[:, :look_back], whole[:, look_back:]
        gram += X.T @ X
        cross += X.T @ Y
    penalty = RIDGE_PENALTY * torch.eye(look_back, dtype=torch.float64)
    weights: Tensor = torch.linalg.solve(gram + penalty, cross)
    return weights.float()


def ridge(x: Tensor, weights: Tensor) -> Tensor:
    """x (B, L, N), weights (look_back, horizon) -> (B, horizon, N)."""
    last = x[:, -1:]
    return torch.einsum("bln,lh->bhn", x[:, -len(weights) :] - last, weights) + last
