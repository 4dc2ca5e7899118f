"""Service restoration of IEEE's feeders of 13 and 123 nodes: PIDT beside greedy, random and optimal switching.

    OMP_NUM_THREADS=1 python benchmarks/service_restoration.py --write    kept in benchmarks/results/service_restoration.md
    ... --quick                 a few steps of training: whether it runs, not what it is worth

After a blackout a few generators run, together smaller than the load. Each step of five minutes closes one switch; the horizon is
as many steps as the feeder has switches. tersor.data.feeders says what is published of the feeders and what is ours;
tersor.data.restoration which switches may be closed: those that keep generators, voltages (0.95 to 1.05) and a forest.

PIDT (hidden size 64, 3 layers) learns from 1,000 runs that close random feasible switches, 600 steps of AdamW, batches of 64;
returns are energy. It is asked for the optimum of the feeder at its published load. Greedy closes the feasible switch that
restores most at once, of equals the first. Optimal: all orders are tried. Published load: one run. Other loads: 10 draws, each
node's load times a number from 0.7 to 1.3; PIDT is not told of them but by what may be closed, and asked for each one's optimum.
Mean of 3 trainings.

Energy restored is over that of the optimum. Violated: states of all runs in which pandapower's AC power flow (Newton) has a
voltage out of its limits or a generator above its capacity (tolerance 1e-6). "Without physics": the same PIDT where only
radiality is masked: a switch that joins a live to a dead part. Energy after the first violated state is not counted there.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
import torch
from common import kept_numbers, machine, refuse_to_keep_quick, write_numbers, write_table
from numpy.typing import NDArray
from torch import nn

import tersor.models
from tersor.data.feeders import BASE_KV, BASE_MVA, NODES_13, NODES_123, OHM, ieee13, ieee123
from tersor.data.restoration import Feeder, Restoration, best_energy, trajectories

FEEDERS: dict[str, tuple[Callable[..., Feeder], int]] = {
    "13": (ieee13, len(NODES_13)),
    "123": (ieee123, len(NODES_123)),
}
MINUTES, DRAWS, SEEDS, STEPS, RUNS = 5, 10, range(3), 600, 1000
Mask = NDArray[np.bool_]


@dataclass
class Step:
    state: NDArray[np.float32]
    allowed: Mask
    left: float  # of the return that is asked for
    switch: int = -1


@dataclass
class Followed:
    restored: float = 0.0  # load
    energy: float = 0.0
    broken: int = 0  # states that are violated
    states: int = 0


Policy = Callable[[Feeder, frozenset[int], list[Step]], int]


def horizon(feeder: Feeder) -> int:
    return len(feeder.switches) - len(feeder.fixed)


@cache
def ac_network(feeder: Feeder) -> tuple[Any, NDArray[np.int64], NDArray[np.int64]]:
    """pandapower's, whole: bus n is cell n; and which lines of the feeder are its switches, and its lines."""
    import pandapower as pp

    net = pp.create_empty_network(sn_mva=BASE_MVA)
    pp.create_buses(net, len(feeder.load_p), vn_kv=BASE_KV)
    load_p, load_q, r, x = (np.array(each) for each in (feeder.load_p, feeder.load_q, feeder.r, feeder.x))
    pp.create_loads(net, list(range(len(load_p))), load_p * BASE_MVA, load_q * BASE_MVA)
    for cell, *_ in feeder.sources:
        pp.create_ext_grid(net, cell, vm_pu=feeder.source_voltage)
    ends, plain = np.array(feeder.switches), (r == 0) & (x == 0)
    if plain.any():
        pp.create_switches(net, ends[plain, 0].tolist(), ends[plain, 1].tolist(), et="b")
    real = ends[~plain].T.tolist()
    pp.create_lines_from_parameters(net, *real, 1.0, r[~plain] / OHM, x[~plain] / OHM, 0.0, max_i_ka=99.0)
    return net, np.flatnonzero(plain), np.flatnonzero(~plain)


def ac_violations(feeder: Feeder, closed: frozenset[int]) -> list[str]:
    """By pandapower: another's power flow on the lines that are closed."""
    import pandapower as pp

    net, plain, real = ac_network(feeder)
    tree = feeder.tree(closed)
    cells = [cell for cell, _, _ in tree]
    used = [line for _, parent, line in tree if parent >= 0]
    net.bus["in_service"] = net.load["in_service"] = np.isin(np.arange(len(feeder.load_p)), cells)
    net.switch["closed"], net.line["in_service"] = np.isin(plain, used), np.isin(real, used)
    try:
        pp.runpp(net, numba=False)
    except pp.LoadflowNotConverged:
        return ["no power flow"]
    volts = net.res_bus.vm_pu.to_numpy()[cells]
    ours = feeder.flow(closed)[0][cells]
    worst.append(float(np.abs(volts - ours).max()))
    low, high = feeder.voltages
    found = [f"voltage {v}" for v in volts if not low - 1e-6 <= v <= high + 1e-6]
    for (p, q), (_, most_p, most_q) in zip(
        net.res_ext_grid[["p_mw", "q_mvar"]].to_numpy() / BASE_MVA, feeder.sources, strict=True
    ):
        if p > most_p + 1e-6 or abs(q) > most_q + 1e-6:
            found.append(f"generator {p}, {q}")
    return found


worst: list[float] = []  # differences of the two power flows, per unit
_known: dict[tuple[int, frozenset[int]], bool] = {}
_kept: list[Feeder] = []  # so that no two have one id


def violated(feeder: Feeder, closed: frozenset[int]) -> bool:
    if feeder not in _kept:
        _kept.append(feeder)
    key = (_kept.index(feeder), closed)
    if key not in _known:
        _known[key] = bool(ac_violations(feeder, closed))
    return _known[key]


def radial(feeder: Feeder, closed: frozenset[int]) -> Mask:
    live = {cell for cell, _, _ in feeder.tree(closed)}
    return np.array([(a in live) != (b in live) for a, b in feeder.switches])


def follow(feeder: Feeder, choose: Policy, asked: float, *, physics: bool = True) -> Followed:
    T, closed, past = horizon(feeder), frozenset[int](), list[Step]()
    at_first, left, served = load_of(feeder, closed), asked, 0.0
    told = Followed()
    for taken in range(T):
        allowed = feeder.feasible(closed) if physics else radial(feeder, closed)
        if not allowed.any():
            break
        run = Restoration(feeder, steps=T)
        run.order = [step.switch for step in past]
        past.append(Step(run.state(), allowed, left))
        past[-1].switch = choose(feeder, closed, past)
        closed |= {past[-1].switch}
        before, served = served, load_of(feeder, closed) - at_first
        left -= (served - before) * (T - taken)
        told.states += 1
        told.broken += violated(feeder, closed)
        if not told.broken:
            told.energy += (served - told.restored) * (T - taken)
            told.restored = served
    if told.broken:  # what was restored until then is lost with it
        told.energy -= told.restored * (T - past_whole(feeder, past))
    return told


def past_whole(feeder: Feeder, past: list[Step]) -> int:
    """How many steps came before the first violated state."""
    closed = frozenset[int]()
    for number, step in enumerate(past):
        closed |= {step.switch}
        if violated(feeder, closed):
            return number
    return len(past)


def load_of(feeder: Feeder, closed: frozenset[int]) -> float:
    return float(feeder.weighted()[[cell for cell, _, _ in feeder.tree(closed)]].sum())


def greedy(feeder: Feeder, closed: frozenset[int], past: list[Step]) -> int:
    return int(max(np.flatnonzero(past[-1].allowed), key=lambda switch: load_of(feeder, closed | {int(switch)})))


def at_random(seed: int) -> Policy:
    random = np.random.default_rng(seed)
    return lambda feeder, closed, past: int(random.choice(np.flatnonzero(past[-1].allowed)))


def learned(model: Any) -> Policy:
    @torch.no_grad()
    def choose(feeder: Feeder, closed: frozenset[int], past: list[Step]) -> int:
        actions = torch.zeros(len(past), len(feeder.switches))
        actions[torch.arange(len(past) - 1), [step.switch for step in past[:-1]]] = 1
        states = torch.from_numpy(np.stack([step.state for step in past]))
        asked = torch.tensor([[step.left] for step in past], dtype=torch.float32)
        allowed = torch.from_numpy(past[-1].allowed)
        return int(model.act(states, actions, asked, torch.arange(len(past)), feasible=allowed).argmax())

    return choose


def train(feeder: Feeder, seed: int, steps: int, runs: int) -> nn.Module:
    torch.manual_seed(seed)
    T = horizon(feeder)
    data = trajectories(feeder, runs, np.random.default_rng(seed), steps=T, energy=True)
    sizes = {"state_dim": data["states"].shape[2], "act_dim": len(feeder.switches), "max_length": T, "max_ep_len": T}
    model: Any = tersor.models.create("pidt", discrete=True, hidden_size=64, n_layer=3, n_head=2, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(runs, (64,), generator=draw)
        batch = {name: value[rows] for name, value in data.items()}
        loss = model.loss(model(**batch), batch["actions"], batch["attention_mask"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def row(name: str, told: list[tuple[float, Followed]]) -> str:
    """told: the optimum of each run, and what it was."""
    load = statistics.mean(run.restored for _, run in told) * BASE_MVA
    energy = statistics.mean(run.energy for _, run in told) * BASE_MVA * MINUTES / 60
    share = [100 * run.energy / best for best, run in told]
    broken, states = sum(run.broken for _, run in told), sum(run.states for _, run in told)
    return f"| {name} | {load:.3f} | {energy:.3f} | {statistics.mean(share):.1f} % | {min(share):.1f} % | {broken} of {states} |"


Keep = Callable[[str, dict[str, Any]], None]


def measure(name: str, kept: dict[str, Any], keep: Keep, *, quick: bool) -> None:
    """What is not kept yet of a feeder; keep(title, numbers) as it is done."""
    make, nodes = FEEDERS[name]
    feeder, random = make(), np.random.default_rng(0)
    draws = [make(loads=random.uniform(0.7, 1.3, nodes).tolist()) for _ in range(2 if quick else DRAWS)]
    groups = {"published load": [feeder], "other loads": draws}
    if not (missing := groups.keys() - kept.keys()):
        return
    T, started = horizon(feeder), time.process_time()
    models = [
        train(feeder, seed, 5 if quick else STEPS, 20 if quick else RUNS) for seed in (range(1) if quick else SEEDS)
    ]
    print(f"{name}: trained in {time.process_time() - started:.0f} s", flush=True)
    for title in [title for title in groups if title in missing]:
        group, checked = groups[title], len(worst)
        best = [best_energy(each, T) for each in group]
        lines = ["", f"### {nodes} nodes, {T} switches: {title}", ""]
        lines += [
            "| policy | restored, MW | energy, MWh | of the optimum | least | violated |",
            "| --- |" + " ---: |" * 5,
        ]
        optimum = statistics.mean(best) * BASE_MVA * MINUTES / 60
        lines.append(f"| optimal | | {optimum:.3f} | 100.0 % | 100.0 % | |")
        policies: dict[str, tuple[list[Policy], bool]] = {
            "PIDT": ([learned(model) for model in models], True),
            "greedy": ([greedy], True),
            "random": ([at_random(seed) for seed in range(3)], True),
            "PIDT without physics": ([learned(model) for model in models], False),
            "greedy without physics": ([greedy], False),
        }
        for label, (chosen, physics) in policies.items():
            told = [(b, follow(each, policy, b, physics=physics))
                    for each, b in zip(group, best, strict=True) for policy in chosen]  # fmt: skip
            lines.append(row(label, told))
            print(lines[-1], flush=True)
        spent, started = time.process_time() - started, time.process_time()
        keep(title, {"lines": lines, "checked": len(worst) - checked, "apart": max(worst[checked:]), "seconds": spent})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the table")
    parser.add_argument("--feeders", nargs="+", default=list(FEEDERS), choices=FEEDERS)
    asked = parser.parse_args()
    refuse_to_keep_quick(asked)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # pandas' of pandapower
    kept: dict[str, Any] = kept_numbers("service_restoration") if asked.write else {}
    for name in asked.feeders:
        own = kept.setdefault(name, {})

        def keep(title: str, numbers: dict[str, Any], own: dict[str, Any] = own) -> None:
            own[title] = numbers
            if asked.write:
                write_numbers("service_restoration", kept)
                write_table("service_restoration", table(kept))

        measure(name, own, keep, quick=asked.quick)


def table(kept: dict[str, Any]) -> str:
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    done = [each for name in FEEDERS for each in kept.get(name, {}).values()]
    checked, apart = sum(each["checked"] for each in done), max(each["apart"] for each in done)
    told = f"In the {checked:,} states checked, the two power flows differ by at most {apart:.1e} per unit of voltage."
    minutes = sum(each["seconds"] for each in done) / 60
    libraries = f"pandapower {metadata.version('pandapower')}, pandas {metadata.version('pandas')}"
    where = f"{minutes:.0f} minutes of one processor core; {machine()}, {libraries}"
    command = "`OMP_NUM_THREADS=1 python benchmarks/service_restoration.py --write`"
    lines = [line for each in done for line in each["lines"]]
    return "\n".join(["# Service restoration", "", about, *lines, "", told, "", where, command])


if __name__ == "__main__":
    main()
