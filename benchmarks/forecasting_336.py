"""GPHT and TEMPO at look-back 336, beside the published rows and the three yardsticks at the same look-back.

    TERSOR_DATA=../shared/data python benchmarks/forecasting_336.py yardsticks
    ... python benchmarks/forecasting_336.py gpht --device cuda --runs runs       # pretrains, then fine-tunes on each data set
    ... python benchmarks/forecasting_336.py gpht-zero --device cuda --runs runs  # pretrains without Exchange
    ... python benchmarks/forecasting_336.py tempo --device cuda --runs runs --horizons 96
    ... --quick                  # two steps of small models, nothing is kept: does it run?

Protocol of tersor.data.series with look-back 336: MSE and MAE of the scaled test part, all windows, variates and steps. Each
variate is a series by itself for both models. Never compare with benchmarks/results/forecasting.md, whose look-back is 96.

GPHT, published size. Pretrained on a mixture: the training parts of ETTh1, ETTh2, ETTm1, ETTm2 and Exchange; the paper's
mixture has traffic, electricity and weather as well, which are not here. Adam 1e-4, batches of 1,024 windows of one variate,
6 epochs (published: 10 at most), the rate halved from the third on; of the weights after every 200 steps, those with the best
MSE of the next token on 20,000 validation windows. Fine-tuned: the heads alone learn on the data set in question, with the
rate and dropout of the published scripts, from batches of as many windows of one variate as 32 windows have, 4 epochs.
Zero-shot: pretrained on the four ETT sets alone. One set of weights forecasts both horizons, token by token.

TEMPO, published size, but not from GPT-2's weights, which are not here: from random ones. The published recipe freezes the
trunk but for LoRA; random weights would stay random so, hence the whole trunk learns here, but for the word embeddings.
300 steps of 256 windows of one variate, Adam 5e-4 with 50 steps of warm-up and a cosine, gradients clipped to norm 1, bfloat16,
the best of 6 validations on 4,096 windows; published are 10 epochs at 1e-3 and a small loss on an STL decomposition, which is
left out here. Zero-shot: the same number of windows of each of the ETT sets but the one in question (published: electricity,
traffic and weather too). Trained: on the data set in question. Nothing was tuned on test data; every row is one run.

Published rows: GPHT's of the paper (arXiv 2402.16516), TEMPO's of the table in its repository (zero-shot; Exchange is not in it).

Yardsticks: as in benchmarks/forecasting.py. Matrix products of a GPU are in TF32. Minutes on a GPU are of one that several
trainings shared, without those of a training that went on where it was stopped. A training that took longer than --minutes was
stopped, and its row says so: GPHT's pretraining after about two epochs. The GPU's time was over before GPHT was fine-tuned on
ETTm1, which is therefore not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DATA, command, gpu, machine, updating, write_table
from forecasting import HORIZONS, TASKS, last_value, ridge, seasonal_naive
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import tersor.models
from tersor.data.series import Parts, SeriesConfig, Windows, load_series
from tersor.train.checkpoint import load_best
from tersor.train.config import TrainConfig
from tersor.train.objectives import forecasting
from tersor.train.trainer import train, validate

LOOK_BACK, TOKEN, SEED = 336, 48, 2021
TARGETS = ("etth1", "exchange", "ettm1")
ETT = {"etth1": "ETTh1", "etth2": "ETTh2", "ettm1": "ETTm1", "ettm2": "ETTm2"}
PRETRAINING = TrainConfig(
    epochs=6, batch_size=1024, lr=1e-4, lr_schedule="halving", validate_every=200, seed=SEED, log_every=50
)
FINE_TUNING = {  # rate and dropout of the published scripts
    "etth1": (1e-4, 0.0),
    "exchange": (1e-5, 0.1),
    "ettm1": (1e-3, 0.0),
}
FINE_TUNING_EPOCHS, WINDOWS_A_STEP = 4, 32  # windows of all variates
TEMPO = TrainConfig(
    epochs=100,
    max_steps=300,
    batch_size=256,
    accumulate=2,
    lr=5e-4,
    warmup_steps=50,
    max_grad_norm=1.0,
    dtype="bfloat16",
    validate_every=50,
    seed=SEED,
    log_every=50,
)
VALIDATED = {"gpht": 20_000, "tempo": 4096}  # windows of one variate
AT_ONCE = {"gpht": 4096, "tempo": 512}  # windows of one variate, in tests
QUICK: dict[str, dict[str, Any]] = {
    "gpht": {"GT_d_model": 32, "GT_d_ff": 32, "GT_e_layers": 1},
    "tempo": {"d_model": 24, "n_head": 2, "gpt_layers": 1},
}
TITLES = {
    "gpht": "GPHT, pretrained (the target's training part is in the mixture)",
    "gpht fine-tuned": "GPHT, fine-tuned",
    "gpht zero-shot": "GPHT, zero-shot",
    "tempo zero-shot": "TEMPO from random weights, zero-shot",
    "tempo trained": "TEMPO from random weights, trained on this data set",
}
PUBLISHED: dict[tuple[str, int], dict[str, str]] = {  # rows that are not named have none
    ("etth1", 96): {"gpht": "0.378/0.388", "gpht fine-tuned": "0.363/0.382", "tempo zero-shot": "0.400/0.406"},
    ("etth1", 720): {"gpht": "0.454/0.449", "gpht fine-tuned": "0.414/0.435", "tempo zero-shot": "0.443/0.451"},
    ("ettm1", 96): {"gpht": "0.301/0.345", "gpht fine-tuned": "0.291/0.339", "tempo zero-shot": "0.438/0.424"},
    ("ettm1", 720): {"gpht": "0.465/0.441", "gpht fine-tuned": "0.452/0.433", "tempo zero-shot": "0.591/0.509"},
    ("exchange", 96): {"gpht": "0.096/0.216", "gpht fine-tuned": "0.087/0.207", "gpht zero-shot": "0.098/0.219"},
    ("exchange", 720): {"gpht": "0.833/0.685", "gpht fine-tuned": "0.808/0.669", "gpht zero-shot": "0.824/0.682"},
}


class OutOfTimeError(Exception):
    """The training has taken as long as it may."""


@dataclass(frozen=True)
class Run:
    """How and where to measure."""

    device: str
    runs: Path  # of the trainer, which goes on where it was stopped
    minutes: float  # that a training may take
    quick: bool

    def config(self, config: TrainConfig) -> TrainConfig:
        config = replace(config, device=self.device)
        return replace(config, max_steps=2, batch_size=8, validate_every=1) if self.quick else config

    def create(self, model: str, **options: Any) -> Any:
        torch.manual_seed(SEED)
        return tersor.models.create(
            "tempo_80m" if model == "tempo" else model, **options, **(QUICK[model] if self.quick else {})
        )

    def train(
        self, module: nn.Module, name: str, samples: Samples, validation: Samples, config: TrainConfig, validated: int
    ) -> str:
        config, out = self.config(config), self.runs / name
        started, steps = time.perf_counter(), (0, 0)

        def show(what: str, done: int, total: int) -> None:
            nonlocal steps
            steps, spent = (done, total), time.perf_counter() - started
            print(f"{name} {done}/{total} {what} {spent:.0f} s", flush=True)
            if spent > 60 * self.minutes:
                raise OutOfTimeError

        try:
            result = train(
                module,
                samples,
                objective=forecasting,
                out=out,
                config=config,
                validation=Some(validation, 64 if self.quick else validated),
                progress=show,
            )
        except OutOfTimeError:
            load_best(module, out, next(module.parameters()).device)
            return f"stopped after {steps[0]:,} of {steps[1]:,} steps of {config.batch_size} windows, the best so far"
        return f"{result.steps:,} steps of {config.batch_size} windows, best after {result.best_step:,}"

    def keep(self, target: str, horizon: int, row: str, found: dict[str, Any]) -> None:
        print(target, horizon, row, json.dumps(found), flush=True)
        if not self.quick:
            where = {"command": command(), "machine": gpu() if self.device == "cuda" else machine()}
            keep(target, horizon, {row: found | where})


class Samples(Dataset[dict[str, Tensor]]):
    """Windows of one variate out of several parts, a batch gathered at once where the values are."""

    def __init__(self, parts: Sequence[Windows], device: str, *, balanced: bool = False) -> None:
        first = parts[0]
        self.seq_len = first.seq_len
        self.steps = torch.arange(first.seq_len + first.pred_len, device=device)
        fewest = min(len(part) * part.values.shape[1] for part in parts)
        starts, at = [], 0
        for part in parts:
            rows, variates = part.values.shape
            own = (torch.arange(len(part))[:, None] + torch.arange(variates) * rows).flatten() + at
            starts.append(_evenly(own, fewest) if balanced else own)
            at += rows * variates
        self.values = torch.cat([part.values.T.flatten() for part in parts]).to(device)  # variate after variate
        self.starts = torch.cat(starts).to(device)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        chosen = torch.tensor(indices, device=self.starts.device)
        window = self.values[self.starts[chosen][:, None] + self.steps][..., None]  # (B, L + H, 1)
        return {"x_enc": window[:, : self.seq_len], "target": window[:, self.seq_len :]}

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch


class Some(Subset[dict[str, Tensor]]):
    """At most so many samples, evenly spaced."""

    collate = staticmethod(Samples.collate)

    def __init__(self, samples: Samples, most: int) -> None:
        super().__init__(samples, _evenly(torch.arange(len(samples)), most).tolist())


def parts_of(name: str, horizon: int) -> Parts:
    if name == "exchange":
        file, given = TASKS[name].file, TASKS[name].series
    else:
        file, given = f"ett/{ETT[name]}.csv.gz", {}
    return load_series(DATA / file, SeriesConfig(**given, seq_len=LOOK_BACK, pred_len=horizon))


def scores(module: nn.Module, model: str, target: str, horizon: int, run: Run) -> tuple[float, float]:
    test: Any = Samples([parts_of(target, horizon).test], run.device)
    if run.quick:
        test = Some(test, 64)
    found = validate(module, test, forecasting, batch_size=AT_ONCE[model])
    return found["loss"], found["mae"]


def gpht(run: Run, sources: Sequence[str], name: str) -> tuple[nn.Module, str, float]:
    """Pretrained; what was learned, and the minutes."""
    parts = [parts_of(each, TOKEN) for each in sources]
    validation = Samples([each.validation for each in parts], run.device)
    module = run.create("gpht", seq_len=LOOK_BACK, pred_len=TOKEN)
    started = time.perf_counter()
    told = run.train(
        module, name, Samples([each.train for each in parts], run.device), validation, PRETRAINING, VALIDATED["gpht"]
    )
    return module, told, (time.perf_counter() - started) / 60


def measure_gpht(run: Run, horizons: Sequence[int], targets: Sequence[str]) -> None:
    module, told, minutes = gpht(run, (*ETT, "exchange"), "gpht")
    for target in targets:
        forecast_gpht(run, module, target, horizons, "gpht", {"note": told, "minutes": minutes})
    for target in targets:
        parts = parts_of(target, TOKEN)
        lr, dropout = FINE_TUNING[target]
        tuned = run.create("gpht", seq_len=LOOK_BACK, pred_len=TOKEN, dropout=dropout, heads_only=True)
        tuned.load_state_dict(module.state_dict())
        variates = len(parts.names)
        started = time.perf_counter()
        told = run.train(
            tuned,
            f"gpht_{target}",
            Samples([parts.train], run.device),
            Samples([parts.validation], run.device),
            replace(PRETRAINING, epochs=FINE_TUNING_EPOCHS, lr=lr, batch_size=WINDOWS_A_STEP * variates),
            VALIDATED["gpht"],
        )
        spent = (time.perf_counter() - started) / 60
        note = {"note": f"then {told}", "minutes": spent}
        forecast_gpht(run, tuned, target, horizons, "gpht fine-tuned", note)


def measure_gpht_zero(run: Run, horizons: Sequence[int], targets: Sequence[str]) -> None:
    if "exchange" not in targets:
        return
    module, told, minutes = gpht(run, tuple(ETT), "gpht_zero")
    note = {"note": told, "minutes": minutes}
    forecast_gpht(run, module, "exchange", horizons, "gpht zero-shot", note)


def forecast_gpht(
    run: Run, module: nn.Module, target: str, horizons: Sequence[int], row: str, note: dict[str, Any]
) -> None:
    for horizon in horizons:
        rolling = run.create("gpht", seq_len=LOOK_BACK, pred_len=horizon).to(run.device)
        rolling.load_state_dict(module.state_dict())
        run.keep(target, horizon, row, {"scores": scores(rolling, "gpht", target, horizon, run), **note})


def measure_tempo(run: Run, horizons: Sequence[int], targets: Sequence[str], *, zero_shot: bool) -> None:
    row = "tempo zero-shot" if zero_shot else "tempo trained"
    for target, horizon in itertools.product(targets, horizons):
        sources = [name for name in ETT if name != target] if zero_shot else [target]
        parts = [parts_of(each, horizon) for each in sources]
        module = run.create("tempo", seq_len=LOOK_BACK, pred_len=horizon)
        module.gpt2_trend.requires_grad_(True)
        module.gpt2_trend.wte.requires_grad_(False)
        started = time.perf_counter()
        told = run.train(
            module,
            f"{row.replace(' ', '_')}_{target}_{horizon}",
            Samples([each.train for each in parts], run.device, balanced=True),
            Samples([each.validation for each in parts], run.device, balanced=True),
            TEMPO,
            VALIDATED["tempo"],
        )
        spent = (time.perf_counter() - started) / 60
        found = {
            "scores": scores(module, "tempo", target, horizon, run),
            "note": told,
            "minutes": spent,
        }
        run.keep(target, horizon, row, found)


def measure_yardsticks(run: Run, horizons: Sequence[int], targets: Sequence[str]) -> None:
    for target, horizon in itertools.product(targets, horizons):
        parts = parts_of(target, horizon)
        found = {
            "ridge": ridge(parts),
            "seasonal naive": seasonal_naive(parts, TASKS[target].season),
            "last value": last_value(parts),
        }
        for row, score in found.items():
            run.keep(target, horizon, row, {"scores": score})


MEASURES = {
    "yardsticks": measure_yardsticks,
    "gpht": measure_gpht,
    "gpht-zero": measure_gpht_zero,
    "tempo": partial(measure_tempo, zero_shot=True),
    "tempo-own": partial(measure_tempo, zero_shot=False),
}


def keep(target: str, horizon: int, found: dict[str, Any]) -> None:
    """Add to what is kept; several processes may do so at once."""
    with updating("forecasting_336") as results:
        results.setdefault(target, {}).setdefault(str(horizon), {}).update(found)
        write_table("forecasting_336", table(results))


def table(results: dict[str, Any]) -> str:
    described = (__doc__ or "").strip()
    lines = ["# Forecasting: look-back 336", "", described[described.index("Protocol") :], ""]
    for target, horizon in itertools.product(TARGETS, HORIZONS):
        found = results.get(target, {}).get(str(horizon), {})
        published = PUBLISHED[target, horizon]
        lines += [f"## {TASKS[target].title}, horizon {horizon}", ""]
        lines += ["| forecaster | test MSE/MAE | published | |", "| --- | --- | --- | --- |"]
        for row, title in TITLES.items():
            if row not in found and row not in published:
                continue
            score = "{:.4f}/{:.4f}".format(*found[row]["scores"]) if row in found else "not measured"
            note = found[row]["note"] if row in found else ""
            lines.append(f"| {title} | {score} | {published.get(row, 'none')} | {note} |")
        for row in ("ridge", "seasonal naive", "last value"):
            if row in found:
                lines.append("| yardstick: {} | {:.4f}/{:.4f} | | |".format(row, *found[row]["scores"]))
        lines.append("")
    minutes: dict[str, list[float]] = {}  # of the trainings of each call
    for target, horizon in itertools.product(TARGETS, HORIZONS):
        for each in results.get(target, {}).get(str(horizon), {}).values():
            minutes.setdefault(f"`{each['command']}`: {each['machine']}", []).extend(
                [each["minutes"]] if "minutes" in each else []
            )
    lines += [f"{call}{f'; a training took up to {max(m):.1f} minutes' if m else ''}." for call, m in minutes.items()]
    return "\n".join(lines)


def _evenly(values: Tensor, most: int) -> Tensor:
    """At most so many of the values, evenly spaced."""
    return values if len(values) <= most else values[torch.linspace(0, len(values) - 1, most).long()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=MEASURES)
    parser.add_argument("--targets", nargs="*", default=TARGETS, choices=TARGETS)
    parser.add_argument("--horizons", nargs="*", type=int, default=HORIZONS, choices=HORIZONS)
    parser.add_argument("--device", default="cpu", help="where to train")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the trainings, which go on where they stopped")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop a training that takes longer")
    parser.add_argument("--quick", action="store_true", help="small models, two steps; nothing is kept")
    chosen = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    run = Run(chosen.device, chosen.runs, chosen.minutes, chosen.quick)
    for what in chosen.what:
        MEASURES[what](run, chosen.horizons, chosen.targets)


if __name__ == "__main__":
    main()
