"""Parts of forecasters: instance normalization that is undone at the end, trend plus remainder, and embeddings.

norm = InstanceScale.of(x); z = norm.apply(x); forecast = norm.undo(model(z))       x (B, L, N)
seasonal, trend = decompose(x, kernel=25)
tokens = TokenEmbedding(N, D, bias=True)(x) + TimeEmbedding(D, embed="timeF", freq="h", bias=True)(marks)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.layers.positions import sinusoids


@dataclass(frozen=True)
class InstanceScale:
    """Mean and standard deviation over time, per sample and variate: (B, 1, N) each."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, x: Tensor, *, eps: float = 1e-5, through_std: bool = True) -> InstanceScale:
        """The scale of x (B, L, N). No gradient passes through the mean, and none through the std unless `through_std`."""
        mean = x.mean(1, keepdim=True).detach()
        std = (x.var(1, keepdim=True, correction=0) + eps).sqrt()
        return cls(mean, std if through_std else std.detach())

    def apply(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def undo(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


def decompose(x: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """(x - trend, trend) of x (B, L, N): the trend is a moving average of odd width `kernel` whose ends repeat the first
    and the last value (Autoformer, arXiv 2106.13008, eq. 1)."""
    half = (kernel - 1) // 2
    padded = torch.cat((x[:, :1].expand(-1, half, -1), x, x[:, -1:].expand(-1, half, -1)), 1)
    trend = F.avg_pool1d(padded.transpose(1, 2), kernel, stride=1).transpose(1, 2)
    return x - trend, trend


class TokenEmbedding(nn.Module):
    """x (B, L, N) -> (B, L, D): a convolution of width 3 whose ends meet, so that each step sees its two neighbours."""

    def __init__(self, variates: int, d_model: int, *, bias: bool) -> None:
        super().__init__()
        self.tokenConv = CircularConv(variates, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tokenConv(x)
        return y


class CircularConv(nn.Conv1d):
    """x (B, L, N) -> (B, L, D): a convolution of width 3 over time; before the first step comes the last."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, 3, padding=1, padding_mode="circular", bias=bias)
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


MARKS = {"h": 4, "t": 5, "s": 6, "m": 1, "a": 1, "w": 2, "d": 3, "b": 3}  # frequency of a series -> marks of a row
CALENDAR = {"month": 13, "day": 32, "weekday": 7, "hour": 24, "minute": 4}  # in the order of the marks' columns
EMBEDDINGS = ("timeF", "fixed", "learned")


class TimeEmbedding(nn.Module):
    """marks (B, L, C) -> (B, L, D).

    "timeF": C numbers in [-0.5, 0.5] through a linear map; MARKS[freq] says how many. "fixed" and "learned": whole
    numbers (month, day, weekday, hour, and where freq is "t" quarter of the hour), each looked up in a table; the sum.
    """

    def __init__(self, d_model: int, *, embed: str, freq: str, bias: bool) -> None:
        super().__init__()
        self.columns: list[str] = []
        if embed == "timeF":
            self.embed = nn.Linear(MARKS[freq], d_model, bias=bias)
            return
        self.columns = [name for name in CALENDAR if name != "minute" or freq == "t"]
        for name in self.columns:
            table = nn.Embedding(CALENDAR[name], d_model)
            if embed == "fixed":  # published inside a module of its own: one more level in the key
                table.weight = nn.Parameter(sinusoids(CALENDAR[name], d_model), requires_grad=False)
            self.add_module(f"{name}_embed", nn.ModuleDict({"emb": table}) if embed == "fixed" else table)

    def forward(self, marks: Tensor) -> Tensor:
        if not self.columns:
            time: Tensor = self.embed(marks)
            return time
        return torch.stack([self._table(name)(marks[..., n].long()) for n, name in enumerate(self.columns)]).sum(0)

    def _table(self, name: str) -> nn.Module:
        table = self.get_submodule(f"{name}_embed")
        return table["emb"] if isinstance(table, nn.ModuleDict) else table


def example_marks(rows: tuple[int, int], *, embed: str, freq: str) -> Tensor:
    """Random marks (B, L, C) for a TimeEmbedding. rows: (B, L)."""
    if embed == "timeF":
        return torch.rand(*rows, MARKS[freq]) - 0.5
    columns = [n for name, n in CALENDAR.items() if name != "minute" or freq == "t"]
    return torch.stack([torch.randint(n, rows) for n in columns], -1).float()
