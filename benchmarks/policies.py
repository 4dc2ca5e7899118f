"""Policies in few bits: how much of their return is kept? Every control model of the tree, trained here, then quantized.

    OMP_NUM_THREADS=1 python benchmarks/policies.py --write     everything, kept in benchmarks/results/policies.md and .json
    ... --quick                 a few steps of training: whether it runs, not what it is worth

A call that was stopped goes on with the models that policies.json does not hold; remove that file to begin anew.

gtrxl and pasta imitate the controllers of `tersor.data.control_runs` on the cart and pole, from states and earlier actions;
return: steps of 100 in which the pole is within 12 degrees and the cart on its 4.8 metres, the mean of 20 starts. pidt learns
from random runs of service restoration on a feeder of 8 cells; return: the load that it restores when asked for the optimum, over
four feeders of other loads. sgrl's environment is not installed: it imitates a damped pull towards the target, and its return is
1 less the error of its torques over their spread on unseen limbs.

Kept: the return over that of the same policy in float32; the aim is 95 %. Moved: the mean change of the actions on unseen data,
over their spread. Quantized: all linear layers inside the blocks in groups of 32, at 8 bits by rounding, below by GPTQ calibrated
on the data of training.

The first row of each model is a policy that learned nothing. Where float32 is not above it, the return says nothing, and only
"moved" tells what was lost: pasta does not balance the pole after its 200 steps of training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from common import kept_numbers, machine, refuse_to_keep_quick, write_numbers, write_table
from torch import Tensor, nn

import tersor
from tersor.data.control_runs import SYSTEMS, advanced, control_runs
from tersor.data.restoration import Feeder, Restoration, best_order, trajectories
from tersor.models.control.morphology import limb_places, limb_relation
from tersor.models.control.pasta import Policy

SYSTEM, STEPS, STARTS, PAST = "cart-pole", 100, 20, 8
METHODS = {
    "rtn 8": tersor.RTN(bits=8, group_size=32),
    "gptq 4": tersor.GPTQ(bits=4, group_size=32),
    "gptq 3": tersor.GPTQ(bits=3, group_size=32),
}
PARENTS = [-1, 0, 1, 0, 3]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """model: makes the policy; data: batches of its inputs, with `wanted`; actions: what it does on them; loss: in training;
    value: its return."""

    model: Callable[[], nn.Module]
    data: Callable[[int], list[Batch]]
    actions: Callable[[nn.Module, Batch], Tensor]
    loss: Callable[[nn.Module, Batch], Tensor]
    value: Callable[[nn.Module], float]
    steps: int
    nothing: tuple[str, Callable[[], float]]  # what a policy is that learned nothing, and its return
    rate: float = 2e-3


def inputs_of(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "wanted"}


def squared(model: nn.Module, batch: Batch) -> Tensor:
    return (model(**inputs_of(batch)) - batch["wanted"]).square().mean()


def called(model: nn.Module, batch: Batch) -> Tensor:
    found: Tensor = model(**inputs_of(batch))
    return found


class Remembering(nn.Module):
    """GTrXL with a head: x (T, B, n + m), states and the actions before them -> actions (T, B, m)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": 64, "layers": 2, "heads": 2, "d_head": 32, "d_ff": 128, "memory_len": PAST}
        self.memory = tersor.models.create("gtrxl", input_dim=5, **sizes)
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        actions: Tensor = self.head(self.memory(x))
        return actions


def recorded(seed: int) -> tuple[Tensor, Tensor]:
    """Windows of PAST states [N, PAST, 4] and actions [N, PAST, 1], the actions over the largest."""
    states, actions = control_runs(SYSTEM, 200, steps=10 * PAST, seed=seed)
    return states.reshape(-1, PAST, 4), actions.reshape(-1, PAST, 1) / SYSTEMS[SYSTEM].largest


def remembered(states: Tensor, actions: Tensor) -> Tensor:
    """(B, k, 4), (B, k - 1, 1) -> x (k, B, 5)."""
    before = torch.cat((actions.new_zeros(len(states), 1, 1), actions), 1)
    return torch.cat((states, before), -1).transpose(0, 1)


def whole(states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """As long as the windows that pasta learned from: the first state stands still before a run begins."""
    before = PAST - states.shape[1]
    still = states[:, :1].expand(-1, before, -1)
    return torch.cat((still, states), 1), torch.cat((actions.new_zeros(len(states), before, 1), actions), 1)


def gtrxl_data(seed: int) -> list[Batch]:
    states, actions = recorded(seed)
    pairs = zip(states.split(32), actions.split(32), strict=True)
    return [{"x": remembered(s, a[:, :-1]), "wanted": a.transpose(0, 1)} for s, a in pairs]


def pasta_data(seed: int) -> list[Batch]:
    states, actions = recorded(seed)
    pairs = zip(states.split(32), actions.split(32), strict=True)
    return [{"states": s, "actions": a[:, :-1], "wanted": a[:, -1]} for s, a in pairs]


@torch.no_grad()
def balanced(act: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean steps until the pole or the cart is lost. act: states (B, k, 4), actions (B, k - 1, 1) -> actions (B, 1)."""
    system, random = SYSTEMS[SYSTEM], np.random.default_rng(9)
    x = random.uniform(-1, 1, (STARTS, 4)) * np.array([0.5, 0.2, 0.1, 0.2])
    states, actions, alive, total = [x.copy()], list[Tensor](), np.ones(STARTS, bool), 0
    for _ in range(STEPS):
        seen = torch.tensor(np.stack(states[-PAST:], 1), dtype=torch.float32)
        past = torch.stack(actions[-(seen.shape[1] - 1) :], 1) if seen.shape[1] > 1 else torch.zeros(STARTS, 0, 1)
        actions.append(act(seen, past).clamp(-1, 1))
        u = actions[-1].double().numpy() * system.largest
        x = np.stack([advanced(system, x[n], u[n]) if alive[n] else x[n] for n in range(STARTS)])
        alive &= (np.abs(x[:, 2]) < np.radians(12)) & (np.abs(x[:, 0]) < 2.4)
        total += int(alive.sum())
        states.append(x.copy())
    return total / STARTS


def unmoved() -> float:
    return balanced(lambda states, actions: torch.zeros(STARTS, 1))


def feeder(seed: int) -> Feeder:
    """0 and 5 have sources; 0-1-2-3-4 is a line that 3-6-5 ties to the other, which can serve 3 or 7, not both."""
    plain = Feeder(
        load_p=(0.1, 0.3, 0.2, 0.4, 0.1, 0.0, 0.3, 0.4),
        load_q=(0.0, 0.1, 0.1, 0.2, 0.0, 0.0, 0.1, 0.0),
        switches=((0, 1), (1, 2), (2, 3), (3, 4), (5, 6), (3, 6), (6, 7)),
        r=(0.02, 0.02, 0.03, 0.02, 0.02, 0.04, 0.02),
        x=(0.02, 0.02, 0.02, 0.02, 0.02, 0.03, 0.02),
        sources=((0, 0.8, 0.5), (5, 0.7, 0.5)),
        priority=(1, 1, 1, 3, 1, 1, 1, 1),
        limits=(0.6, 1, 1, 1, 1, 1, 1),
    )
    change = np.random.default_rng(seed).uniform(0.8, 1.0, 8) if seed else np.ones(8)
    return replace(plain, load_p=tuple(np.array(plain.load_p) * change))


def pidt_data(seed: int) -> list[Batch]:
    parts = [trajectories(feeder(n), 32, np.random.default_rng(seed), steps=8) for n in range(4)]
    return [{**part, "wanted": part["actions"]} for part in parts]


def chosen(model: nn.Module, batch: Batch) -> Tensor:
    """Probabilities of the switches in the real steps."""
    found: Tensor = model(**inputs_of(batch)).actions.softmax(-1)[batch["attention_mask"] > 0]
    return found


def pidt_loss(model: Any, batch: Batch) -> Tensor:
    found: Tensor = model.loss(model(**inputs_of(batch)), batch["wanted"], batch["attention_mask"])
    return found


@torch.no_grad()
def restored(model: Any) -> float:
    total = 0.0
    for n in range(4):
        grid = feeder(n)
        best = best_order(grid)[1] - float(grid.weighted()[[0, 5]].sum())
        run, left, states, actions = Restoration(grid, steps=8), [best], list[Any](), torch.zeros(0, 7)
        while not run.done():
            states.append(run.state())
            actions = torch.cat((actions, torch.zeros(1, 7)))
            given = torch.from_numpy(np.stack(states)), actions, torch.tensor(left)[:, None], torch.arange(len(left))
            switch = int(model.act(*given, feasible=torch.from_numpy(run.feasible())).argmax())
            actions[-1, switch] = 1
            left.append(left[-1] - run.step(switch)[1])
        total += best - left[-1]
    return total


def restored_at_random() -> float:
    total = 0.0
    for n in range(4):
        runs = trajectories(feeder(n), 100, np.random.default_rng(5), steps=8)
        first = runs["attention_mask"].argmax(1)
        total += float(runs["returns_to_go"][torch.arange(100), first, 0].mean())
    return total


def sgrl_data(seed: int) -> list[Batch]:
    """Limbs [L, B, 41] drawn at random; wanted: the target's pull less the limb's turning, along each joint's axis."""
    draw = torch.Generator().manual_seed(seed)
    tree = {"traversals": limb_places(PARENTS), "relation": limb_relation(PARENTS)}
    batches = []
    for _ in range(20):
        src = torch.randn(len(PARENTS), 32, 41, generator=draw)
        vectors = src[..., :24].unflatten(-1, (8, 3))
        pull = (vectors[..., 2, :] - 0.5 * vectors[..., 4, :])[..., None, :]
        batches.append({"src": src, **tree, "wanted": (pull * vectors[..., 5:, :]).sum(-1).tanh()})
    return batches


@torch.no_grad()
def torques(model: Any, batch: Batch) -> Tensor:
    found: Tensor = model.act(**inputs_of(batch))
    return found


def sgrl_loss(model: Any, batch: Batch) -> Tensor:
    return (model.act(**inputs_of(batch)) - batch["wanted"]).square().mean()


@torch.no_grad()
def imitated(model: nn.Module) -> float:
    batches = sgrl_data(2)
    error = torch.cat([torques(model, batch) - batch["wanted"] for batch in batches], 1).square().mean()
    spread = torch.cat([batch["wanted"] for batch in batches], 1).var()
    return 1 - float((error / spread).sqrt())


def pasta() -> nn.Module:
    encoder = tersor.models.create("pasta", hidden_size=64, layers=2, heads=4, max_tokens=64, bins=256)
    return Policy(encoder, state_dim=4, act_dim=1, tune="full", pool="concat", width=128)


def pidt() -> nn.Module:
    sizes: Mapping[str, Any] = {"max_length": 8, "max_ep_len": 20, "hidden_size": 32, "n_layer": 2, "n_head": 2}
    return tersor.models.create("pidt", state_dim=31, act_dim=7, discrete=True, **sizes)


RECIPES = {
    "gtrxl": Recipe(
        Remembering, gtrxl_data, called, squared,
        lambda model: balanced(lambda s, a: model(remembered(s, a))[-1]), 800, ("no force", unmoved),
    ),
    "pasta": Recipe(
        pasta, pasta_data, called, squared,
        lambda model: balanced(lambda s, a: model(*whole(s, a))), 200, ("no force", unmoved),
    ),
    "pidt": Recipe(pidt, pidt_data, chosen, pidt_loss, restored, 300, ("random switches", restored_at_random), 5e-3),
    "sgrl": Recipe(lambda: tersor.models.create("sgrl_actor", ninp=32, nhid=64, nlayers=2), sgrl_data, torques,
                   sgrl_loss, imitated, 150, ("the mean", lambda: 0.0)),
}  # fmt: skip


def train(model: nn.Module, recipe: Recipe, steps: int) -> None:
    batches, optimizer = recipe.data(0), torch.optim.AdamW(model.parameters(), recipe.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = batches[int(torch.randint(len(batches), (1,), generator=order))]
        loss = recipe.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def rows_of(name: str, recipe: Recipe, steps: int) -> list[str]:
    torch.manual_seed(0)
    model = recipe.model()
    train(model, recipe, steps)
    model.eval()
    value, unseen = recipe.value(model), recipe.data(1)[:10]
    with torch.no_grad():
        before = [recipe.actions(model, batch) for batch in unseen]
    spread = torch.cat([each.flatten() for each in before]).std()
    size = sum(each.numel() for each in model.parameters())
    what, least = recipe.nothing
    lines = [f"| {name} | | {what} | {least():.3f} | | |", f"| {name} | {size:,} | float32 | {value:.3f} | | |"]
    for method, options in METHODS.items():
        samples = [inputs_of(batch) for batch in recipe.data(0)[:8]]
        small = tersor.compress(model, options, calibration=samples, format=None).model.eval()
        with torch.no_grad():
            after = [recipe.actions(small, batch) for batch in unseen]
        moved = torch.cat([(a - b).flatten().abs() for a, b in zip(after, before, strict=True)]).mean() / spread
        found = recipe.value(small)
        lines.append(
            f"| {name} | {size:,} | {method} | {found:.3f} | {100 * found / value:.1f} % | {100 * moved:.1f} % |"
        )
    print("\n".join(lines), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the table")
    asked = parser.parse_args()
    refuse_to_keep_quick(asked)
    rows: dict[str, list[str]] = kept_numbers("policies") if asked.write else {}
    for name, recipe in RECIPES.items():
        if name not in rows:
            rows[name] = rows_of(name, recipe, 5 if asked.quick else recipe.steps)
        if asked.write:
            write(rows)


def write(rows: Mapping[str, list[str]]) -> None:
    about = (__doc__ or "").split("\n\n", 3)[3].strip()
    head = ["| policy | parameters | weights | return | kept | moved |", "| --- | ---: | --- | ---: | ---: | ---: |"]
    lines = [*head, *(line for each in rows.values() for line in each)]
    command = "`OMP_NUM_THREADS=1 python benchmarks/policies.py --write`"
    write_table("policies", "\n".join(["# Policies in few bits", "", about, "", *lines, "", machine(), command]))
    write_numbers("policies", rows)


if __name__ == "__main__":
    main()
