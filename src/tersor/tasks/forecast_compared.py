"""What a compressed forecaster lost: its errors beside the original's on the same windows of a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tersor.checkpoint.load import load
from tersor.checkpoint.source import Openable, open_checkpoint
from tersor.devices import DType
from tersor.errors import TersorError
from tersor.evaluate.interval import Estimate, estimate
from tersor.tasks.compared import FORECASTS, table_windows


@dataclass(frozen=True)
class ForecastsCompared:
    """Errors in standard deviations of what the model learned from. Each ± is over windows; changes are paired."""

    windows: int
    horizon: int
    mse: Estimate
    base_mse: Estimate
    mse_change: Estimate
    mae: Estimate
    base_mae: Estimate
    mae_change: Estimate
    apart: Estimate  # mean squared difference of the two forecasts

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def forecasts_compared(
    model: Openable,
    against: Openable,
    data: Path,
    *,
    most: int = FORECASTS,
    dtype: DType = "auto",
    device: str = "auto",
) -> ForecastsCompared:
    """The last windows of every series, without overlap, at most `most`; one model is in memory at a time. Raises TersorError
    where the table is too short or the two forecast unlike things."""
    model, against = open_checkpoint(model), open_checkpoint(against)
    windows = table_windows(against, data, most=most)
    y = windows.truth()
    p, q = (windows.forecasts(load(each, dtype=dtype, device=device).eval()) for each in (against, model))
    if p.shape != q.shape:
        raise TersorError(f"the models forecast {list(q.shape[1:])} and {list(p.shape[1:])}")
    mse, base_mse = ((each - y).double().square() for each in (q, p))
    mae, base_mae = ((each - y).double().abs() for each in (q, p))
    return ForecastsCompared(
        windows=len(y),
        horizon=windows.horizon,
        mse=estimate(mse),
        base_mse=estimate(base_mse),
        mse_change=estimate(mse - base_mse),
        mae=estimate(mae),
        base_mae=estimate(base_mae),
        mae_change=estimate(mae - base_mae),
        apart=estimate((p - q).double().square()),
    )
