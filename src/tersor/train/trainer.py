"""One plain trainer: AdamW, warm-up, mixed precision, clipping, EMA, accumulation, resume, several devices.

    train(model, windows, objective=forecasting, out="run", validation=more, config=TrainConfig(lr=1e-3))

    torchrun --nproc-per-node 4 -m tersor train MODEL --data DATA ...        # the same on four devices

One step is one batch of `batch_size` samples, however many devices and accumulated parts share it: the number of
devices changes the speed and the last bits, not the training. `out` holds

    model.safetensors, config.json   weights (the EMA's, if any) of the best validation, for models.load
    last.pt                          everything that is needed to go on
    log.csv                          loss, gradient norm, rate and validation by step; with `tensorboard` also in tensorboard/

Every file is replaced at once or not at all. A killed run goes on from last.pt when it is started again, and on a CPU
ends in the very same bits, since the weights and the optimizer are all that it needs of the past: the order of the
data follows from (seed, epoch), and torch's random numbers from (seed, step, rank), set anew at each step. A data set
that plays dice must do so as a function of (epoch, index); its set_epoch(epoch) is called where it has one.

Plain torch, not Lightning Fabric or accelerate: what they would save is a DDP wrapper, an autocast and a loss scaler,
some thirty lines here, and they would stand between the reader and the two things that need care, the random state and
the order of the data.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from tersor import processes
from tersor.data.seeding import mixed_seed
from tersor.devices import pick_device
from tersor.errors import TersorError
from tersor.progress import Progress
from tersor.train.checkpoint import load_best, load_run, save_model, save_run
from tersor.train.config import DTYPES, TrainConfig, learning_rate
from tersor.train.log import RunLog, writer_class
from tersor.train.objectives import Batch, Objective

FREE_TO_CHANGE = ("save_every", "log_every", "tensorboard", "workers", "device")  # of a run that is resumed


@dataclass
class _Run:
    """How far a run is, beside weights and optimizer."""

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    since_best: int = 0  # validations
    validation: dict[str, float] = field(default_factory=dict)  # of the best


@dataclass(frozen=True)
class Trained:
    steps: int
    best_step: int  # of the weights that were kept
    validation: dict[str, float]  # what they score; empty without validation data
    # Of training, the mean over the last `loss_steps`; None where nothing was left to do.
    loss: float | None = field(default=None, compare=False)
    loss_steps: int = field(default=0, compare=False)


def train(
    model: nn.Module,
    training: Any,
    *,
    objective: Objective,
    out: str | Path,
    config: TrainConfig | None = None,
    validation: Any = None,
    preprocessing: Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
    progress: Progress | None = None,
) -> Trained:
    """Train `model` in place, or go on where a run in `out` was interrupted; it ends with the best weights.

    training, validation: map-style data sets (len and [index]) whose items are dictionaries of tensors, see objectives.
    preprocessing, labels: what is written beside the weights, so that the model can be used on new inputs: how they are
    prepared (preprocessor_config.json), and the classes' names (`id2label` in config.json).
    """
    config, out = config or TrainConfig(), Path(out)
    rank, world, device = _place(config.device)
    share, rest = divmod(config.batch_size, world * config.accumulate)
    if share == 0 or rest:
        raise TersorError(f"a batch of {config.batch_size} cannot be shared by {world} x {config.accumulate} parts")
    if config.patience and validation is None:
        raise TersorError(f"patience {config.patience} needs validation data")
    if config.tensorboard:
        writer_class()  # where it is missing, nothing is written
    steps_per_epoch = len(training) // config.batch_size  # a last, smaller batch is left out
    if steps_per_epoch == 0:
        raise TersorError(f"the training data have {len(training)} samples, less than one batch of {config.batch_size}")
    steps = config.epochs * steps_per_epoch
    steps = min(steps, config.max_steps or steps)
    validate_every = config.validate_every or steps_per_epoch

    model.to(device)
    averaged = copy.deepcopy(model).requires_grad_(False) if config.ema else None
    kept = averaged if averaged is not None else model
    optimizer = optimizer_for(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler} | ({"averaged": averaged} if averaged else {})
    settings = _settings(model, training, config)
    run = _Run(**load_run(out, parts, settings, device))
    if rank == 0 and run.step == 0:
        save_run(out, dataclasses.asdict(run), parts, settings)
    stopped = bool(config.patience) and run.since_best >= config.patience

    autocast = _autocast(config.dtype, device)
    net: nn.Module = model
    own_loss = getattr(model, "auxiliary_loss", None)  # what the model asks of itself, after each forward
    if world > 1:
        net = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    log = RunLog(out, step=run.step, tensorboard=config.tensorboard) if rank == 0 else None
    batches: Iterator[Batch] = iter(())
    losses, started = torch.zeros(2, device=device), time.perf_counter()  # the sum of losses, their number

    first = logged = run.step
    recent: list[tuple[int, float, float]] = []  # between lines of the log: steps, sum of losses, their number
    shown = ""
    for step in range(first, steps if not stopped else 0):
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0 or step == first:
            batches = _batches(training, config, epoch, position, rank, world)
        torch.manual_seed(mixed_seed(config.seed, step, rank))
        lr = learning_rate(step, steps, steps_per_epoch, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        net.train()
        for part in range(config.accumulate):
            batch = _to(next(batches), device)
            last_part = part == config.accumulate - 1
            hold: AbstractContextManager[None] = nullcontext()
            if isinstance(net, DistributedDataParallel) and not last_part:
                hold = net.no_sync()
            with hold:
                with autocast():
                    loss = objective(net, batch)["loss"]
                    if own_loss is not None:
                        loss = loss + own_loss()
                scaler.scale(loss / config.accumulate).backward()  # type: ignore[no-untyped-call]
            losses += torch.stack((loss.detach().float(), torch.ones_like(losses[1])))
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if averaged is not None:
            _average(averaged, model, min(config.ema, (1 + step) / (10 + step)))  # short memory at first

        done = step + 1
        validated = done % validate_every == 0 or done == steps
        saved = validated or (config.save_every and done % config.save_every == 0)
        values: dict[str, float] = {}
        if saved or done % config.log_every == 0:
            total, number = _sum(losses).tolist()
            losses.zero_()
            if not math.isfinite(total):
                raise TersorError(
                    f"the loss is {total} at step {done}; a lower lr, a warm-up or max_grad_norm may help"
                )
            values = {"loss": total / number, "grad_norm": float(grad_norm)}
            recent.append((done - logged, total, number))
            logged = done
            while sum(each[0] for each in recent[1:]) >= config.log_every:  # the mean of so many is shown, at least
                recent.pop(0)
            shown = f", loss {_mean(recent):.4g}"
        if progress is not None and rank == 0:
            progress(f"epoch {epoch + 1}{shown}", done, steps)
        if validated:
            scores: dict[str, float] = {}
            if validation is not None:
                how: dict[str, Any] = {"dtype": config.dtype, "workers": config.workers}
                scores = validate(kept, validation, objective, batch_size=share, **how)
                values["validation"] = scores["loss"]
            run.since_best += 1
            if not scores or scores["loss"] < run.best:
                run.best, run.best_step, run.since_best, run.validation = scores.get("loss", math.inf), done, 0, scores
                if rank == 0:
                    save_model(kept, out, preprocessing or {}, labels)
            stopped = bool(config.patience) and run.since_best >= config.patience
        if log is not None and values:
            log.write(done, epoch=epoch + 1, lr=lr, seconds=time.perf_counter() - started, **values)
        run.step = done
        if rank == 0 and saved:
            save_run(out, dataclasses.asdict(run), parts, settings)
        if stopped:
            break

    if log is not None:
        log.close()
    _wait()  # for rank 0's files
    load_best(model, out, device)
    loss_now = _mean(recent) if recent else None
    return Trained(run.step, run.best_step, run.validation, loss_now, sum(each[0] for each in recent))


def _mean(recent: Sequence[tuple[int, float, float]]) -> float:
    return sum(total for _, total, _ in recent) / sum(number for *_, number in recent)


@torch.no_grad()
def validate(
    model: nn.Module,
    data: Any,
    objective: Objective,
    *,
    batch_size: int = 32,
    dtype: str = "float32",
    workers: int = 0,
) -> dict[str, float]:
    """The mean over all samples of everything that the objective reports, in eval mode; devices share the samples."""
    rank, world = processes.rank(), processes.processes()
    if len(data) < world:
        raise TersorError(f"{len(data)} samples are too few to validate on with {world} devices")
    device = next(model.parameters()).device
    mine = torch.utils.data.Subset(data, range(rank, len(data), world))
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    batch_size = getattr(data, "validated_at_once", batch_size)
    loader = DataLoader(mine, batch_size, num_workers=workers, collate_fn=getattr(data, "collate", None))
    for number, batch in enumerate(loader):
        size = min(batch_size, len(mine) - number * batch_size)
        with _autocast(dtype, device)():
            scores = objective(model, _to(batch, device))
        for name, score in scores.items():
            sums[name] = sums.get(name, torch.zeros((), device=device, dtype=torch.float64)) + score.double() * size
    model.train(was_training)
    return {name: _sum(total).item() / len(data) for name, total in sums.items()}


def optimizer_for(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW. A model with `parameter_groups` says itself which of its parameters learn at which rate. In others, matrices
    decay and vectors do not."""
    if hasattr(model, "parameter_groups"):
        own: Any = model.parameter_groups
        groups = own(lr=config.lr, weight_decay=config.weight_decay)
    else:
        weights = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
        others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
        groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    for group in groups:
        group["share"] = group.get("lr", config.lr) / config.lr if config.lr else 1.0  # of the schedule's rate
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def _batches(data: Any, config: TrainConfig, epoch: int, position: int, rank: int, world: int) -> Iterator[Batch]:
    """This rank's parts of the epoch's batches, from batch `position` on."""
    if hasattr(data, "set_epoch"):
        data.set_epoch(epoch)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(mixed_seed(config.seed, epoch)))
    usable = len(data) // config.batch_size * config.batch_size
    share = config.batch_size // (world * config.accumulate)
    parts = order[position * config.batch_size : usable].reshape(-1, world, share)[:, rank].tolist()
    collate = getattr(data, "collate", None)
    loader: DataLoader[Batch] = DataLoader(data, batch_sampler=parts, num_workers=config.workers, collate_fn=collate)
    return iter(loader)


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for kept, buffer in zip(averaged.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)


def _settings(model: nn.Module, training: Any, config: TrainConfig) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    fixed = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_TO_CHANGE}
    described = str(getattr(model, "config", type(model).__name__))
    return {**fixed, "model": described, "training samples": len(training)}


def _place(wanted: str) -> tuple[int, int, torch.device]:
    """(rank, number of processes, this process's device). Under torchrun, the group is made here."""
    device = pick_device(wanted)
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = processes.rank(), processes.processes()
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # torchrun's own way to say it
        torch.cuda.set_device(device)
    return rank, world, device


def _autocast(dtype: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _sum(value: Tensor) -> Tensor:
    if processes.processes() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def _wait() -> None:
    if processes.processes() > 1:
        dist.barrier()
