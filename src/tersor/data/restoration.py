"""Service restoration of a distribution feeder: cells joined by switches, physics that forbids, and trajectories.

A cell is a set of nodes that no switch divides; energising one node energises all. After a blackout only the cells with
a source are live. Each step closes one switch between a live and a dead cell, until none may be closed.

    feeder = Feeder(load_p=(0.1, 0.3, 0.2), load_q=(0.0, 0.1, 0.1), switches=((0, 1), (1, 2)), r=(0.01, 0.02),
                    x=(0.01, 0.02), sources=((0, 1.0, 0.5),))
    run = Restoration(feeder)
    state, reward, done = run.step(0)                     # run.feasible() says which switches may be closed
    order, served = best_order(feeder)                    # the optimum, by trying all
    data = trajectories(feeder, 100, random, steps=8)     # of random feasible policies, for models.control.pidt

All in per unit. A switch may be closed where it joins a live to a dead cell (so no loops, and one source a tree) and
the new state holds: P and Q of each tree within its source's capacity, |S| of each line within its limit, and every
voltage within its range by linearised DistFlow, V_child^2 = V_parent^2 - 2 (r P + x Q), P and Q the load behind the
line. losses=True: by the AC power flow of the balanced feeder (Baran and Wu, 1989), with |S|^2 / V^2 (r, x) lost in each line,
P and Q at its near end and (r^2 + x^2) |S|^2 / V_parent^2 beside the drop, swept until voltages stand still.

Reward of a step: the load restored, weighted, or -penalty and no change for a switch that may not be closed. energy=True: times
the steps that are left, so that a run's return is the energy restored within its steps, in load times steps.

Lines without a switch (`fixed`) are closed whenever one of their ends is live; feeders of real nodes have many
(tersor.data.feeders), and their cells are then more than one of `load_p`.

Ours, where no code is published: cells' loads are all or nothing, cold-load pick-up is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.errors import TersorError

Floats = NDArray[np.float64]
_MOST_SWEEPS = 100
_MOST_SWITCHES = 16  # that best_order tries all orders of


@dataclass(frozen=True, kw_only=True)
class Feeder:
    load_p: tuple[float, ...]  # of each cell
    load_q: tuple[float, ...]
    switches: tuple[tuple[int, int], ...]  # the two cells that each joins
    r: tuple[float, ...]  # of each switch's line
    x: tuple[float, ...]
    sources: tuple[tuple[int, float, float], ...]  # cell, capacities of P and Q
    priority: tuple[float, ...] = ()  # weight of each cell's load; none: all 1
    limits: tuple[float, ...] = ()  # |S| of each line; none: no limit
    fixed: tuple[int, ...] = ()  # those of `switches` that are lines without one
    losses: bool = False
    source_voltage: float = 1.0
    voltages: tuple[float, float] = (0.95, 1.05)

    def __post_init__(self) -> None:
        cells, lines = len(self.load_p), len(self.switches)
        for of, count, names in (("cells", cells, ("load_q", "priority")), ("lines", lines, ("r", "x", "limits"))):
            for name in names:
                given = len(getattr(self, name))
                if given != count and (given or name not in ("priority", "limits")):
                    raise TersorError(f"the feeder's {name} has {given} entries for {count} {of}")
        ends = [cell for pair in self.switches for cell in pair] + [cell for cell, _, _ in self.sources]
        for cell in ends:
            if not 0 <= cell < cells:
                raise TersorError(f"the feeder's switches and sources name cell {cell}, its cells are 0 to {cells - 1}")
        if len({cell for cell, _, _ in self.sources}) != len(self.sources) or not self.sources:
            raise TersorError("a feeder has at least one source, and a cell at most one")
        self._check_fixed()
        if self.violations(frozenset()):
            raise TersorError(f"the feeder cannot serve its sources' own cells: {self.violations(frozenset())[0]}")

    def _check_fixed(self) -> None:
        """Without switches, lines may not close a loop, nor join two sources."""
        group = list(range(len(self.load_p)))

        def root(cell: int) -> int:
            while group[cell] != cell:
                cell = group[cell]
            return cell

        for line in self.fixed:
            if not 0 <= line < len(self.switches):
                raise TersorError(f"the feeder's fixed names line {line}, its lines are 0 to {len(self.switches) - 1}")
            a, b = (root(cell) for cell in self.switches[line])
            if a == b:
                raise TersorError(f"the feeder's fixed lines close a loop with line {line}")
            group[a] = b
        if len({root(cell) for cell, _, _ in self.sources}) != len(self.sources):
            raise TersorError("two of the feeder's sources are joined without a switch between them")

    @cached_property
    def _touching(self) -> list[list[tuple[int, int]]]:
        """Of each cell, (switch, the cell behind it)."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.load_p]
        for switch, (a, b) in enumerate(self.switches):
            found[a].append((switch, b))
            found[b].append((switch, a))
        return found

    @cached_property
    def _feasible(self) -> dict[frozenset[int], NDArray[np.bool_]]:
        return {}

    @cached_property
    def _flows(self) -> dict[frozenset[int], tuple[Floats, Floats]]:
        return {}

    def weighted(self) -> Floats:
        """The load of each cell as it counts for the reward."""
        return np.array(self.load_p, np.float64) * np.array(self.priority or 1.0, np.float64)

    def tree(self, closed: frozenset[int]) -> list[tuple[int, int, int]]:
        """(cell, the cell that feeds it, the switch between) of all live cells, from the sources (-1) outwards."""
        found = [(cell, -1, -1) for cell, _, _ in self.sources]
        live, closed = {cell for cell, _, _ in found}, closed.union(self.fixed)
        for cell, _, _ in found:  # grows while it is read
            for switch, other in self._touching[cell]:
                if switch in closed and other not in live:
                    live.add(other)
                    found.append((other, cell, switch))
        return found

    def flow(self, closed: frozenset[int]) -> tuple[Floats, Floats]:
        """Voltage of each cell (0: dead, or collapsed), and P, Q into each cell from its parent or source [cells, 2]."""
        if closed not in self._flows:
            self._flows[closed] = self._flow(closed)
        return self._flows[closed]

    def _flow(self, closed: frozenset[int]) -> tuple[Floats, Floats]:
        tree = self.tree(closed)
        squared, power = self._sweep(tree, np.full(len(self.load_p), np.inf))
        for _ in range(_MOST_SWEEPS if self.losses else 0):
            before = squared
            squared, power = self._sweep(tree, before)
            if np.abs(squared - before).max() < 1e-12:
                break
        else:
            squared = squared * (not self.losses)  # nothing that stands still was found
        return np.sqrt(squared), power

    def _sweep(self, tree: list[tuple[int, int, int]], squared: Floats) -> tuple[Floats, Floats]:
        """V^2 and the power into each cell, with the currents of the last sweep's V^2 (inf: without losses)."""
        needed, sent, volts = [[0.0, 0.0] for _ in squared], {}, [0.0] * len(squared)
        for cell, parent, switch in reversed(tree):
            needed[cell][0] += self.load_p[cell]
            needed[cell][1] += self.load_q[cell]
            p, q = needed[cell]
            if parent >= 0:
                current = (p * p + q * q) / max(squared[cell], 1e-3)
                sent[cell] = p + self.r[switch] * current, q + self.x[switch] * current
                needed[parent][0] += sent[cell][0]
                needed[parent][1] += sent[cell][1]
        for cell, parent, switch in tree:
            if parent < 0:
                volts[cell] = self.source_voltage**2
            else:
                (p, q), r, x = sent[cell], self.r[switch], self.x[switch]
                lost = (
                    (r * r + x * x) * (p * p + q * q) / max(volts[parent], 1e-3) if np.isfinite(squared[cell]) else 0.0
                )
                volts[cell] = max(volts[parent] - 2 * (r * p + x * q) + lost, 0.0)
        return np.array(volts), np.array(needed)

    def violations(self, closed: frozenset[int]) -> list[str]:
        """What the state breaks, a line each."""
        found, (low, high) = [], self.voltages
        volts, power = self.flow(closed)
        for cell, p, q in self.sources:
            if power[cell, 0] > p or abs(power[cell, 1]) > q:
                found.append(f"source {cell} gives P {power[cell, 0]:.3g}, Q {power[cell, 1]:.3g} of {p:.3g}, {q:.3g}")
        for cell, _, switch in self.tree(closed):
            if not low <= volts[cell] <= high:
                found.append(f"cell {cell} is at {volts[cell]:.4g}, outside of {low} to {high}")
            if switch >= 0 and self.limits and np.hypot(*power[cell]) > self.limits[switch]:
                found.append(f"line {switch} carries {np.hypot(*power[cell]):.3g} of {self.limits[switch]:.3g}")
        return found

    def feasible(self, closed: frozenset[int]) -> NDArray[np.bool_]:
        """Which switches may be closed next."""
        if closed not in self._feasible:
            live = {cell for cell, _, _ in self.tree(closed)}
            self._feasible[closed] = np.array(
                [
                    ((a in live) != (b in live)) and not self.violations(closed | {switch})
                    for switch, (a, b) in enumerate(self.switches)
                ],
                dtype=bool,
            )
        return self._feasible[closed]


class Restoration:
    """One run from the blackout on. State: served, voltage, place in the order of energising of each cell; switches."""

    def __init__(self, feeder: Feeder, *, penalty: float = 1.0, steps: int | None = None, energy: bool = False) -> None:
        self.feeder, self.penalty, self.energy = feeder, penalty, energy
        self.steps = len(feeder.switches) - len(feeder.fixed) if steps is None else steps
        self.order: list[int] = []  # the switches closed
        self.taken = 0

    @property
    def closed(self) -> frozenset[int]:
        return frozenset(self.order)

    def feasible(self) -> NDArray[np.bool_]:
        return self.feeder.feasible(self.closed)

    def done(self) -> bool:
        return self.taken >= self.steps or not self.feasible().any()

    def served(self) -> float:
        live = [cell for cell, _, _ in self.feeder.tree(self.closed)]
        return float(self.feeder.weighted()[live].sum())

    def state(self) -> NDArray[np.float32]:
        feeder = self.feeder
        volts, _ = feeder.flow(self.closed)
        live = [cell for cell, _, _ in feeder.tree(frozenset())]
        for place in range(len(self.order)):
            known = set(live)
            live += [cell for cell, _, _ in feeder.tree(frozenset(self.order[: place + 1])) if cell not in known]
        when, switches = np.zeros(len(volts)), np.zeros(len(feeder.switches))
        when[live] = np.arange(1, len(live) + 1) / len(volts)
        switches[self.order] = 1
        return np.concatenate((volts > 0, volts, when, switches)).astype(np.float32)

    def step(self, switch: int) -> tuple[NDArray[np.float32], float, bool]:
        if not 0 <= switch < len(self.feeder.switches):
            raise TersorError(f"the feeder has switches 0 to {len(self.feeder.switches) - 1}, not {switch}")
        self.taken += 1
        if not self.feasible()[switch]:
            return self.state(), -self.penalty, self.done()
        before = self.served()
        self.order.append(switch)
        restored = self.served() - before
        return self.state(), restored * (self.steps - self.taken + 1 if self.energy else 1), self.done()


def best_order(feeder: Feeder) -> tuple[list[int], float]:
    """The switches to close, and the weighted load served then: the most of all feasible runs, by trying every one."""
    if (count := len(feeder.switches) - len(feeder.fixed)) > _MOST_SWITCHES:
        raise TersorError(f"best_order takes at most {_MOST_SWITCHES} switches, the feeder has {count}")
    weighted = feeder.weighted()
    best: tuple[list[int], float] = ([], -np.inf)
    seen: set[frozenset[int]] = set()
    waiting: list[list[int]] = [[]]
    while waiting:
        order = waiting.pop()
        closed = frozenset(order)
        if closed in seen:
            continue
        seen.add(closed)
        served = float(weighted[[cell for cell, _, _ in feeder.tree(closed)]].sum())
        if served > best[1]:
            best = (order, served)
        waiting += [[*order, int(switch)] for switch in np.flatnonzero(feeder.feasible(closed))]
    return best


def best_energy(feeder: Feeder, steps: int) -> float:
    """The most that a run can return with energy=True, by trying every order; without what the sources' own cells get."""
    weighted, known = feeder.weighted(), dict[frozenset[int], float]()
    live_at_first = float(weighted[[cell for cell, _, _ in feeder.tree(frozenset())]].sum())

    def best(closed: frozenset[int]) -> float:
        if len(closed) == steps:
            return 0.0
        if closed not in known:
            served = float(weighted[[cell for cell, _, _ in feeder.tree(closed)]].sum()) - live_at_first
            waiting = served * (steps - len(closed))  # nothing more is closed
            # The step that closes a switch counts with what is served after it.
            after = [
                float(weighted[[cell for cell, _, _ in feeder.tree(closed | {n})]].sum())
                - live_at_first
                + best(closed | {n})
                for n in map(int, np.flatnonzero(feeder.feasible(closed)))
            ]
            known[closed] = max([waiting, *after])
        return known[closed]

    return best(frozenset())


def trajectories(
    feeder: Feeder, count: int, random: np.random.Generator, *, steps: int, energy: bool = False
) -> dict[str, Tensor]:
    """Runs of a policy that closes a random feasible switch, at the right of `steps` steps each, as PIDT's inputs.

    states [N, K, S], actions [N, K, A] one-hot, returns_to_go [N, K, 1], timesteps [N, K], attention_mask [N, K],
    feasible [N, K, A]. Steps before a run's first are zeros, and all of their switches feasible.
    """
    a, size = len(feeder.switches), len(Restoration(feeder).state())
    data = {
        "states": torch.zeros(count, steps, size),
        "actions": torch.zeros(count, steps, a),
        "returns_to_go": torch.zeros(count, steps, 1),
        "timesteps": torch.zeros(count, steps, dtype=torch.int64),
        "attention_mask": torch.zeros(count, steps),
        "feasible": torch.ones(count, steps, a, dtype=torch.bool),
    }
    for row in range(count):
        run = Restoration(feeder, steps=steps, energy=energy)
        rewards: list[float] = []
        seen = []
        while not run.done():
            state, feasible = run.state(), run.feasible()
            switch = int(random.choice(np.flatnonzero(feasible)))
            seen.append((state, switch, feasible))
            rewards.append(run.step(switch)[1])
        if not seen:
            raise TersorError("no switch of the feeder may be closed, so that there are no trajectories")
        first = steps - len(seen)
        data["returns_to_go"][row, first:, 0] = torch.tensor(np.cumsum(rewards[::-1])[::-1].copy()).float()
        data["timesteps"][row, first:] = torch.arange(len(seen))
        data["attention_mask"][row, first:] = 1
        for place, (state, switch, feasible) in enumerate(seen, first):
            data["states"][row, place] = torch.from_numpy(state)
            data["actions"][row, place, switch] = 1
            data["feasible"][row, place] = torch.from_numpy(feasible)
    return data
