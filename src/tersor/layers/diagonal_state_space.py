"""Diagonal state space models: H independent channels, n complex states each, every one half of a conjugate pair.

    x_l = A x_{l-1} + B u_l,   y_l = 2 Re(C x_l)             the recurrence, O(n) a step
    y = k * u,                 k_l = 2 Re(sum_n C_n B_n A_n^l)   the convolution with its kernel

A, B [H, n] are the discretised ones, C [channels, H, n]. Continuous a, b with step dt become

    zoh:       A = exp(dt a),                   B = b (A - 1) / a
    bilinear:  A = (1 + dt a/2) / (1 - dt a/2), B = b dt / (1 - dt a/2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.kernels.fft_conv import causal_taps, fft_conv

_OWN_RATE = (
    "inv_dt",
    "log_dt",
    "A_real",
    "log_A_real",
    "inv_A_real",
    "A_imag",
    "B",
    "P",
)  # parameters of the dynamics; C is not


@dataclass(frozen=True)
class DiagonalRecurrence:
    """The model as it is run step by step. State (batch, H, n), complex."""

    A: Tensor  # [H, n]
    B: Tensor  # [H, n]
    C: Tensor  # [channels, H, n]

    def initial_state(self, batch_size: int) -> Tensor:
        return self.B.new_zeros(batch_size, *self.B.shape)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """u (batch, H) -> y (batch, channels, H) and the next state."""
        state = self.A * state + self.B * u[..., None]
        return 2 * torch.einsum("chn,bhn->bch", self.C, state).real, state

    def advance(self, u: Tensor, state: Tensor) -> Tensor:
        """The state after a chunk u (batch, H, L): A^L x + sum_l A^(L-1-l) B u_l."""
        length = u.shape[-1]
        powers = torch.exp(torch.log(self.A)[..., None] * torch.arange(length, device=u.device))  # [H, n, L]
        added = torch.einsum("bhl,hnl->bhn", u.flip(-1).to(powers.dtype), powers) * self.B
        return self.A**length * state + added


def convolve_in_pieces(recurrence: DiagonalRecurrence, u: Tensor, skip: Tensor, piece: int) -> Tensor:
    """k * u + skip u for u (batch, H, L) of any length, with FFTs of pieces only: (batch, H, L). One channel of C; skip [H].

    FlashConv's state passing (arXiv 2212.14052, section 4.2): each piece is convolved by itself, what all pieces add to the
    state is gathered at once, the states go from piece to piece, and each piece hears what the state before it still says.
    """
    batch, length, log_A = len(u), u.shape[-1], torch.log(recurrence.A)
    count = -(-length // piece)
    pieces = rearrange(F.pad(u, (0, count * piece - length)), "b h (p l) -> b p h l", p=count)
    kernel = vandermonde(recurrence.C * recurrence.B, log_A, piece)[0]
    inside = fft_conv(pieces.flatten(0, 1), causal_taps(kernel, skip))

    s = math.isqrt(piece - 1) + 1  # A^l = A^(i s) A^j, as in `vandermonde`
    position = torch.arange(s, device=u.device)
    fine, coarse = (torch.exp(log_A[..., None] * each) for each in (position, position * s))  # [H, n, s]
    latest = F.pad(pieces.flip(-1).to(fine.real.dtype), (0, s * s - piece))
    both = torch.view_as_real(fine.transpose(1, 2).contiguous()).flatten(-2)  # [H, j, 2 n]
    sums = rearrange(latest, "b p h (i j) -> b p h i j", j=s) @ both
    sums = torch.view_as_complex(rearrange(sums, "b p h i (n two) -> b p h i n two", two=2))
    gained = torch.einsum("bphin,hni->bphn", sums, coarse) * recurrence.B

    whole, state, before = recurrence.A**piece, recurrence.initial_state(batch), []
    for each in gained.unbind(1):
        before.append(state)
        state = whole * state + each
    heard = vandermonde(recurrence.C * recurrence.A * torch.stack(before, 1), log_A, piece)  # (batch, P, H, piece)
    y = rearrange(inside, "(b p) h l -> b p h l", p=count) + heard.to(u.dtype)
    return rearrange(y, "b p h l -> b h (p l)")[..., :length]


def discretize(a: Tensor, b: Tensor, dt: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Continuous a, b [..., n] -> A, B of the same shape."""
    if method == "zoh":
        return torch.exp(dt * a), b * torch.expm1(dt * a) / a
    if method == "bilinear":
        inverse = 1 / (1 - dt * a / 2)
        return (1 + dt * a / 2) * inverse, b * dt * inverse
    raise TersorError(f"a recurrence is discretised by 'zoh' or 'bilinear', not {method!r}")


def vandermonde(v: Tensor, log_A: Tensor, length: int) -> Tensor:
    """2 Re(sum_n v_n A_n^l), l = 0..length-1: v [..., H, n], log_A [H, n] -> [..., H, length].

    With l = i s + j and s = sqrt(length), A^l = (A^s)^i A^j: the powers take 2 sqrt(length) numbers a state instead of
    `length`, and the sum is a matrix product.
    """
    s = math.isqrt(max(length - 1, 0)) + 1
    position = torch.arange(s, device=v.device)
    fine = torch.exp(log_A[..., None] * position)  # [H, n, j]
    coarse = torch.exp(log_A[..., None] * (position * s))  # [H, n, i]
    product = (v[..., None] * coarse).transpose(-1, -2) @ fine  # [..., H, i, j]
    return 2 * product.real.flatten(-2)[..., :length]


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, dynamics_lr: float = 0.001
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: dt, A, B and P get no weight decay and a learning rate of their own."""
    dynamics: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        parent, _, last = name.rpartition(".")
        (dynamics if parent.endswith("kernel") and last in _OWN_RATE else others).append(parameter)
    return [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": dynamics, "lr": min(dynamics_lr, lr), "weight_decay": 0.0},
    ]
