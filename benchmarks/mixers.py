"""Token mixers in one and the same network of one size, on three tasks of memory: what is worth an attention's place?

    OMP_NUM_THREADS=1 python benchmarks/mixers.py --processes 4 --write     kept in benchmarks/results/mixers.md and .json
    ... --quick                 a few steps: whether it runs, not what it is worth

Trains on the GPU where there is one. All rows of a kept table have the same number of steps.

A call that was stopped goes on with what mixers.json does not hold; remove that file to begin anew.

The network: embedding, two times x + mixer(LN x) and x + MLP(LN x), LN, head; width 64, and MLPs so wide that all have the same
number of parameters, within half a percent. Attention turns queries and keys by their place, no other mixer is told places. One
recipe for all: AdamW, 0.002 after a hundred steps of warm-up, cosine, batches of 32 new sequences.

Copying repeats 6 symbols of 8 kinds after 10 blanks, selective copying 6 that stand among 10 blanks. Associative recall: the
value of one of 10 keys, after 10 pairs. Accuracy: the share of answers that are right in 1000 unseen sequences; the mean of the
seeds, in brackets the least and the most.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context

import torch
from common import gpu, kept_numbers, machine, refuse_to_keep_quick, runs_with_this, write_numbers, write_table
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.data.copying import make_copying
from tersor.data.recall import make_recall
from tersor.devices import pick_device
from tersor.layers.mamba2_mixer import Mamba2Mixer
from tersor.models.sequence.flashrnn import RNN
from tersor.models.sequence.s4d import S4D
from tersor.models.text.h3 import Attention, H3AttentionConfig, H3Layer, H3LayerConfig
from tersor.models.text.mamba import Mamba1Mixer, SSMConfig

WIDTH, HEADS, LAYERS, TOKENS = 64, 4, 2, 24
PARAMETERS = 12 * WIDTH**2  # of a mixer with its MLP
LENGTH, SYMBOLS = 16, 6
BATCH, STEPS, TEST, SEEDS, RATE = 32, 3000, 1000, 3, 0.002

MIXERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attention(WIDTH, H3AttentionConfig(num_heads=HEADS, rotary_emb_dim=WIDTH // HEADS)),
    "s4d": lambda: S4D(WIDTH, 32, transposed=False),
    "h3": lambda: H3Layer(WIDTH, H3LayerConfig(d_state=32)),
    "mamba": lambda: Mamba1Mixer(WIDTH, SSMConfig(layer="Mamba1")),
    "mamba2": lambda: Mamba2Mixer(WIDTH, d_inner=2 * WIDTH, d_state=32, headdim=32, ngroups=1),
    "lstm": lambda: RNN(WIDTH, num_heads=HEADS, head_dim=WIDTH // HEADS, function="lstm"),
}
TASKS: dict[str, Callable[[int, int], tuple[Tensor, Tensor]]] = {
    "copying": lambda count, seed: make_copying(count, length=LENGTH, symbols=SYMBOLS, seed=seed),
    "selective copying": lambda count, seed: make_copying(
        count, length=LENGTH, symbols=SYMBOLS, selective=True, seed=seed
    ),
    "recall": lambda count, seed: _recall(count, seed),
}


@dataclass(frozen=True)
class Row:
    mixer: str
    task: str
    seed: int
    parameters: int
    accuracy: float


def _recall(count: int, seed: int) -> tuple[Tensor, Tensor]:
    ids, answers = make_recall(count, seed=seed)
    return ids, answers[:, None]


class Mixed(nn.Module):
    """ids (B, L) -> logits (B, L, TOKENS)."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.mixers = nn.ModuleList(make() for _ in range(LAYERS))
        inner = round((PARAMETERS - _size(self.mixers[0])) / (2 * WIDTH + 1))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, inner), nn.GELU(), nn.Linear(inner, WIDTH)) for _ in range(LAYERS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for n, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            mixed = mixer(self.norms[2 * n](x))
            x = x + (mixed[0] if isinstance(mixed, tuple) else mixed)  # some give their state too
            x = x + mlp(self.norms[2 * n + 1](x))
        logits: Tensor = self.head(x)
        return logits


def _size(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def train(model: nn.Module, ids: Tensor, answers: Tensor) -> None:
    """One pass over the sequences."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    steps = len(ids) // BATCH
    warm = min(100, steps // 2)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm),
        ],
        [warm],
    )
    for x, wanted in zip(ids.split(BATCH), answers.split(BATCH), strict=True):
        logits = model(x)[:, -wanted.shape[1] :]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, ids: Tensor, answers: Tensor) -> float:
    found = torch.cat([model(x)[:, -answers.shape[1] :].argmax(-1) for x in ids.split(250)])
    return float((found == answers).double().mean())


def run(mixer: str, task: str, seed: int, steps: int) -> Row:
    torch.manual_seed(seed)
    device = pick_device("auto")
    model = Mixed(MIXERS[mixer]).to(device)
    ids, answers = (each.to(device) for each in TASKS[task](TEST + steps * BATCH, seed))
    train(model, ids[TEST:], answers[TEST:])
    return Row(mixer, task, seed, _size(model), accuracy(model.eval(), ids[:TEST], answers[:TEST]))


def table(rows: list[Row]) -> str:
    lines = ["| mixer | parameters |" + "".join(f" {task} |" for task in TASKS), "| --- |" + " ---: |" * 4]
    for mixer in MIXERS:
        mine = [row for row in rows if row.mixer == mixer]
        if mine:
            cells = [_cell([row.accuracy for row in mine if row.task == task]) for task in TASKS]
            lines.append(f"| {mixer} | {mine[0].parameters:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "| a guess | | 12.5 % | 12.5 % | 10.0 % |"])


def _cell(found: list[float]) -> str:
    if not found:
        return ""
    mean = f"{100 * sum(found) / len(found):.1f} %"
    return mean if len(found) == 1 else f"{mean} ({100 * min(found):.1f} - {100 * max(found):.1f})"


def kept() -> list[Row]:
    found = kept_numbers("mixers")
    return [Row(**row) for row in found["rows"]] if found.get("steps") == STEPS else []


def _seeds(rows: list[Row]) -> str:
    count = len({row.seed for row in rows})
    return "one seed" if count == 1 else f"{count} seeds, one where no range is shown"


def write(rows: list[Row]) -> None:
    about = (__doc__ or "").split("\n\n", 4)[4].strip()
    where = gpu() if pick_device("auto").type == "cuda" else machine()
    runs = runs_with_this("mixers", where)
    text = [
        "# Mixers of one size on tasks of memory",
        "",
        about,
        "",
        f"{STEPS:,} steps; {_seeds(rows)}.",
        "",
        table(rows),
        "",
        *(f"- {each}" for each in runs),
    ]
    write_table("mixers", "\n".join(text))
    write_numbers("mixers", {"steps": STEPS, "runs": runs, "rows": [asdict(row) for row in rows]})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time")
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument(
        "--write", action="store_true", help="keep the table; after every run, so that it can be stopped"
    )
    asked = parser.parse_args()
    refuse_to_keep_quick(asked)
    steps, seeds = (4, 1) if asked.quick else (STEPS, SEEDS)
    rows = kept() if asked.write else []
    done = {(row.mixer, row.task, row.seed) for row in rows}
    wanted = [(mixer, task, seed) for seed, task, mixer in itertools.product(range(seeds), TASKS, MIXERS)]
    with ProcessPoolExecutor(asked.processes, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(run, *each, steps) for each in wanted if each not in done]
        for each in as_completed(running):
            rows.append(each.result())
            print(f"{rows[-1].mixer}, {rows[-1].task}, seed {rows[-1].seed}: {rows[-1].accuracy:.3f}", flush=True)
            if asked.write:
                write(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
