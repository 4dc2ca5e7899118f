"""The settings of a training run, from which the options of `tersor train` are made, and the schedule of its rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from tersor.errors import TersorError
from tersor.untrusted import check_at_once, check_seed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULES = ("cosine", "constant", "halving")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    epochs: int = _option(10, "Passes over the training data.")
    max_steps: int = _option(0, "Stop after so many steps; 0: after the epochs.")
    batch_size: int = _option(32, "Samples a step, over all devices and accumulated parts.")
    accumulate: int = _option(1, "Parts in which a device takes its share of a batch, one after another.")
    lr: float = _option(1e-4, "Learning rate after the warm-up.")
    min_lr: float = _option(0.0, "Where the cosine ends.")
    lr_schedule: str = _option("cosine", "cosine, constant, or halving: by half each epoch after the second.")
    warmup_steps: int = _option(0, "Steps in which the rate rises from 0.")
    weight_decay: float = _option(0.0, "AdamW's, for weights of two and more dimensions.")
    beta1: float = _option(0.9, "AdamW's mean of gradients.")
    beta2: float = _option(0.999, "AdamW's mean of squared gradients.")
    max_grad_norm: float = _option(0.0, "Largest norm of the gradient; 0: any.")
    ema: float = _option(
        0.0, "Decay of a moving average of the weights, which is then what is validated and kept; 0: none."
    )
    dtype: str = _option("float32", "float32, bfloat16 or float16 (autocast).")
    validate_every: int = _option(0, "Steps from validation to validation; 0: an epoch.")
    patience: int = _option(0, "Stop after so many validations in a row without a new best; 0: never.")
    save_every: int = _option(0, "Steps from one last.pt to the next; 0: at each validation.")
    log_every: int = _option(10, "Steps from one line of log.csv to the next.")
    tensorboard: bool = _option(False, "Write the course also for TensorBoard, into tensorboard/ of the run.")
    seed: int = _option(0, "Of the order of the data and of dropout.")
    workers: int = _option(0, "Processes that load data, for each device.")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, ...")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every", "lr"):
            if getattr(self, name) <= 0:
                raise TersorError(f"{name} is {getattr(self, name)}, it must be positive")
        for name in (
            "max_steps",
            "min_lr",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "patience",
            "seed",
            "workers",
        ):
            if getattr(self, name) < 0:
                raise TersorError(f"{name} is {getattr(self, name)}, it must not be negative")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise TersorError(f"{name} is {getattr(self, name)}, it must be at least 0 and below 1")
        check_seed(self.seed)
        check_at_once("workers", self.workers)
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, int) and not -(2**63) <= value < 2**63 and each.name != "seed":
                raise TersorError(f"{each.name} is {value}, which is no number to count with")
        if self.lr_schedule not in SCHEDULES:
            raise TersorError(f"lr_schedule is one of {', '.join(SCHEDULES)}, not {self.lr_schedule!r}")
        if self.dtype not in DTYPES:
            raise TersorError(f"dtype is one of {', '.join(DTYPES)}, not {self.dtype!r}")


def learning_rate(step: int, steps: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The rate of the step (from 0). "halving" is the forecasting papers' type1: full for two epochs, then by half."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    if config.lr_schedule == "halving":
        return float(config.lr * 0.5 ** max(0, step // steps_per_epoch - 1))
    way = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * way)) / 2
