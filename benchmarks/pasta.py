"""What pretraining is worth to PASTA: probes and fine-tuning on recorded runs, beside the same network from scratch.

    OMP_NUM_THREADS=1 python benchmarks/pasta.py --processes 4 --device cuda --write       kept in benchmarks/results/pasta.*
    ... --quick                 a few steps: whether it runs, not what it is worth

Pretraining, without rewards or tasks: windows of 8 steps of 150 runs of cart and pole, pendulum and point mass each
(tersor.data.control_runs: controllers of all gains), 2,000 steps of AdamW, batches of 32 windows of one system; 64 wide, 3
layers, 256 bins.

Downstream: imitate one controller on the cart and pole (LQR gain, standard costs) from 8 of its runs of 60 steps, 600 steps of
training. Error: of the action over its spread, root mean square, on 20 new runs; "failed": the sensors of place and angle give
nothing, in training too. Balanced: steps of 100 with the pole within 12 degrees and the cart on its track, of 20 starts. Mean
and standard deviation of 3 seeds, each with a pretraining of its own.

MLP: two layers of 256 on the newest state alone; of a failed sensor it sees 0. MLP, window: the same on all 8 steps. PASTA: its
policy head is that MLP on the newest state's representation (all components beside each other): "probe" trains it alone,
"last-layer" and "full" the encoder's last block or all of it too. Scratch: an encoder that was not pretrained, frozen or trained.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import numpy as np
import torch
from common import gpu, kept_numbers, machine, refuse_to_keep_quick, write_numbers, write_table
from torch import Tensor, nn

import tersor.models
from tersor.data.control_runs import SYSTEMS, advanced, control_runs, lqr_gain
from tersor.models.control.pasta import Policy

TASK, STEPS, PAST, SEEDS = "cart-pole", 60, 8, range(3)
OBJECTIVES = ("gpt", "bert", "mtm")
SYSTEM = SYSTEMS[TASK]
FAILED = (0, 2)  # place and angle
ROWS = ["MLP", "MLP, window", "scratch, probe", "scratch, full"]
ROWS += [f"C-{objective.upper()}, {tune}" for objective in OBJECTIVES for tune in ("probe", "last-layer", "full")]


def expert(x: Any) -> Any:
    return np.clip(-lqr_gain(SYSTEM, np.ones(5)) @ x, -SYSTEM.largest, SYSTEM.largest)


def demonstrations(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows: states [N, PAST, 4] and actions [N, PAST, 1] over the largest; what is done has noise, what is wanted none."""
    random, gain = np.random.default_rng(seed), lqr_gain(SYSTEM, np.ones(5))
    states, actions = [], []
    for _ in range(count):
        x = random.uniform(-1, 1, 4) * SYSTEM.start
        seen, done = [], []
        for _ in range(STEPS):
            u = np.clip(-gain @ x, -SYSTEM.largest, SYSTEM.largest)
            seen.append(x)
            done.append(u / SYSTEM.largest)
            x = advanced(
                SYSTEM,
                x,
                np.clip(u + 0.1 * SYSTEM.largest * random.standard_normal(1), -SYSTEM.largest, SYSTEM.largest),
            )
        for start in range(STEPS - PAST + 1):
            states.append(np.stack(seen[start : start + PAST]))
            actions.append(np.stack(done[start : start + PAST]))
    return tuple(torch.tensor(np.stack(each), dtype=torch.float32) for each in (states, actions))  # type: ignore[return-value]


class Plain(nn.Module):
    """states [B, k, 4], actions [B, k - 1, 1] -> [B, 1]: an MLP on the newest state, or on all of them."""

    def __init__(self, window: bool) -> None:
        super().__init__()
        self.window = window
        inputs = 4 * PAST + PAST - 1 if window else 4
        self.mlp = nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        states = states.nan_to_num(0.0)
        inputs = torch.cat((states.flatten(1), actions.flatten(1)), 1) if self.window else states[:, -1]
        found: Tensor = self.mlp(inputs)
        return found


def encoder(objective: str) -> Any:
    return tersor.models.create(
        "pasta", objective=objective, hidden_size=64, layers=3, heads=4, max_tokens=64, bins=256, largest=16.0
    )


def pretrained(objective: str, seed: int, steps: int) -> Any:
    torch.manual_seed(seed)
    model, windows = encoder(objective), []
    for number, name in enumerate(SYSTEMS):
        states, actions = control_runs(name, 150, steps=STEPS - STEPS % PAST, seed=100 * seed + number)
        actions = actions / SYSTEMS[name].largest
        own = (each.reshape(-1, PAST, each.shape[2]).to(torch.get_default_device()) for each in (states, actions))
        windows.append(model.tokens_of(*own))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = windows[step % len(windows)]
        loss = model.loss(rows[torch.randint(len(rows), (32,))])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def broken(states: Tensor, fails: bool) -> Tensor:
    if not fails:
        return states
    states = states.clone()
    states[..., FAILED] = torch.nan
    return states


def learned(model: nn.Module, seed: int, steps: int, fails: bool) -> nn.Module:
    torch.manual_seed(seed)
    states, actions = demonstrations(8, seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(states), (64,))
        found = model(broken(states[rows], fails), actions[rows, :-1])
        loss = (found - actions[rows, -1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def error(model: nn.Module, seed: int, fails: bool) -> float:
    states, actions = demonstrations(20, 1000 + seed)
    found = torch.cat(
        [model(broken(s, fails), a[:, :-1]) for s, a in zip(states.split(256), actions.split(256), strict=True)]
    )
    return float(((found - actions[:, -1]).square().mean() / actions[:, -1].var()).sqrt())


@torch.no_grad()
def balanced(model: nn.Module, seed: int, fails: bool) -> float:
    random, starts = np.random.default_rng(2000 + seed), 20
    x = random.uniform(-1, 1, (starts, 4)) * SYSTEM.start
    seen, done, alive, total = [x] * PAST, [torch.zeros(starts, 1)] * (PAST - 1), np.ones(starts, bool), 0
    for _ in range(100):
        states = torch.tensor(np.stack(seen[-PAST:], 1), dtype=torch.float32)
        action = model(broken(states, fails), torch.stack(done[-(PAST - 1) :], 1)).clamp(-1, 1)
        done.append(action)
        u = action.double().cpu().numpy() * SYSTEM.largest
        x = np.stack([advanced(SYSTEM, x[n], u[n]) if alive[n] else x[n] for n in range(starts)])
        alive &= (np.abs(x[:, 2]) < np.radians(12)) & (np.abs(x[:, 0]) < 2.4)
        total += int(alive.sum())
        seen.append(x)
    return total / starts


def run(kind: str, seed: int, quick: bool, device: str) -> list[dict[str, Any]]:
    """All rows of one pretraining, or those without one (kind: "none")."""
    torch.set_num_threads(1)
    torch.set_default_device(device)
    started, rows = time.process_time(), []
    before, after = (5, 5) if quick else (2000, 600)
    names = [
        row
        for row in ROWS
        if (kind == "none") == (not row.startswith("C-")) and (kind == "none" or kind.upper() in row)
    ]
    state = pretrained(kind, seed, before).state_dict() if kind != "none" else None
    for name in names:
        for fails in (False, True):
            torch.manual_seed(seed)
            if name.startswith("MLP"):
                model: nn.Module = Plain("window" in name)
            else:
                made = encoder(kind if state is not None else "bert")
                if state is not None:
                    made.load_state_dict(state)
                tune = name.partition(", ")[2]
                model = Policy(made, state_dim=4, act_dim=1, tune=tune, pool="concat", width=256)
            learned(model, seed, after, fails)
            found = {"name": name, "seed": seed, "failed": fails}
            rows.append(found | {"error": error(model, seed, fails), "balanced": balanced(model, seed, fails)})
    rows[0]["seconds"] = time.process_time() - started
    return rows


def cell(rows: list[dict[str, Any]], name: str, what: str, fails: bool) -> str:
    found = [row[what] for row in rows if row["name"] == name and row["failed"] == fails]
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    return (
        f"{statistics.mean(found):.3f} ± {spread:.3f}"
        if what == "error"
        else f"{statistics.mean(found):.0f} ± {spread:.0f}"
    )


def table(rows: list[dict[str, Any]], where: str) -> str:
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    lines = ["# What pretraining is worth to PASTA", "", about, ""]
    lines += ["| policy | error | balanced | error, failed | balanced, failed |", "| --- |" + " ---: |" * 4]
    for name in ROWS:
        if any(row["name"] == name for row in rows):
            cells = (cell(rows, name, what, fails) for fails in (False, True) for what in ("error", "balanced"))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    minutes = sum(row.get("seconds", 0) for row in rows) / 60
    told = f"{minutes:.0f} minutes of one processor core; {where}"
    return "\n".join(
        [*lines, "", told, "`OMP_NUM_THREADS=1 python benchmarks/pasta.py --processes 4 --device cuda --write`"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the table")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    refuse_to_keep_quick(asked)
    kept: list[dict[str, Any]] = kept_numbers("pasta").get("rows", []) if asked.write else []
    done = {(row["name"].partition(",")[0].lower().removeprefix("c-"), row["seed"]) for row in kept}
    jobs = [(kind, seed) for seed in SEEDS for kind in (*OBJECTIVES, "none")]
    jobs = [job for job in jobs if ("scratch" if job[0] == "none" else job[0], job[1]) not in done]
    with ProcessPoolExecutor(asked.processes) as pool:
        waiting = [pool.submit(run, *job, asked.quick, asked.device) for job in (jobs[:4] if asked.quick else jobs)]
        for finished in as_completed(waiting):
            kept += finished.result()
            print(*finished.result(), sep="\n", flush=True)
            where = gpu() if asked.device.startswith("cuda") else machine()
            if asked.write:
                write_numbers("pasta", {"rows": kept})
                write_table("pasta", table(kept, where))
    if asked.quick:
        print(table(kept, where)[-1500:])


if __name__ == "__main__":
    main()
