"""How long a forecast takes and how much memory, for 1, 100 and 10,000 series.

    python benchmarks/forecast_latency.py

`tersor.tasks.forecast_table.forecast_series` on series of 200 rows that are in memory, look-back 96, horizon 96, without
intervals; each model at its published size for ETTh1, untrained, one column a series.
Seconds of processor time, the best of three (of one for 10,000 series); memory is what the process grew by at its peak.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from common import machine, write_table

import tersor
from tersor.data.tables import SeriesTable
from tersor.data.time_grid import Step
from tersor.tasks.forecast_table import forecast_series
from tersor.tasks.forecaster import model_forecaster

MODELS: dict[str, dict[str, Any]] = {"itransformer_etth1": {}, "s_mamba_etth1": {}}
COUNTS = (1, 100, 10_000)
ROWS, HORIZON = 200, 96


def table_of(count: int) -> SeriesTable:
    step = Step(3600, "s")
    times = step.after(np.array(["2024-01-01"], "datetime64[s]"), np.arange(ROWS))[0]
    draw = np.random.default_rng(0)
    values = tuple(draw.normal(size=(ROWS, 1)) for _ in range(count))
    return SeriesTable(("y",), tuple(map(str, range(count))), values, (times,) * count, step, "ds", "unique_id")


def measure(name: str, count: int) -> dict[str, float]:
    torch.manual_seed(0)
    forecaster = model_forecaster(tersor.models.create(name, **MODELS[name]))
    forecast_series(forecaster, table_of(1), horizon=HORIZON, interval=())  # what only the first call does
    table = table_of(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = []
    for _ in range(1 if count > 1000 else 3):
        started = time.process_time()
        forecast_series(forecaster, table, horizon=HORIZON, interval=())
        took.append(time.process_time() - started)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": min(took), "MB": grown / 1024}


def main() -> None:
    if len(sys.argv) == 3:  # one measurement in a process of its own, for its memory
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    lines = ["# Latency of forecasts", "", *(__doc__ or "").strip().splitlines()[4:], ""]
    lines += ["| model | series | seconds | a series | memory grows by |", "| --- | ---: | ---: | ---: | ---: |"]
    for name in MODELS:
        for count in COUNTS:
            done = subprocess.run(
                [sys.executable, __file__, name, str(count)], capture_output=True, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            each = 1000 * found["seconds"] / count
            lines.append(f"| {name} | {count:,} | {found['seconds']:.3f} | {each:.2f} ms | {found['MB']:.0f} MB |")
            print(lines[-1], flush=True)
    lines += ["", f"{machine()}.", ""]
    write_table("forecast_latency", "\n".join([*lines, "`python benchmarks/forecast_latency.py`"]))


if __name__ == "__main__":
    main()
