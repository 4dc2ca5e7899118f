"""iTransformer trained by us, beside the published rows and beside two forecasters without any training loop.

    TERSOR_DATA=../shared/data python benchmarks/forecasting.py                 # all three data sets
    TERSOR_DATA=../shared/data python benchmarks/forecasting.py exchange etth1

Protocol of tersor.data.series: look-back 96, horizon 96, all variates; MSE and MAE of the scaled test part.
Training as published: Adam 1e-4, batches of 32, at most 10 epochs, the rate halved from the third on, the best epoch by
validation MSE, patience 3. One deviation: validation is on all windows, the published code drops a last partial batch.

Yardsticks: "last value" repeats the window's last row. "ridge" is one linear map 96 -> 96 shared by all variates, on
windows minus their last value (added back), closed form with penalty 10, from about 4,000 evenly spaced training
windows. The penalty was not tuned.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tersor.models
from tersor.data.series import Parts, SeriesConfig, Windows, load_series
from tersor.train.config import TrainConfig
from tersor.train.objectives import forecasting
from tersor.train.trainer import train, validate

RESULTS = Path(__file__).parent / "results"
RECIPE = TrainConfig(
    epochs=10, batch_size=32, lr=1e-4, schedule="halving", patience=3, seed=2023, log_every=100, device="cpu"
)
RIDGE_WINDOWS, RIDGE_PENALTY = 4000, 10.0
Score = tuple[float, float]  # MSE, MAE


@dataclass(frozen=True)
class Task:
    title: str
    file: str
    model: str
    published: dict[str, str]  # row -> MSE/MAE, as the papers print it; MSE alone where no more was at hand
    series: dict[str, Any] = field(default_factory=dict)


TASKS = {
    "etth1": Task(
        "ETTh1",
        "ett/ETTh1.csv.gz",
        "itransformer_etth1",
        {
            "iTransformer": "0.386/0.405",
            "RLinear": "0.386",
            "DLinear": "0.386",
            "PatchTST": "0.414",
            "TimesNet": "0.384",
        },
    ),
    "exchange": Task(
        "Exchange",
        "exchange/exchange_rate.txt.gz",
        "itransformer_exchange",
        {"iTransformer": "0.086/0.206", "DLinear": "0.088", "PatchTST": "0.088"},
        {"start": "1990-01-01", "step_hours": 24.0},  # the dates that the papers' copy of the file made up
    ),
    "ettm1": Task(
        "ETTm1",
        "ett/ETTm1.csv.gz",
        "itransformer_ettm1",
        {"iTransformer": "0.334/0.368", "RLinear": "0.355", "DLinear": "0.345", "PatchTST": "0.329"},
    ),
}


def last_value(parts: Parts) -> Score:
    x, y = _windows(parts.test)
    return _score(x[..., -1:].expand_as(y), y)


def ridge(parts: Parts) -> Score:
    x, y = _windows(parts.train)
    step = max(1, len(x) // RIDGE_WINDOWS)
    X, Y = ((part[::step] - x[::step, :, -1:]).double().flatten(0, 1) for part in (x, y))
    W = torch.linalg.solve(X.T @ X + RIDGE_PENALTY * torch.eye(X.shape[1], dtype=X.dtype), X.T @ Y).float()
    x, y = _windows(parts.test)
    last = x[..., -1:]
    return _score((x - last) @ W + last, y)


def itransformer(task: Task, parts: Parts, out: Path) -> dict[str, Any]:
    torch.manual_seed(RECIPE.seed)
    model = tersor.models.create(task.model)
    started = time.perf_counter()

    def show(what: str, done: int, total: int) -> None:
        print(f"{task.title} {done}/{total} {what} {time.perf_counter() - started:.0f} s", flush=True)

    result = train(
        model, parts.train, objective=forecasting, out=out, config=RECIPE, validation=parts.validation, progress=show
    )
    scores = validate(model, parts.test, forecasting, batch_size=256)
    per_epoch = len(parts.train) // RECIPE.batch_size
    return {
        "scores": (scores["loss"], scores["mae"]),
        "epochs": f"{result.steps // per_epoch} epochs, best {result.best_step // per_epoch}",
        "minutes": (time.perf_counter() - started) / 60,
    }


def measure(name: str, data: Path) -> dict[str, Any]:
    task = TASKS[name]
    parts = load_series(data / task.file, SeriesConfig(**task.series))
    measured: dict[str, Any] = {"last value": last_value(parts), "ridge": ridge(parts)}
    print(task.title, measured, flush=True)
    with tempfile.TemporaryDirectory() as out:
        measured["itransformer"] = itransformer(task, parts, Path(out))
    measured["machine"] = f"{_cpu()}, {torch.get_num_threads()} thread(s), {platform.system()}"
    measured["versions"] = f"Python {platform.python_version()}, torch {torch.__version__}, tersor {tersor.__version__}"
    measured["command"] = f"python benchmarks/forecasting.py {name}"
    return measured


def table(results: dict[str, Any]) -> str:
    described = (__doc__ or "").strip()
    lines = ["# Forecasting: look-back 96, horizon 96", "", described[described.index("Protocol") :], ""]
    for name, task in TASKS.items():
        if name not in results:
            continue
        found = results[name]
        ours = found["itransformer"]
        rows = [
            ("iTransformer, trained here", "{:.4f}/{:.4f}".format(*ours["scores"]), ours["epochs"]),
            *((f"{row}, published", score, "") for row, score in task.published.items()),
            ("yardstick: ridge", "{:.4f}/{:.4f}".format(*found["ridge"]), "closed form"),
            ("yardstick: last value", "{:.4f}/{:.4f}".format(*found["last value"]), ""),
        ]
        lines += [f"## {task.title}", "", "| forecaster | test MSE/MAE | |", "| --- | --- | --- |"]
        lines += [f"| {row} | {score} | {note} |" for row, score, note in rows]
        lines += ["", f"{ours['minutes']:.1f} minutes on {found['machine']}; {found['versions']}."]
        lines += [f"`{found['command']}`", ""]
    return "\n".join(lines)


def _windows(windows: Windows) -> tuple[Tensor, Tensor]:
    """All look-backs (W, N, seq_len) and what follows them (W, N, pred_len)."""
    whole = windows.values.unfold(0, windows.seq_len + windows.pred_len, 1)
    return whole[..., : windows.seq_len], whole[..., windows.seq_len :]


def _score(forecast: Tensor, target: Tensor) -> Score:
    error = (forecast - target).double()
    return error.square().mean().item(), error.abs().mean().item()


def _cpu() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=", ".join(TASKS))
    chosen = parser.parse_args().tasks
    data = Path(os.environ.get("TERSOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
    kept = RESULTS / "forecasting.json"
    RESULTS.mkdir(exist_ok=True)
    for name in chosen:
        measured = measure(name, data)
        results = json.loads(kept.read_text()) if kept.exists() else {}
        results[name] = measured
        kept.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "forecasting.md").write_text(table(results))


if __name__ == "__main__":
    main()
