"""State of health of NASA's battery cells, leave one cell out, with and without test-time training.

    TERSOR_DATA=../shared/data python benchmarks/battery.py                         # the LSTM and the Transformer
    TERSOR_DATA=../shared/data python benchmarks/battery.py --models gpt4battery --device cuda

Three cells train, the fourth is judged: mean absolute error of the health of each of its charges whose 49 increments are
complete. A charge is given as its increments over the mean increment of the training cells. As published: the trunk is
pretrained to fill in masked steps (ratio 0.3, AdamW 1e-3, batches of 10, 10 epochs); it is frozen and the linear head
learns the health (AdamW 1e-3, squared error, 20 epochs); on the fourth cell the soft prompt alone is adapted on its
unlabelled charges (SGD, ratio 0.8, 5 epochs), at each of the rates 5.0 (the published one), 0.5 and 0.05; the rate whose
adapted prompt fills in its charges best is taken, for which no label is needed. Ours: per-sample attention and positions;
no charge of the judged cell is labelled; head on standardized features. GPT-2 begins with random weights, because its
published ones cannot be had here: its row is not the paper's. Yardsticks: ridge on the 49 standardized increments (penalty
1, not tuned), and the mean of the training cells.

Health is capacity over the rated 2 Ah; "first" is capacity over the cell's first one, which for B0006 is an outlier.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from common import DATA, hardware, updating, versions, write_table
from torch import Tensor, nn
from torch.nn import functional as F

import tersor.models
from tersor.models.series.gpt4battery import adapt, masked_loss

FILE = DATA / "battery" / "nasa_li_ion_cycles.csv.gz"
CELLS = ("B0005", "B0006", "B0007", "B0018")
LABELS = ("rated", "first")
MODELS = ("gpt4battery_lstm", "gpt4battery_transformer", "gpt4battery")
SEEDS = 3
BATCH, PRETRAINING, HEAD, PENALTY = 10, 10, 20, 1.0
RATES = (5.0, 0.5, 0.05)  # of adapting


@dataclass(frozen=True)
class Cell:
    charges: Tensor  # (cycles, 49) Ah
    health: dict[str, Tensor]  # label -> (cycles,)


def cells() -> dict[str, Cell]:
    frame = pd.read_csv(FILE)
    frame = frame[frame["valid"] == 1]
    increments = [name for name in frame if name.startswith("dq_")]

    def of(rows: pd.DataFrame) -> Cell:
        health = {"rated": rows["capacity_ah"] / 2.0, "first": rows["soh"]}
        return Cell(
            torch.tensor(rows[increments].to_numpy(), dtype=torch.float32),
            {name: torch.tensor(each.to_numpy(), dtype=torch.float32) for name, each in health.items()},
        )

    return {name: of(frame[frame["cell"] == name]) for name in CELLS}


def split(name: str) -> tuple[Cell, Cell]:
    """The other cells joined, and this one."""
    found = cells()
    others = [cell for key, cell in found.items() if key != name]
    health = {label: torch.cat([each.health[label] for each in others]) for label in LABELS}
    return Cell(torch.cat([each.charges for each in others]), health), found[name]


def ridge(known: Cell, judged: Cell, label: str) -> float:
    mean, deviation = known.charges.mean(0), known.charges.std(0, correction=0)
    X, Z = ((each.charges - mean).double() / deviation for each in (known, judged))
    y = known.health[label].double()
    w = torch.linalg.solve(X.T @ X + PENALTY * torch.eye(X.shape[1], dtype=X.dtype), X.T @ (y - y.mean()))
    return mean_error(Z @ w + y.mean(), judged, label)


def mean_error(predicted: Tensor, judged: Cell, label: str) -> float:
    return (predicted.cpu() - judged.health[label]).abs().mean().item()


def features(model: nn.Module, charges: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(each)[1] for each in charges.split(BATCH)])


def measured(name: str, cell: str, seed: int, device: str) -> dict[str, dict[str, float]]:
    """Label -> mean absolute error "before" and "after" test-time training."""
    torch.manual_seed(seed)
    known, judged = split(cell)
    unit = known.charges.mean()
    charges, unseen = ((each.charges / unit).unsqueeze(-1).to(device) for each in (known, judged))
    model = tersor.models.create(name).to(device).train()
    weights = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    for _ in range(PRETRAINING):
        for batch in charges[torch.randperm(len(charges))].split(BATCH):
            optimizer.zero_grad()
            masked_loss(model, batch, ratio=0.3).backward()
            optimizer.step()
    seen = features(model, charges)
    mean, deviation = seen.mean(0), seen.std(0) + 1e-6
    heads = {label: head_of((seen - mean) / deviation, known.health[label].to(device)) for label in LABELS}

    def errors() -> dict[str, float]:
        found = (features(model, unseen) - mean) / deviation
        return {label: mean_error(head(found).squeeze(-1).detach(), judged, label) for label, head in heads.items()}

    before, start, tried = errors(), copy.deepcopy(model.state_dict()), []
    for rate in RATES:
        model.load_state_dict(start)
        adapt(model, unseen.split(BATCH), ratio=0.8, lr=rate, epochs=5)
        tried.append((filled_in(model, unseen), errors()))
    after = min(tried, key=lambda each: each[0])[1]
    return {label: {"before": before[label], "after": after[label]} for label in LABELS}


def filled_in(model: nn.Module, charges: Tensor) -> float:
    """The error of masked steps, on masks that are the same for all rates."""
    torch.manual_seed(0)
    with torch.no_grad():
        found = sum(masked_loss(model, each, ratio=0.8).item() * len(each) for each in charges.split(BATCH))
    return found if math.isfinite(found) else math.inf


def head_of(x: Tensor, health: Tensor) -> nn.Module:
    """A linear head from features (n, D), by steps of AdamW."""
    head = nn.Linear(x.shape[1], 1, device=x.device)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, health.mean().item())
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(HEAD):
        order = torch.randperm(len(x), device=x.device)
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            F.mse_loss(head(x[rows]).squeeze(-1), health[rows]).backward()
            optimizer.step()
    return copy.deepcopy(head).eval()


def keep(found: dict[str, Any]) -> None:
    """Add rows to what is kept; several processes may do so at once."""
    with updating("battery") as kept:
        kept |= found
        write_table("battery", table(kept))


def yardsticks(label: str) -> dict[str, list[float]]:
    parts = [split(cell) for cell in CELLS]
    return {
        "ridge on the increments": [ridge(known, judged, label) for known, judged in parts],
        "mean of the others": [
            mean_error(known.health[label].mean().expand(len(judged.charges)), judged, label) for known, judged in parts
        ],
    }


def table(kept: dict[str, Any]) -> str:
    described = (__doc__ or "").strip()
    lines = ["# State of health of batteries, leave one cell out", "", described[described.index("Three cells") :], ""]
    for label in LABELS:
        lines += [f"## Capacity over {'the rated 2 Ah' if label == 'rated' else 'the first capacity'}", ""]
        lines += [f"| | {' | '.join(CELLS)} |", "| --- |" + " ---: |" * len(CELLS)]
        for name in MODELS:
            for when, words in (("before", ""), ("after", ", test-time training")):
                cells_of = [kept.get(f"{name} {cell}", {}).get(label, []) for cell in CELLS]
                if any(cells_of):
                    shown = [spread([each[when] for each in found]) for found in cells_of]
                    lines.append(f"| {name}{words} | {' | '.join(shown)} |")
        for row, values in yardsticks(label).items():
            lines.append(f"| {row} | {' | '.join(f'{value:.4f}' for value in values)} |")
        lines.append("")
    lines += [f"Mean and range of {SEEDS} seeds.", ""]
    lines += [f"- {each}" for each in dict.fromkeys(found["run"] for found in kept.values())]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS[:2], choices=MODELS)
    parser.add_argument("--cells", nargs="*", default=CELLS, choices=CELLS)
    parser.add_argument("--device", default="cpu", help="where to train")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    chosen = parser.parse_args()
    on = torch.cuda.get_device_name() if chosen.device == "cuda" else hardware()
    for name in chosen.models:
        run = f"{name}: `python benchmarks/battery.py --models {name} --device {chosen.device} --write`; {on}; {versions()}"
        for cell in chosen.cells:
            each = [measured(name, cell, seed, chosen.device) for seed in range(SEEDS)]
            row = {label: [found[label] for found in each] for label in LABELS}
            print(name, cell, json.dumps(row), flush=True)
            if chosen.write:
                keep({f"{name} {cell}": row | {"run": run}})


if __name__ == "__main__":
    main()
