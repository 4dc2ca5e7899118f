"""A forecaster that is ready for tables: a trained model or a yardstick, for any horizon.

    forecaster = open_forecaster("run")                    # of `tersor train`; or ("tempo_80m", checkpoint=...)
    forecaster(x, last, step, horizon)                     # (B, L, N) scaled, stamps (B,) of its last rows -> (B, horizon, N)

A horizon beyond the trained one is rolled: the forecast is fed back in. A model that has its own `forecast` method, which
takes any horizon, is called through that method. Time marks are made of the stamps; models with a decoder also get those of
the horizon.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor import models
from tersor.checkpoint.load import load
from tersor.checkpoint.preprocessing import PREPROCESSOR
from tersor.checkpoint.source import Openable, open_checkpoint
from tersor.data.series_memory import Memory
from tersor.data.time_grid import Step, time_marks
from tersor.devices import pick_device
from tersor.errors import TersorError
from tersor.evaluate.yardstick_names import REPEAT_LAST, RIDGE, SEASONAL_NAIVE
from tersor.evaluate.yardsticks import repeat_last, ridge, seasonal_naive
from tersor.untrusted import read_json_object

AT_ONCE = 1 << 17  # numbers of look-back and horizon in one batch
SEED = 0  # of models that draw at random: the same command gives the same forecast

Run = Callable[[Tensor, np.ndarray, Step, int], Tensor]


@dataclass(frozen=True)
class Forecaster:
    name: str
    look_back: int  # rows that it needs
    trained: int | None  # its horizon; a longer one is rolled. None: any
    run: Run
    memory: Memory = field(default_factory=Memory)
    yardstick: bool = False

    def __call__(self, x: Tensor, last: np.ndarray, step: Step, horizon: int) -> Tensor:
        """x (B, at least look_back, N) scaled, last (B,) -> (B, horizon, N), in batches of bounded size."""
        size = max(1, AT_ONCE // ((x.shape[1] + horizon) * x.shape[2]))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            made = [
                self.run(x[n : n + size, -self.look_back :], last[n : n + size], step, horizon)
                for n in range(0, len(x), size)
            ]
        forecast = torch.cat(made)
        if not bool(torch.isfinite(forecast).all()):
            raise TersorError(f"{self.name} forecasts values that are no numbers (NaN or Inf)")
        return forecast

    def rolls(self, horizon: int) -> bool:
        return self.trained is not None and horizon > self.trained


def open_forecaster(model: Openable, *, checkpoint: Path | None = None, device: str = "auto") -> Forecaster:
    """model: the directory of a trained forecaster, quantized or not; with `checkpoint` an architecture whose official
    weights these are. Raises TersorError where it is no forecaster."""
    name = str(model)
    if checkpoint is not None:
        _check_task(name, models.find(name).task)
        return model_forecaster(models.load(name, checkpoint).to(pick_device(device)), name)
    if not Path(name).expanduser().exists() and models.known(name):
        _check_task(name, models.find(name).task)
        raise TersorError(
            f"{name} is an architecture, which knows nothing yet: `tersor train {name} --data FILE --out RUN` trains it, RUN "
            "is then the model; or --checkpoint names its official weights"
        )
    opened = open_checkpoint(model)
    said = opened.config.get("tersor_model")
    if not isinstance(said, str):
        raise TersorError(f"{name} is no forecaster: `tersor models forecast` lists the architectures that are")
    _check_task(name, models.find(said).task)
    file = opened.directory / PREPROCESSOR
    memory = Memory.from_dict(read_json_object(file), of=str(file)) if file.is_file() else Memory()
    return model_forecaster(load(opened, device=device), Path(name).name or name, memory)


def model_forecaster(module: nn.Module, name: str = "", memory: Memory | None = None) -> Forecaster:
    """A module of tersor's as a forecaster. Without a memory its scale is made of the table."""
    system = getattr(type(module), "system", None)
    if system is None:
        raise TersorError(f"{type(module).__name__} is no model of tersor.models, and so no forecaster")
    _check_task(name or system, models.find(system).task)
    config: Any = module.config
    variates = getattr(config, "enc_in", None)
    for other in ("c_out", "dec_in"):
        if variates is not None and getattr(config, other, None) not in (None, variates):
            raise TersorError(
                f"{name or system} takes {variates} columns and has {other} {getattr(config, other)}; only models that "
                "forecast the columns that they are given are shown here"
            )
    memory = memory or Memory(marks=marks_for(config))
    net = _Net(module.eval(), name or system, memory.marks)
    return Forecaster(name or system, config.seq_len, config.pred_len, net, memory)


def yardsticks(season: int, look_back: int, weights: Tensor | None) -> list[Forecaster]:
    """The yardsticks that can be had: ridge with its weights (look_back, horizon), the seasonal one where there is a season."""
    found = [Forecaster(REPEAT_LAST, 1, None, lambda x, last, step, H: repeat_last(x, H), yardstick=True)]
    if season > 1:

        def seasonal(x: Tensor, last: np.ndarray, step: Step, horizon: int) -> Tensor:
            return seasonal_naive(x, horizon, season)

        found.append(Forecaster(SEASONAL_NAIVE, season, None, seasonal, yardstick=True))
    if weights is not None:
        fitted = weights

        def linear(x: Tensor, last: np.ndarray, step: Step, horizon: int) -> Tensor:
            return ridge(x, fitted)

        found.append(Forecaster(RIDGE, look_back, None, linear, yardstick=True))
    return found


def marks_for(config: Any) -> str:
    """The kind of time marks that a model is made for, by its `embed` and `freq`; hourly ones where it takes any."""
    if not hasattr(config, "embed"):
        return "hours"
    if config.embed != "timeF":
        return "calendar-minutes" if config.freq == "t" else "calendar"
    kinds = {"h": "hours", "t": "minutes", "s": "seconds", "d": "days", "b": "days", "w": "weeks", "m": "months"}
    if config.freq not in kinds:
        raise TersorError(f"no marks are made for freq {config.freq!r}; there are {', '.join(kinds)}")
    return kinds[config.freq]


class _Net:
    """A model's forward, or its own `forecast`, for any horizon."""

    def __init__(self, module: nn.Module, name: str, marks: str) -> None:
        self.module, self.name, self.marks = module, name, marks
        self.config: Any = module.config
        self.takes = inspect.signature(module.forward).parameters
        first = next(module.parameters(), torch.zeros(()))
        self.device = first.device
        self.dtype = first.dtype if first.is_floating_point() else torch.float32

    def __call__(self, x: Tensor, last: np.ndarray, step: Step, horizon: int) -> Tensor:
        self._check_columns(x.shape[2])
        x = x.to(self.device, self.dtype)
        own = getattr(self.module, "forecast", None)
        if own is not None:
            return self._checked(own(x, horizon), horizon, x.shape[2]).float().cpu()
        L, each = self.config.seq_len, self.config.pred_len
        marks = self._marks(last, step, L, -(-horizon // each) * each)
        made: list[Tensor] = []
        for begin in range(0, horizon, each):
            window = torch.cat((x, *made), 1)[:, -L:]
            made.append(self._checked(self._once(window, marks, begin), each, x.shape[2]))
        return torch.cat(made, 1)[:, :horizon].float().cpu()

    def _once(self, window: Tensor, marks: Tensor | None, begin: int) -> Any:
        L, H, known = self.config.seq_len, self.config.pred_len, getattr(self.config, "label_len", 0)
        inputs = {"x_enc": window}
        if marks is not None and "x_mark_enc" in self.takes:
            inputs["x_mark_enc"] = marks[:, begin : begin + L]
        if known and "x_dec" in self.takes:
            inputs["x_dec"] = torch.cat((window[:, L - known :], window.new_zeros(len(window), H, window.shape[2])), 1)
            if marks is not None:
                inputs["x_mark_dec"] = marks[:, begin + L - known : begin + L + H]
        return self.module(**inputs)

    def _marks(self, last: np.ndarray, step: Step, L: int, ahead: int) -> Tensor | None:
        """(B, L + ahead, C) of the rows of look-back and horizon."""
        if self.marks == "none" or not step.dated:
            return None
        times = step.after(last, np.arange(1 - L, ahead + 1))
        return torch.from_numpy(time_marks(times, self.marks)).to(self.device, self.dtype)

    def _check_columns(self, columns: int) -> None:
        wanted = getattr(self.config, "enc_in", columns)
        if wanted != columns:
            raise TersorError(f"{self.name} takes {wanted} columns, the table has {columns}; --target chooses them")

    def _checked(self, said: Any, horizon: int, columns: int) -> Tensor:
        if not isinstance(said, Tensor):
            raise TersorError(
                f"{self.name} gives {len(said)} results, a forecast is one: leave out its loss_func and output_attention"
            )
        if tuple(said.shape[1:]) != (horizon, columns):
            raise TersorError(f"{self.name} gives {list(said.shape[1:])}, a forecast is {[horizon, columns]}")
        return said


def _check_task(name: str, task: str) -> None:
    if task != "forecast":
        raise TersorError(
            f"{name} is a model for the task {task!r}, not to forecast: `tersor models forecast` lists those"
        )
