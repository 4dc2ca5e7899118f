"""iTransformer and S-Mamba trained by us, beside the published rows and beside two forecasters without any training loop.

    TERSOR_DATA=../shared/data python benchmarks/forecasting.py                 # all data sets and models
    TERSOR_DATA=../shared/data python benchmarks/forecasting.py exchange etth1 --models s_mamba

Protocol of tersor.data.series: look-back 96, horizon 96, all variates; MSE and MAE of the scaled test part.
Training as published: Adam 1e-4 and batches of 32 (S-Mamba: 7e-5 on ETTh1, batches of 16 on Exchange), at most 10 epochs,
the rate halved from the third on, the best epoch by validation MSE, patience 3. One deviation: validation is on all windows,
the published code drops a last partial batch.

Yardsticks: "last value" repeats the window's last row. "ridge" is one linear map 96 -> 96 shared by all variates, on
windows minus their last value (added back), closed form with penalty 10, from about 4,000 evenly spaced training
windows. The penalty was not tuned.

Autoformer and Informer are not trained here: at their published size a step takes 6 to 9 seconds of one core of this
machine, an epoch half an hour and more.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import DATA, hardware, kept_numbers, versions, write_numbers, write_table
from torch import Tensor

import tersor.models
from tersor.data.series import Parts, SeriesConfig, Windows, load_series
from tersor.train.config import TrainConfig
from tersor.train.objectives import forecasting
from tersor.train.trainer import train, validate

RECIPE = TrainConfig(
    epochs=10, batch_size=32, lr=1e-4, lr_schedule="halving", patience=3, seed=2023, log_every=100, device="cpu"
)
RIDGE_WINDOWS, RIDGE_PENALTY = 4000, 10.0
TITLES = {"itransformer": "iTransformer", "s_mamba": "S-Mamba"}
Score = tuple[float, float]  # MSE, MAE


@dataclass(frozen=True)
class Task:
    title: str
    file: str
    models: dict[str, tuple[str, dict[str, Any]]]  # row -> variant, what differs from RECIPE
    published: dict[str, str]  # row -> MSE/MAE, as the papers print it; MSE alone where no more was at hand
    series: dict[str, Any] = field(default_factory=dict)


TASKS = {
    "etth1": Task(
        "ETTh1",
        "ett/ETTh1.csv.gz",
        {"itransformer": ("itransformer_etth1", {}), "s_mamba": ("s_mamba_etth1", {"lr": 7e-5})},
        {
            "S-Mamba": "0.386/0.405",
            "Autoformer": "0.449/0.459",
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
        {"itransformer": ("itransformer_exchange", {}), "s_mamba": ("s_mamba_exchange", {"batch_size": 16})},
        {
            "S-Mamba": "0.086/0.207",
            "Autoformer": "0.197/0.323",
            "iTransformer": "0.086/0.206",
            "DLinear": "0.088",
            "PatchTST": "0.088",
        },
        {"start": "1990-01-01", "step_hours": 24.0},  # the dates that the papers' copy of the file made up
    ),
    "ettm1": Task(
        "ETTm1",
        "ett/ETTm1.csv.gz",
        {"itransformer": ("itransformer_ettm1", {})},
        {
            "Autoformer": "0.505/0.475",
            "iTransformer": "0.334/0.368",
            "RLinear": "0.355",
            "DLinear": "0.345",
            "PatchTST": "0.329",
        },
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


def trained(title: str, variant: str, differs: dict[str, Any], parts: Parts, out: Path) -> dict[str, Any]:
    recipe = replace(RECIPE, **differs)
    torch.manual_seed(recipe.seed)
    model = tersor.models.create(variant)
    started = time.perf_counter()

    def show(what: str, done: int, total: int) -> None:
        print(f"{title} {done}/{total} {what} {time.perf_counter() - started:.0f} s", flush=True)

    result = train(
        model, parts.train, objective=forecasting, out=out, config=recipe, validation=parts.validation, progress=show
    )
    scores = validate(model, parts.test, forecasting, batch_size=256)
    per_epoch = len(parts.train) // recipe.batch_size
    return {
        "scores": (scores["loss"], scores["mae"]),
        "epochs": f"{result.steps // per_epoch} epochs, best {result.best_step // per_epoch}",
        "minutes": (time.perf_counter() - started) / 60,
    }


def measure(name: str, data: Path, models: list[str], kept: dict[str, Any]) -> dict[str, Any]:
    """What was measured of a data set before, and now of these models."""
    task = TASKS[name]
    parts = load_series(data / task.file, SeriesConfig(**task.series))
    measured: dict[str, Any] = {**kept, "last value": last_value(parts), "ridge": ridge(parts)}
    print(task.title, measured, flush=True)
    for row in [row for row in task.models if row in models]:
        with tempfile.TemporaryDirectory() as out:
            measured[row] = trained(task.title, *task.models[row], parts, Path(out))
        measured[row] |= {"machine": hardware(), "versions": versions()}
        measured[row]["command"] = f"python benchmarks/forecasting.py {name} --models {row}"
    return measured


def table(results: dict[str, Any]) -> str:
    described = (__doc__ or "").strip()
    lines = ["# Forecasting: look-back 96, horizon 96", "", described[described.index("Protocol") :], ""]
    for name, task in TASKS.items():
        if name not in results:
            continue
        found = results[name]
        ours = {row: found[row] for row in task.models if row in found}
        rows = [
            *(
                (f"{TITLES[row]}, trained here", "{:.4f}/{:.4f}".format(*each["scores"]), each["epochs"])
                for row, each in ours.items()
            ),
            *((f"{row}, published", score, "") for row, score in task.published.items()),
            ("yardstick: ridge", "{:.4f}/{:.4f}".format(*found["ridge"]), "closed form"),
            ("yardstick: last value", "{:.4f}/{:.4f}".format(*found["last value"]), ""),
        ]
        lines += [f"## {task.title}", "", "| forecaster | test MSE/MAE | |", "| --- | --- | --- |"]
        lines += [f"| {row} | {score} | {note} |" for row, score, note in rows]
        lines += [""]
        for row, each in ours.items():
            at = {**found, **each}  # the first rows were kept with the data set's machine and command
            lines += [
                f"{TITLES[row]}: {each['minutes']:.1f} minutes on {at['machine']}; {at['versions']}. `{at['command']}`"
            ]
        lines += [""]
    return "\n".join(lines)


def _windows(windows: Windows) -> tuple[Tensor, Tensor]:
    """All look-backs (W, N, seq_len) and what follows them (W, N, pred_len)."""
    whole = windows.values.unfold(0, windows.seq_len + windows.pred_len, 1)
    return whole[..., : windows.seq_len], whole[..., windows.seq_len :]


def _score(forecast: Tensor, target: Tensor) -> Score:
    error = (forecast - target).double()
    return error.square().mean().item(), error.abs().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=", ".join(TASKS))
    parser.add_argument("--models", nargs="*", default=list(TITLES), help=", ".join(TITLES))
    chosen = parser.parse_args()
    for name in chosen.tasks:
        results = kept_numbers("forecasting")
        measured = measure(name, DATA, chosen.models, results.get(name, {}))
        results = kept_numbers("forecasting")
        results[name] = measured
        write_numbers("forecasting", results)
        write_table("forecasting", table(results))


if __name__ == "__main__":
    main()
