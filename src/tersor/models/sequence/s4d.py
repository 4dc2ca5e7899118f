"""S4D, diagonal state space layers, in the minimal form (Gu, Gupta, Goel and Ré, NeurIPS 2022, arXiv 2206.11893).

What it is for: sequences of numbers that are too long for attention (pixels in a row, audio, sensors), with a fraction
of S4's code and nearly its accuracy. It trains as one convolution and runs as a recurrence with a state of fixed size.

    model = tersor.models.load("s4d_cifar", "checkpoint.pt")
    logits = model(x)                                       # x (B, L, d_input) -> (B, d_output)

    layer = S4D(64)                                         # the layer alone: u (B, 64, L) -> (B, 64, L)
    y, state = layer.step(u[..., 0], state, recurrence)     # recurrence = layer.recurrence(): a position at a time

Each of the H = d_model channels has n = d_state/2 complex states, a = -exp(log_A_real) + i A_imag, and a step
dt = exp(log_dt):

    k_l = 2 Re sum_n C_n (exp(dt a_n) - 1)/a_n exp(dt a_n l)        zero-order hold with B = 1
    y = GLU(W GELU(k * u + D u) + b)                                * is the causal convolution along the length

The model is Linear, n_layers times x + dropout(S4D(x)) with a LayerNorm before S4D (prenorm) or after the sum, the
mean over the length, Linear. Initial values are S4D-Lin: a = -1/2 + i pi n.

Origin: state-spaces/s4 at e757cef (models/s4/s4d.py, example.py), Apache-2.0; key names are ours, the 1x1 convolution
is a Linear here. Quirks: the sign of A_imag is + here and - in the full implementation, which is
`tersor.models.sequence.s4.S4Block` with mode="diag" and has the other discretisations and initialisations. Dropout
drops a channel for the whole length. dt and A want a learning rate of at most 0.001 and no weight decay:
`model.parameter_groups(lr=0.01, weight_decay=0.01)`. The published layer returns (y, None), this one y.

Proven: the golden cases of the published code (layer, kernel, model, the CIFAR example at 1024 steps), its parameter
count, recurrence equal to convolution. Not proven: 88-89% on sequential CIFAR-10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.diagonal_state_space import DiagonalRecurrence, discretize, parameter_groups, vandermonde
from tersor.layers.long_convolution import long_convolution, wide
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class S4DConfig:
    d_input: int = 3
    d_output: int = 10
    d_model: int = 256
    n_layers: int = 4
    dropout: float = 0.2
    prenorm: bool = False
    d_state: int = 64  # real numbers of state a channel: half as many complex modes
    dt_min: float = 0.001
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        if self.d_state < 2 or self.d_state % 2:
            raise TersorError(f"s4d keeps one of each conjugate pair, so d_state must be even; it is {self.d_state}")
        if not 0 < self.dt_min <= self.dt_max:
            raise TersorError(f"s4d needs 0 < dt_min <= dt_max; they are {self.dt_min} and {self.dt_max}")


class S4DKernel(nn.Module):
    """length -> kernel (H, length)."""

    def __init__(self, d_model: int, d_state: int = 64, dt_min: float = 0.001, dt_max: float = 0.1) -> None:
        super().__init__()
        n = d_state // 2
        self.C = nn.Parameter(torch.randn(d_model, n, 2) * 0.5**0.5)  # complex normal as (re, im)
        self.log_dt = nn.Parameter(torch.rand(d_model) * math.log(dt_max / dt_min) + math.log(dt_min))
        self.log_A_real = nn.Parameter(torch.full((d_model, n), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(n).repeat(d_model, 1))

    def forward(self, length: int) -> Tensor:
        a, dt = self._dynamics()
        recurrence = self.recurrence()
        return vandermonde(recurrence.C[0] * recurrence.B, dt * a, length)

    def recurrence(self) -> DiagonalRecurrence:
        a, dt = self._dynamics()
        A, B = discretize(a, torch.ones_like(a), dt, "zoh")
        return DiagonalRecurrence(A, B, torch.view_as_complex(wide(self.C))[None])

    def _dynamics(self) -> tuple[Tensor, Tensor]:
        """Complex a (H, n) and dt (H, 1); in float32 at least, whatever the weights are stored in."""
        return torch.complex(-wide(self.log_A_real).exp(), wide(self.A_imag)), wide(self.log_dt).exp()[:, None]


class S4D(nn.Module):
    """u (B, H, L) -> (B, H, L); with transposed=False both are (B, L, H)."""

    def __init__(
        self, d_model: int, d_state: int = 64, dropout: float = 0.0, *, transposed: bool = True, **kernel_args: float
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.D = nn.Parameter(torch.randn(d_model))
        self.kernel = S4DKernel(d_model, d_state, **kernel_args)
        self.dropout = nn.Dropout1d(dropout)
        self.output_linear = nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.GLU())

    def forward(self, u: Tensor) -> Tensor:
        u = u if self.transposed else u.transpose(1, 2)
        y = long_convolution(u, self.kernel(u.shape[-1])) + self.D[:, None] * u
        y = self.output_linear(self.dropout(F.gelu(y)).transpose(1, 2))  # (B, L, H)
        return y.transpose(1, 2) if self.transposed else y

    def recurrence(self) -> DiagonalRecurrence:
        """What `step` needs of the parameters, discretised once."""
        return self.kernel.recurrence()

    def step(self, u: Tensor, state: Tensor, recurrence: DiagonalRecurrence) -> tuple[Tensor, Tensor]:
        """One position u (B, H) and the state before it (at first `recurrence.initial_state(B)`) -> y (B, H), state."""
        y, state = recurrence.step(u, state)
        return self.output_linear(F.gelu(y[:, 0] + self.D * u)), state

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The published 1x1 convolution's weight (2H, H, 1) is a matrix here."""
        return {k: v[..., 0] if k.endswith("output_linear.0.weight") and v.dim() == 3 else v for k, v in state.items()}


@register(
    "s4d",
    task="classify",
    input="sequence",
    paper="arXiv 2206.11893",
    variants={
        "s4d_cifar": (201_482, {"d_model": 128, "dropout": 0.1}),
        "s4d_mnist": (664_586, {"d_input": 1, "dropout": 0.1}),
    },
    small={"d_model": 8, "n_layers": 2, "d_state": 8},
)
class S4DModel(nn.Module):
    """x (B, L, d_input) -> logits (B, d_output)."""

    def __init__(self, config: S4DConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.encoder = nn.Linear(config.d_input, d)
        self.s4_layers = nn.ModuleList(
            S4D(d, config.d_state, config.dropout, dt_min=config.dt_min, dt_max=config.dt_max)
            for _ in range(config.n_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(config.n_layers))
        self.dropout = nn.Dropout1d(config.dropout)
        self.decoder = nn.Linear(d, config.d_output)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)  # (B, L, d)
        for layer, norm in zip(self.s4_layers, self.norms, strict=True):
            z = norm(x) if self.config.prenorm else x
            x = x + self.dropout(layer(z.transpose(1, 2))).transpose(1, 2)
            x = x if self.config.prenorm else norm(x)
        return self.decoder(x.mean(1))

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"x": torch.randn(batch_size, 64, self.config.d_input)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.s4_layers[0].convert_checkpoint(state)  # type: ignore[operator]

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimizer, as published: dt and A learn at 0.001 at most, without weight decay."""
        return parameter_groups(self, lr=lr, weight_decay=weight_decay)
