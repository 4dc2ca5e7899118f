"""How long do policies remember? GTrXL, Transformer-XL and an LSTM on a T-maze, trained by PPO.

    OMP_NUM_THREADS=1 python benchmarks/memory_task.py --processes 16 --write
    ... --quick                 two turns each: whether it runs, not what it is worth

The cue is seen in the first step, and the turn at the end of the corridor is right or wrong by it (tersor.data.memory_task). A
policy without memory succeeds in half of the episodes. All are trained by tersor.train.ppo with the same settings: 32 episodes a
turn, 4 passes in batches of 16, AdamW, gradients cut to a norm of 0.5, at most 300 turns; training stops when 95 % of the last
320 episodes, drawn actions included, succeeded. Whole episodes are one piece for the gradient, of the LSTM too. Success: 200 new
episodes with the likeliest actions.

GTrXL: GRU gates, as published, two layers of width 32. TrXL-I: the same without gates, x + y, its norms before attention and
MLP. TrXL: Transformer-XL, its norms after the sums. LSTM: one layer. The widths of the MLPs and of the LSTM make all of them
equally large.

Stability, after the paper's figure: every model with every of three learning rates and 5 seeds on the corridor of 20, which
of the runs are solved. The other table has each model at the rate that solved most there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from common import kept_numbers, machine, refuse_to_keep_quick, versions, write_numbers, write_table
from torch import Tensor, nn

import tersor.models
from tersor.data.memory_task import TMaze
from tersor.models.control.gtrxl import GTrXL, GTrXLConfig
from tersor.train.ppo import Played, PPOConfig, play, proximal

SEEDS, RATES, LENGTHS, FIRST = range(5), (3e-4, 1e-3, 3e-3), (20, 40, 80, 160), 20
TURNS, BATCH, SOLVED = 300, 16, 0.95
Job = tuple[str, int, float, int]  # model, length, rate, seed


class AfterNorm(nn.Module):
    """A layer of Transformer-XL, with the parts of GTrXL's: LN(x + attention), LN(x + MLP)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: Tensor, memory: Tensor, distances: Tensor, u: Tensor, v: Tensor) -> Tensor:
        part: Any = self.inner
        x = part.norm1(x + part.mha(x, torch.cat((memory, x)), distances, u, v))
        return part.norm2(x + part._mlp(x))


class Recurrent(nn.Module):
    """x (T, B, 3) -> (T, B, 4), an embedding and an LSTM."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.lstm, self.heads = nn.Linear(3, width), nn.LSTM(width, width), nn.Linear(width, 4)
        nn.init.normal_(self.heads.weight, std=0.01)
        nn.init.zeros_(self.heads.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.stream(x, None)[0]

    def stream(self, x: Tensor, memory: Any) -> tuple[Tensor, Any]:
        y, memory = self.lstm(self.embedding(x).relu(), memory)
        return self.heads(y), memory


def build(name: str, most_steps: int) -> nn.Module:
    if name == "LSTM":
        return Recurrent(73)
    sizes: dict[str, Any] = {"d_model": 32, "layers": 2, "heads": 2, "d_head": 16, "d_ff": 64, "memory_len": most_steps}
    if name == "GTrXL":
        return tersor.models.create("gtrxl", input_dim=3, actions=3, **sizes)
    sizes["d_ff"] = 256
    model = GTrXL(GTrXLConfig(input_dim=3, actions=3, **sizes, gate="none", relu_before_gate=name == "TrXL-I"))
    if name == "TrXL":
        model.layers = nn.ModuleList(AfterNorm(layer) for layer in model.layers)
    return model


MODELS = ("GTrXL", "TrXL-I", "TrXL", "LSTM")


def run(job: Job, turns: int = TURNS, ends: float = math.inf) -> dict[str, Any] | None:
    """None where the clock reached `ends` before."""
    name, length, rate, seed = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    started = time.process_time()
    make = lambda: TMaze(length=length)  # noqa: E731
    most = make().most_steps
    model = build(name, most)
    played = Played(model, make, steps=most, config=PPOConfig(seed=seed))
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    recent: list[float] = []
    order = torch.Generator().manual_seed(seed)
    for turn in range(turns):
        if time.monotonic() > ends:
            return None
        played.set_epoch(turn)
        recent = [*recent[-9:], float(played.success.mean())]
        if len(recent) == 10 and statistics.mean(recent) >= SOLVED:
            break
        for numbers in torch.randperm(len(played), generator=order).split(BATCH):
            loss = proximal(model, played.collate([played[int(n)] for n in numbers]))["loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    shown = play(model, [make() for _ in range(200)], steps=most, seed=1000 + seed, best=True)
    return {
        "job": list(job),
        "success": float(shown.success.mean()),
        "episodes": 32 * (turn + 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.process_time() - started,
    }


def jobs_of(rows: list[dict[str, Any]]) -> list[Job]:
    """First those of the corridor of FIRST, then those whose rates they chose, GTrXL and the LSTM before the others, all
    lengths of a seed together; without what is done."""
    done = {tuple(row["job"]) for row in rows}
    order = sorted(RATES, key=lambda rate: abs(math.log(rate / RATES[1])))  # the middle one first
    first: list[Job] = [(name, FIRST, rate, seed) for rate in order for seed in SEEDS for name in MODELS]
    if not done.issuperset(first):
        return [job for job in first if job not in done]
    rest = [(name, length, best_rate(rows, name), seed) for length in LENGTHS for name in MODELS for seed in SEEDS]
    telling = ("GTrXL", "LSTM")  # first
    return [job for job in sorted(rest, key=lambda job: (job[0] not in telling, job[3], job[1])) if job not in done]


def best_rate(rows: list[dict[str, Any]], name: str) -> float:
    """That of the most successes; of equal ones, the quickest."""

    def worth(rate: float) -> tuple[float, float]:
        own = of(rows, name, FIRST, rate)
        return sum(row["success"] for row in own), -sum(row["episodes"] for row in own)

    return max(RATES, key=worth)


def of(rows: list[dict[str, Any]], name: str, length: int, rate: float) -> list[dict[str, Any]]:
    return [row for row in rows if row["job"][:3] == [name, length, rate]]


def cell(rows: list[dict[str, Any]]) -> str:
    """Solved runs, mean and least success, median episodes of the solved."""
    if not rows:
        return ""
    found = [100 * row["success"] for row in rows]
    solved = [row["episodes"] for row in rows if row["success"] >= SOLVED]
    took = f", {statistics.median(solved):,.0f} episodes" if solved else ""
    return f"{len(solved)} of {len(rows)}: {statistics.mean(found):.0f} ({min(found):.0f} to {max(found):.0f}) %{took}"


def table(rows: list[dict[str, Any]], where: str) -> str:
    sizes = {row["job"][0]: row["parameters"] for row in sorted(rows, key=lambda row: -row["job"][1])}
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    lines = [
        "# How long policies remember",
        "",
        about,
        "",
        "Entries: runs that are solved (at least 95 % success) of the 5 seeds,",
    ]
    lines += ["mean success (least to most), median episodes of training of the solved.", "", "## Corridors", ""]
    lines += ["| model | parameters | rate | " + " | ".join(f"{length} steps" for length in LENGTHS) + " |"]
    lines += ["| --- | ---: | ---: |" + " --- |" * len(LENGTHS)]
    for name in MODELS:
        rate = best_rate(rows, name)
        cells = " | ".join(cell(of(rows, name, length, rate)) for length in LENGTHS)
        lines.append(f"| {name} | {sizes.get(name, 0):,} | {rate:g} | {cells} |")
    lines += [
        "",
        f"## Learning rates, corridor of {FIRST}",
        "",
        "| model | " + " | ".join(f"{r:g}" for r in RATES) + " |",
    ]
    lines += ["| --- |" + " --- |" * len(RATES)]
    lines += [
        f"| {name} | " + " | ".join(cell(of(rows, name, FIRST, rate)) for rate in RATES) + " |" for name in MODELS
    ]
    spent = sum(row["seconds"] for row in rows) / 60
    lines += ["", f"{spent:.0f} minutes of one processor core; {where}"]
    return "\n".join([*lines, "`OMP_NUM_THREADS=1 python benchmarks/memory_task.py --processes 16 --write`"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the table")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which runs that are not done are left")
    asked = parser.parse_args()
    refuse_to_keep_quick(asked)
    if asked.quick:
        for name in MODELS:
            print(run((name, 10, 1e-3, 0), 2))
        return
    kept = kept_numbers("memory_task") if asked.write else {}
    rows: list[dict[str, Any]] = kept.get("rows", [])
    ends = time.monotonic() + asked.seconds
    with ProcessPoolExecutor(asked.processes) as pool:
        while (jobs := jobs_of(rows)) and time.monotonic() < ends:
            waiting = {pool.submit(run, job, TURNS, ends) for job in jobs}
            for finished in as_completed(waiting):
                if (row := finished.result()) is None:
                    continue
                rows.append(row)
                print(row, flush=True)
                if asked.write:
                    write_numbers("memory_task", {"rows": rows})
                    write_table("memory_task", table(rows, f"{machine()}, {versions('gymnasium').split(', ')[-1]}"))


if __name__ == "__main__":
    main()
