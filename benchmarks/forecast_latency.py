"""How long a forecast takes and how much memory, for 1, 100 and 10,000 series, beside neuralforecast.

    python benchmarks/forecast_latency.py

Series of 200 rows that are in memory, look-back 96, horizon 96, without intervals; each model untrained, at its published
size for ETTh1, one column a series. Ours: `tersor.tasks.forecast_table.forecast_series`. Rows of neuralforecast are its
`predict` on a long table of the same series, after one training step, with the same sizes; its iTransformer takes all series
as one sample, and that of 10,000 would attend over 10,000 tokens, so it is left out there, and Autoformer and Informer are
left out for both, as they would take a quarter of an hour. Seconds of processor time, the best of three (of one for 10,000
series); memory is what the process grew by at the peak of the first forecast; neuralforecast's reuses what its training step
had taken, so that its figures say little. Without neuralforecast (pip install neuralforecast) its rows are missing.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import machine, peak_growth, write_table

import tersor
from tersor.data.tables import SeriesTable
from tersor.data.time_grid import Step
from tersor.tasks.forecast_table import forecast_series
from tersor.tasks.forecaster import model_forecaster

OURS: dict[str, dict[str, Any]] = {
    "itransformer_etth1": {},
    "s_mamba_etth1": {},
    "autoformer": {},
    "informer_etth1": {"seq_len": 96, "label_len": 48, "out_len": 96},
}
THEIRS: dict[str, dict[str, Any]] = {
    "iTransformer": {"hidden_size": 256, "n_heads": 8, "e_layers": 2, "d_layers": 1, "d_ff": 256},
    "Autoformer": {"hidden_size": 512, "n_head": 8, "conv_hidden_size": 2048, "encoder_layers": 2, "decoder_layers": 1},
    "Informer": {"hidden_size": 512, "n_head": 8, "conv_hidden_size": 2048, "encoder_layers": 2, "decoder_layers": 1},
}
COUNTS = (1, 100, 10_000)
FEW = ("autoformer", "informer_etth1", *THEIRS)  # not with 10,000 series
ROWS, HORIZON = 200, 96


def values_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, ROWS))


def ours(name: str, count: int) -> Callable[[], object]:
    step = Step(3600, "s")
    times = step.after(np.array(["2024-01-01"], "datetime64[s]"), np.arange(ROWS))[0]

    def table_of(count: int) -> SeriesTable:
        values = tuple(values[:, None] for values in values_of(count))
        return SeriesTable(("y",), tuple(map(str, range(count))), values, (times,) * count, step, "ds", "unique_id")

    given = {"enc_in": 1} if name in ("autoformer", "informer_etth1") else {}
    forecaster = model_forecaster(tersor.models.create(name, **OURS[name], **given))
    forecast_series(forecaster, table_of(1), horizon=HORIZON, interval=())  # what only the first call does
    table = table_of(count)
    return lambda: forecast_series(forecaster, table, horizon=HORIZON, interval=())


def theirs(name: str, count: int) -> Callable[[], object]:
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast import models as peers

    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    times = pd.date_range("2024-01-01", periods=ROWS, freq="h")
    parts = [pd.DataFrame({"unique_id": str(n), "ds": times, "y": y}) for n, y in enumerate(values_of(count))]
    frame = pd.concat(parts)
    given = {"n_series": count} if name == "iTransformer" else {}
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    model = getattr(peers, name)(
        h=HORIZON, input_size=96, max_steps=1, windows_batch_size=32, **THEIRS[name], **given, **quiet
    )
    forecaster = NeuralForecast(models=[model], freq="h")
    forecaster.fit(frame)
    return lambda: forecaster.predict(frame)


def measure(name: str, count: int) -> dict[str, float]:
    torch.manual_seed(0)
    forecast = (ours if name in OURS else theirs)(name, count)
    took = []

    def timed() -> None:
        started = time.process_time()
        forecast()
        took.append(time.process_time() - started)

    grown = peak_growth(timed)
    for _ in range(0 if count > 1000 else 2):
        timed()
    return {"seconds": min(took), "MB": grown / 1e6}


def main() -> None:
    if len(sys.argv) == 3:  # one measurement in a process of its own, for its memory
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    lines = ["# Latency of forecasts", "", *(__doc__ or "").strip().splitlines()[4:], ""]
    lines += ["| model | series | seconds | a series | memory grows by |", "| --- | ---: | ---: | ---: | ---: |"]
    has_peer = importlib.util.find_spec("neuralforecast") is not None
    for name in (*OURS, *(THEIRS if has_peer else ())):
        for count in COUNTS[:2] if name in FEW else COUNTS:
            command = [sys.executable, __file__, name, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            each = 1000 * found["seconds"] / count
            shown = name if name in OURS else f"neuralforecast's {name}"
            lines.append(f"| {shown} | {count:,} | {found['seconds']:.3f} | {each:.2f} ms | {found['MB']:.0f} MB |")
            print(lines[-1], flush=True)
    lines += ["", f"{machine()}" + (f", {version()}" if has_peer else "") + ".", ""]
    write_table("forecast_latency", "\n".join([*lines, "`python benchmarks/forecast_latency.py`"]))


def version() -> str:
    from importlib.metadata import version as of

    return f"neuralforecast {of('neuralforecast')}"


if __name__ == "__main__":
    main()
