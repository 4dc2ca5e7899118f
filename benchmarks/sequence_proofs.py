"""What the sequence models learn: Game of Life, chains of thought, regression in context, parity, three tasks of the LRA.

    python benchmarks/sequence_proofs.py all FOLDER --seconds 660               ten trainings at once on one GPU
    ... all FOLDER --only cot- parity/                                          those whose name begins so
    python benchmarks/sequence_proofs.py data FOLDER                            draws what takes long to draw, on many cores
    python benchmarks/sequence_proofs.py train lifegpt FOLDER --seconds 400     one training; another name lists them all
    python benchmarks/sequence_proofs.py gather FOLDER                          rows.json and curves.csv of what is done so far
    python benchmarks/sequence_proofs_table.py FOLDER --write                   keeps the table, with curves and pictures

Every training is `tersor.train.trainer.train` on a model of tersor and a task of tersor, with AdamW. Where a comparison is of
equal samples, the number of steps is fixed: a warm-up, then a cosine. Elsewhere the seconds are: the rate is held for 60 % of
them, then falls as a cosine over so many steps as the pace until then promises. A training that has not ended in time stops, and
what it has learned until then is what is measured. Many trainings share a GPU: seconds say little, steps and samples do.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DATA, gpu, machine
from safetensors.torch import load_file
from sequence_proofs_data import DRAWN, LENGTH, LISTOPS_LENGTH, SMALL, draw, stacked
from torch import Tensor, nn
from torch.nn import functional as F

from tersor import models
from tersor.data.chain_of_thought import chain_targets, make_chains
from tersor.data.in_context import make_in_context
from tersor.data.life import make_life, random_boards
from tersor.data.long_range import BENCHMARKS, LongRange, LongRangeConfig, load_long_range
from tersor.data.seeding import mixed_seed
from tersor.evaluate import chain_of_thought
from tersor.evaluate.life import cell_accuracy
from tersor.models.sequence import algoformer
from tersor.models.text import lifegpt
from tersor.tasks.long_range_arena import prepare
from tersor.train.checkpoint import load_best
from tersor.train.config import TrainConfig
from tersor.train.objectives import Batch, Objective, answering
from tersor.train.self_pretraining import self_pretrain, transfer
from tersor.train.trainer import train, validate

WAIT = 240  # seconds for drawn data
HELD = 0.6  # of a training's seconds at the full rate, where the number of steps is not fixed
STOP = threading.Event()  # this process was asked to end: a training stops, and what it has learned is measured
MEASURING = 60  # seconds that measuring may take after the training's own


@dataclass(frozen=True)
class Run:
    """One training: where it writes, how long it may take, on what it runs."""

    out: Path
    data: Path  # what `data` drew
    seconds: float
    seed: int
    device: str
    quick: bool
    steps: int = 0  # instead of what a training has or plans
    begun: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.begun)

    def count(self, samples: int) -> int:
        return max(8, samples // SMALL) if self.quick else samples


class OutOfTimeError(Exception):
    """The training's seconds are over."""


class Resident:
    """A data set that lies on the device: a batch is one indexing of each of its tensors."""

    def __init__(self, items: dict[str, Tensor], device: str) -> None:
        self.items = {name: tensor.to(device) for name, tensor in items.items()}

    def __len__(self) -> int:
        return len(next(iter(self.items.values())))

    def __getitem__(self, index: int) -> Batch:
        return {name: tensor[index] for name, tensor in self.items.items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.tensor(indices, device=next(iter(self.items.values())).device)
        return {name: tensor[chosen] for name, tensor in self.items.items()}

    @staticmethod
    def collate(batch: Batch) -> Batch:
        return batch


class Turned(Resident):
    """Pictures (L, 1) of square sides, a batch at a time in one of their eight positions; what they show is the same."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = super().__getitems__(indices)
        turn, mirrored = divmod(mixed_seed(self.epoch, indices[0]) % 8, 2)
        side = math.isqrt(batch["x"].shape[1])
        picture = batch["x"].unflatten(1, (side, side)).rot90(turn, (1, 2))
        picture = picture.flip(2) if mirrored else picture
        return {**batch, "x": picture.flatten(1, 2).contiguous()}


class InContext:
    """New regressions at each step."""

    def __init__(self, kind: str, count: int, seed: int, sizes: dict[str, int]) -> None:
        self.kind, self.count, self.seed, self.sizes, self.epoch = kind, count, seed, sizes, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        seed = mixed_seed(self.seed, self.epoch, indices[0])
        x, target = make_in_context(self.kind, len(indices), seed=seed, **self.sizes)
        return {"x": x, "target": target}

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    collate = staticmethod(Resident.collate)


def learn(
    run: Run,
    model: nn.Module,
    training: Any,
    objective: Objective,
    config: TrainConfig,
    *,
    validation: Any = None,
    steps: int = 0,
) -> int:
    """Train in place; returns the steps taken. steps: their number, with a cosine over them; 0: as many as the seconds left
    allow, HELD of them at the full rate, then a cosine over so many steps as that pace promises."""
    torch.set_float32_matmul_precision("high")
    model.to(run.device).train()
    begun, end = time.perf_counter(), time.perf_counter() + run.left
    config = replace(config, epochs=10**6, seed=run.seed, device=run.device)
    steps = 6 if run.quick and steps else run.steps or steps
    if steps:
        config = replace(config, max_steps=steps, warmup_steps=min(config.warmup_steps, steps // 5))
        return _learn_until(end, run, model, training, objective, config, validation, "training")
    full = replace(config, max_steps=3 if run.quick else 10**6, lr_schedule="constant")
    held = _learn_until(begun + HELD * (end - begun), run, model, training, objective, full, None, "training")
    pace = held / (time.perf_counter() - begun)
    steps = 3 if run.quick else max(10, int(0.9 * pace * (end - time.perf_counter())))
    print(f"{run.out.name}: {held} steps, {pace:.1f} a second, {steps} planned in which the rate falls", flush=True)
    falling = replace(config, max_steps=steps, warmup_steps=min(50, steps // 20), seed=run.seed + 1)
    return held + _learn_until(end, run, model, training, objective, falling, validation, "falling")


def _learn_until(
    end: float,
    run: Run,
    model: nn.Module,
    training: Any,
    objective: Objective,
    config: TrainConfig,
    validation: Any,
    part: str,
) -> int:
    """Train until `end`, or for config.max_steps; returns the steps taken."""
    steps, done = config.max_steps, 0

    def in_time(what: str, at: int, total: int | None) -> None:
        nonlocal done
        done = at
        if time.perf_counter() > end or STOP.is_set():
            raise OutOfTimeError
        if at % (10 * config.log_every) == 0:
            print(f"{run.out.name}: {what}, step {at} of {total}", flush=True)

    every = max(1, steps // 12) if steps < 10**6 else steps
    config = replace(config, validate_every=every, log_every=max(1, min(20, steps // 20)))
    folder = run.out / part
    how: dict[str, Any] = {"objective": objective, "config": config, "validation": validation, "progress": in_time}
    try:
        done = train(model, training, out=folder, **how).steps
    except OutOfTimeError:
        print(f"{run.out.name}, {part}: stopped at step {done} of {steps}", flush=True)
        if validation is not None and (folder / "model.safetensors").exists():
            load_best(model, folder, torch.device(run.device))
    model.eval()
    return done


# -- Game of Life ------------------------------------------------------------------------------------------------------


def life(run: Run) -> dict[str, Any]:
    """Boards of 8 x 8, all densities; measured on boards that were not trained on."""
    model = models.create("lifegpt_8x8")
    ids = make_life(run.count(400_000), rows=8, columns=8, seed=run.seed)
    known = {bytes(row) for row in ids[:, 18 : 18 + 64].byte().numpy()}
    data = Resident({"input_ids": ids}, run.device)
    config = TrainConfig(
        batch_size=256 if not run.quick else 8, lr=1e-3, warmup_steps=300, max_grad_norm=1.0, dtype=_half(run)
    )

    def next_byte(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": lifegpt.training_loss(model, batch["input_ids"], forgetting=0.0)}

    steps = learn(run, model, data, next_byte, config)
    boards = random_boards(run.count(12_000), rows=8, columns=8, seed=run.seed + 1)
    fresh = torch.tensor([bytes((row + 48).byte().numpy()) not in known for row in boards.flatten(1)])
    density = torch.linspace(0, 1, len(boards))
    scores: dict[str, float] = {}
    wrong = cells = exact = 0.0
    for tenth in range(10):
        chosen = boards[fresh & (density >= tenth / 10) & (density <= (tenth + 1) / 10)]
        if not len(chosen):
            continue
        right = torch.tensor([cell_accuracy(model, part.to(run.device)) for part in chosen.split(2000)])
        share = float((right * torch.tensor([len(part) for part in chosen.split(2000)])).sum() / len(chosen))
        scores[f"cells right, density {tenth / 10:.1f} to {(tenth + 1) / 10:.1f}"] = share
        wrong, cells = wrong + (1 - share) * chosen[0].numel() * len(chosen), cells + chosen.numel()
        exact += len(chosen)
    scores = {"cells right": 1 - wrong / cells, "cells": cells, "wrong cells": round(wrong), "boards": exact, **scores}
    return _row(run, model, steps, config, scores)


# -- chains of thought -------------------------------------------------------------------------------------------------


def chains(run: Run, *, chain: bool) -> dict[str, Any]:
    """Arithmetic with six operators: the steps written down, or the answer at once, by one and the same model."""
    ids = _drawn(run, "chains")["chain" if chain else "direct"].long()
    model = models.create("cot_arithmetic", drop=0.0)
    data = Resident({"input_ids": ids[:, :-1], "target": chain_targets("arithmetic", ids, chain=chain)}, run.device)
    config = TrainConfig(
        batch_size=1024 if not run.quick else 8,
        lr=1e-3,
        warmup_steps=300,
        weight_decay=0.01,
        max_grad_norm=1.0,
        dtype=_half(run),
    )

    def next_word(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch["input_ids"]).float()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), batch["target"].flatten(), ignore_index=0)}

    steps = learn(run, model, data, next_word, config)
    known = {_key(row) for row in ids.byte().numpy()}
    test = make_chains("arithmetic", run.count(4000), length=LENGTH, chain=chain, seed=10**6 + run.seed)
    test = test[torch.tensor([_key(row) not in known for row in test.byte().numpy()])]
    right = chain_of_thought.accuracy(model, "arithmetic", test.to(run.device))
    return _row(run, model, steps, config, {"accuracy": right, "unseen questions": len(test)})


def _key(row: np.ndarray) -> bytes:
    return bytes(row).rstrip(b"\0")


# -- regression in context ---------------------------------------------------------------------------------------------

REGRESSIONS = {
    "representation": {"points": 20, "d": 5},
    "autoregressive": {"points": 40, "d": 5, "lags": 3},
    "chain": {"points": 10, "d": 5, "layers": 3},
}
LOOPS, WINDOW, REGRESSION_STEPS = 10, 5, 2500
LEARNERS = {"algoformer": LOOPS, "looped_transformer": LOOPS, "plain_transformer": 1}


def regression(run: Run, *, kind: str, name: str) -> dict[str, Any]:
    """Equally many steps and samples for all three models; the error over that of the answer 0."""
    sizes = REGRESSIONS[kind]
    tokens = sizes["points"] * {"representation": 2, "autoregressive": 1, "chain": 4}[kind]
    outputs = 1 if kind == "representation" else sizes["d"]
    loops = LEARNERS[name]
    config = {"d_in": sizes["d"], "d_out": outputs, "max_len": tokens, "d_model": 128, "heads": 4, "loops": loops}
    model: Any = models.create(name, **config)
    batch = 256 if not run.quick else 8
    data = InContext(kind, 100 * batch, run.seed, sizes)
    settings = TrainConfig(batch_size=batch, lr=5e-4, warmup_steps=400, max_grad_norm=1.0)

    def squares(model: Any, batch: Batch) -> dict[str, Tensor]:
        loss = algoformer.training_loss(model, batch["x"], batch["target"], loops=loops, window=min(WINDOW, loops))
        return {"loss": loss}

    steps = learn(run, model, data, squares, settings, steps=REGRESSION_STEPS)
    x, target = make_in_context(kind, run.count(8000), seed=10**6 + run.seed, **sizes)
    with torch.no_grad():
        found = torch.cat([model(part.to(run.device)).cpu() for part in x.split(1000)])
    asked = ~target.isnan()
    squared = torch.where(asked, (found - target.nan_to_num()).square(), 0.0)
    trivial = torch.where(asked, target.nan_to_num().square(), 0.0)
    late = slice(tokens // 2, None)  # where half of the points were seen
    scores = {
        "error, all": float(squared.sum() / trivial.sum()),
        "error, second half": float(squared[:, late].sum() / trivial[:, late].sum()),
    }
    return _row(run, model, steps, settings, scores)


# -- parity ------------------------------------------------------------------------------------------------------------

SHORT, LONG = 40, 256
COUNTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "slstm": ("flashrnn_slstm", {"vocab_size": 2, "d_model": 64, "num_heads": 1, "n_layer": 1}),
    "lstm": ("flashrnn_lstm", {"vocab_size": 2, "d_model": 64, "num_heads": 1, "n_layer": 1}),
    "transformer": ("cot_arithmetic_alibi", {"vocab": 3, "dmodel": 64, "head": 4, "num_layer": 4, "drop": 0.0}),
    "transformer, sinusoids": ("cot_arithmetic", {"vocab": 3, "dmodel": 64, "head": 4, "num_layer": 4, "drop": 0.0}),
    "mamba": ("mamba-130m", {"d_model": 64, "n_layer": 2, "vocab_size": 2}),
}
PARITY_STEPS = 1500


def parity(run: Run, *, name: str) -> dict[str, Any]:
    """Of the bits so far, asked at every place: trained on 40 bits, measured up to 256."""
    system, options = COUNTERS[name]
    model = models.create(system, **options)
    shift = int(system.startswith("cot"))  # its token 0 is padding

    def drawn(count: int, length: int, seed: int) -> dict[str, Tensor]:
        bits = torch.randint(2, (count, length), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": bits + shift, "target": bits.cumsum(1) % 2}

    def each_place(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(input_ids=batch["input_ids"])[..., :2].float()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), batch["target"].flatten())}

    data = Resident(drawn(run.count(200_000), SHORT, run.seed), run.device)
    config = TrainConfig(batch_size=256 if not run.quick else 8, lr=3e-3, warmup_steps=100, max_grad_norm=1.0)
    steps = learn(run, model, data, each_place, config, steps=PARITY_STEPS)
    test = drawn(run.count(2000), LONG, 10**6 + run.seed)
    with torch.no_grad():
        found = torch.cat(
            [model(part.to(run.device))[..., :2].argmax(-1).cpu() for part in test["input_ids"].split(500)]
        )
    right = (found == test["target"]).double().mean(0)
    scores = {
        f"places 1 to {SHORT}": float(right[:SHORT].mean()),
        f"places {SHORT + 1} to {LONG}": float(right[SHORT:].mean()),
        f"place {LONG}": float(right[-1]),
    }
    return _row(run, model, steps, config, scores)


# -- Long Range Arena --------------------------------------------------------------------------------------------------

_S4 = {"d_model": 128, "n_layers": 6, "norm": "layer", "prenorm": True}
_SPT = {"d_model": 128, "n_layers": 4, "heads": 4, "expand": 4, "pos": False, "rotary": True, "dropout": 0.1}
READERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # system, sizes, settings
    "S4": ("s4", _S4, {"lr": 4e-3, "weight_decay": 0.05}),
    "S4D": ("s4", {**_S4, "mode": "diag", "init": "diag-lin"}, {"lr": 4e-3, "weight_decay": 0.05}),
    "Mamba-2": ("mamba2-130m", {"d_model": 128, "n_layer": 4}, {"lr": 2e-3, "weight_decay": 0.05}),
    "LongVQ": ("longvq", {"d_model": 128, "n_layers": 4, "codes": 64}, {"lr": 2e-3, "weight_decay": 0.05}),
    "transformer": ("spt", _SPT, {"lr": 1e-3, "weight_decay": 0.05}),
    "transformer + SPT": ("spt", _SPT, {"lr": 1e-3, "weight_decay": 0.05}),
}


def listops(run: Run, *, name: str) -> dict[str, Any]:
    """Expressions of 65 to 255 tokens. Self-pretraining takes half of the seconds that all models get."""
    system, sizes, settings = READERS[name]
    few = {"length": LISTOPS_LENGTH, "train": 2, "validation": 1, "test": 1}
    made = prepare("listops", system, None, model=sizes, data=few, pretrain={})
    argument = next(key for key in made.sets.train[0] if key not in ("lengths", "target"))
    drawn = _drawn(run, "listops")
    sets = {part: {argument: each["x"].long(), **_labels(each)} for part, each in drawn.items()}
    batch = 128 if not run.quick else 8
    half = _half(run) if system == "spt" else "float32"
    config = TrainConfig(batch_size=batch, warmup_steps=300, max_grad_norm=1.0, dtype=half, **settings)
    before = 0
    if name.endswith("SPT"):
        before = _pretrain(run, made.model, Resident(sets["train"], "cpu"), replace(config, workers=2), made.holes)
    training, validation, test = (Resident(sets[part], run.device) for part in ("train", "validation", "test"))
    steps = learn(run, made.model, training, answering, config, validation=validation)
    right = validate(made.model, test, answering, batch_size=250)["accuracy"]
    return _row(run, made.model, steps, config, {"accuracy": right, "steps of pretraining": before})


def _pretrain(run: Run, model: nn.Module, labelled: Resident, config: TrainConfig, holes: Any) -> int:
    """Half of the seconds left; its rate is measured as it goes, and the cosine is left out."""
    end, done = time.perf_counter() + run.left / 2, 0

    def in_time(what: str, at: int, total: int | None) -> None:
        nonlocal done
        done = at
        if time.perf_counter() > end or STOP.is_set():
            raise OutOfTimeError
        if at % 200 == 0:
            print(f"{run.out.name}, pretraining: {what}", flush=True)

    steps = 6 if run.quick else 100_000
    config = replace(
        config,
        epochs=10**6,
        max_steps=steps,
        validate_every=100,
        log_every=20 if not run.quick else 1,
        lr_schedule="constant",
        seed=run.seed,
        device=run.device,
        workers=0 if run.quick else config.workers,
    )
    folder = run.out / "pretraining"
    try:
        self_pretrain(model, labelled, out=folder, config=config, task=holes, progress=in_time)
    except OutOfTimeError:
        transfer(load_file(folder / "model.safetensors"), model)
    return done


def pictures(run: Run, *, task: str) -> dict[str, Any]:
    """S4 on 1,024 grey values."""
    if task == "image":
        few = LongRangeConfig(seed=run.seed, train=run.count(18_000), validation=run.count(1000), test=run.count(1000))
        raw = load_long_range("image", _cifar(run.out / "cifar"), few)
        sets = {
            part: stacked(LongRange(each, BENCHMARKS["image"], form="numbers", name="x"))
            for part, each in zip(("train", "validation", "test"), (raw.train, raw.validation, raw.test), strict=True)
        }
    else:
        sets = _drawn(run, "pathfinder")
    sizes: dict[str, Any] = {**_S4, "l_max": 1024, "d_input": 1}
    sizes["n_ssm"] = sizes["d_model"] if task == "pathfinder" else 1
    model = models.create(f"s4_lra_{task}", **sizes, dropout=0.1 if task == "image" else 0.0)
    config = TrainConfig(
        batch_size=100 if not run.quick else 4, lr=4e-3, weight_decay=0.05, warmup_steps=300, max_grad_norm=1.0
    )
    kind = Turned if task == "pathfinder" else Resident
    training = kind({"x": sets["train"]["x"], "target": sets["train"]["target"]}, run.device)
    validation, test = (
        Resident({key: sets[part][key] for key in ("x", "target")}, run.device) for part in ("validation", "test")
    )
    steps = learn(run, model, training, answering, config, validation=validation)
    return _row(run, model, steps, config, {"accuracy": validate(model, test, answering, batch_size=250)["accuracy"]})


def _cifar(folder: Path) -> Path:
    """A folder with the names that the reader looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, file in (("train", "cifar10_train_20000.npz"), ("test", "cifar10_test_1000.npz")):
        link = folder / f"{part}.npz"
        if not link.exists():
            link.symlink_to(DATA / "images" / file)
    return folder


def _labels(each: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each[name] for name in ("lengths", "target")}


def _drawn(run: Run, name: str) -> Any:
    file, until = run.data / f"{name}.pt", time.perf_counter() + WAIT
    while not file.exists():
        if time.perf_counter() > until:
            sys.exit(f"{file} is missing: python benchmarks/sequence_proofs.py data {run.data.parent}")
        time.sleep(1)
    return torch.load(file)


# -- rows, table, pictures ---------------------------------------------------------------------------------------------

PROOFS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "lifegpt": life,
    "cot-chain": lambda run: chains(run, chain=True),
    "cot-direct": lambda run: chains(run, chain=False),
    **{
        f"regression/{kind}/{name}": lambda run, kind=kind, name=name: regression(run, kind=kind, name=name)
        for kind in REGRESSIONS
        for name in LEARNERS
    },
    **{f"parity/{name}": lambda run, name=name: parity(run, name=name) for name in COUNTERS},
    **{f"listops/{name}": lambda run, name=name: listops(run, name=name) for name in READERS},
    "image/S4": lambda run: pictures(run, task="image"),
    "pathfinder/S4": lambda run: pictures(run, task="pathfinder"),
}


def _half(run: Run) -> str:
    return "bfloat16" if run.device == "cuda" else "float32"


def _row(run: Run, model: nn.Module, steps: int, config: TrainConfig, scores: dict[str, float]) -> dict[str, Any]:
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "steps": steps,
        "batch": config.batch_size,
        "lr": config.lr,
        "dtype": config.dtype,
        "scores": scores,
    }


def _folder(name: str, seed: int) -> str:
    return f"{name.replace('/', '-').replace(', ', '-').replace(' ', '')}-{seed}"


def prove(
    name: str, folder: Path, *, seconds: float, seed: int, device: str, quick: bool = False, steps: int = 0
) -> None:
    run = Run(folder / "runs" / _folder(name, seed), folder / "data", seconds, seed, device, quick, steps)
    shutil.rmtree(run.out, ignore_errors=True)
    run.out.mkdir(parents=True)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    row = {"name": name, "seed": seed, **PROOFS[name](run)}
    row |= {"seconds": round(time.perf_counter() - run.begun), "where": gpu() if device == "cuda" else machine()}
    (run.out / "row.json").write_text(json.dumps(row, indent=1))
    print(f"ROW {json.dumps(row)}", flush=True)


def gather(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows, and the curves of all trainings, ended or not."""
    rows = [json.loads(file.read_text()) for file in sorted((folder / "runs").glob("*/row.json"))]
    order = list(PROOFS)
    rows.sort(key=lambda row: (order.index(row["name"]), row["seed"]))
    curves = []
    for out in sorted((folder / "runs").iterdir()):
        before = 0  # steps: a falling rate goes on from the training's last
        for part in ("pretraining", "training", "falling"):
            file = out / part / "log.csv"
            if not file.exists():
                continue
            with file.open(newline="") as lines:
                found = list(csv.DictReader(lines))
            if part == "falling":
                found = [{**line, "step": str(int(line["step"]) + before)} for line in found]
            before = int(found[-1]["step"]) if found else 0
            curves += [{"training": out.name, "part": part, **line} for line in found]
    return rows, curves


def keep(folder: Path, rows: list[dict[str, Any]], curves: list[dict[str, Any]]) -> None:
    """rows.json and curves.csv in `folder`; both can be read while trainings go on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    if curves:
        with (folder / "curves.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(curves[0]))
            writer.writeheader()
            writer.writerows(curves)


# In the order in which they begin, the share of the seconds that each gets.
SHARES: dict[str, float] = {
    "lifegpt": 1.0,
    "cot-chain": 1.0,
    "cot-direct": 1.0,
    **{f"listops/{name}": 0.8 for name in READERS},
    **{f"regression/{kind}/{name}": 0.16 for kind in REGRESSIONS for name in LEARNERS},
    **{f"parity/{name}": 0.12 for name in COUNTERS},
    "image/S4": 0.5,
    "pathfinder/S4": 0.5,
}


def prove_all(
    folder: Path, out: Path, names: Sequence[str], *, seconds: float, seed: int, device: str, quick: bool, at_once: int
) -> None:
    """So many trainings at once, those that `folder` has no row of; rows and curves are gathered as they come. A training that
    would have less than half of its share left is not begun. The processes are forked, so that torch is imported once: this one
    must not touch the GPU."""
    if not all((folder / "data" / f"{name}.pt").exists() for name in DRAWN):
        draw(folder / "data", quick=quick, processes=at_once)
    fork, begun, gathered = get_context("fork"), time.perf_counter(), 0.0
    waiting = [name for name in names if not (folder / "runs" / _folder(name, seed) / "row.json").exists()]
    running: list[Any] = []
    while running or waiting:
        spent = time.perf_counter() - begun
        running = [process for process in running if process.is_alive()]
        if spent > seconds + MEASURING or STOP.is_set():
            break
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            share = min(SHARES[name] * seconds, seconds - spent)
            if share < SHARES[name] * seconds / 2:
                print(f"{name}: not begun, {share:.0f} s are left", flush=True)
                continue
            how = {"seconds": share, "seed": seed, "device": device, "quick": quick}
            running.append(fork.Process(target=prove, args=(name, folder), kwargs=how, name=name))
            running[-1].start()
        if spent - gathered > 20:
            gathered = spent
            keep(out, *gather(folder))
        time.sleep(0.5)
    for process in running:
        process.terminate()
    for process in running:
        process.join(MEASURING)
        process.kill()
    keep(out, *gather(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("all", "data", "train", "gather"))
    parser.add_argument("name", nargs="?", default="", help="with train: which one")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--steps", type=int, default=0, help="with train: their number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--processes", type=int, default=10, help="that draw data, or train")
    parser.add_argument("--only", nargs="*", default=[""], help="with all: trainings whose name begins so")
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--out", type=Path, help="where rows and curves go; FOLDER where left out")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    if asked.what == "all":
        how = {"seconds": asked.seconds, "seed": asked.seed, "device": asked.device, "quick": asked.quick}
        names = [name for name in SHARES if name.startswith(tuple(asked.only))]
        prove_all(asked.folder, asked.out or asked.folder, names, at_once=asked.processes, **how)
    elif asked.what == "data":
        draw(asked.folder / "data", quick=asked.quick, processes=asked.processes)
    elif asked.what == "train":
        if asked.name not in PROOFS:
            sys.exit(f"the trainings are {', '.join(PROOFS)}, not {asked.name!r}")
        prove(
            asked.name,
            asked.folder,
            seconds=asked.seconds,
            seed=asked.seed,
            device=asked.device,
            quick=asked.quick,
            steps=asked.steps,
        )
    else:
        keep(asked.out or asked.folder, *gather(asked.folder))


if __name__ == "__main__":
    main()
