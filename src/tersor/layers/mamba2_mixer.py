"""The Mamba-2 token mixer, with the parameter names of the published checkpoints.

    z0, x0, z, xBC, dt = split(W_in u)          u [b, l, d_model]; z0, x0 only where d_ssm < d_inner
    x, B, C = split(SiLU(conv(xBC)))            x: heads of headdim channels; B, C: ngroups of d_state
    y = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C) + D x
    output = W_out [SiLU(z0) x0, norm(y SiLU(z))]

The norm is an RMSNorm over d_ssm / ngroups channels at a time.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.kernels.ssd import NO_LIMIT, Limits, ssd
from tersor.layers.causal_conv import CausalConv1d

State = tuple[Tensor, ...]  # the convolution's last inputs [b, channels, d_conv - 1] and the SSM's matrix [b, h, p, n]


class Mamba2Mixer(nn.Module):
    def __init__(
        self,
        d_model: int,
        *,
        d_inner: int,
        d_state: int,
        headdim: int,
        ngroups: int,
        d_ssm: int | None = None,
        d_conv: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_limit: Limits = NO_LIMIT,
        eps: float = 1e-5,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
    ) -> None:
        super().__init__()
        d_ssm = d_inner if d_ssm is None else d_ssm
        heads = d_ssm // headdim
        if d_ssm % headdim or heads % ngroups or d_ssm > d_inner:
            raise TersorError(
                f"Mamba-2 needs d_ssm ({d_ssm}) to be at most d_inner ({d_inner}), a multiple of headdim ({headdim}), "
                f"and their quotient a multiple of ngroups ({ngroups})"
            )
        self.headdim, self.ngroups, self.dt_limit = headdim, ngroups, dt_limit
        d_bypass, d_groups = d_inner - d_ssm, ngroups * d_state
        self.widths = [d_bypass, d_bypass, d_ssm, d_ssm + 2 * d_groups, heads]
        self.conv_widths = [d_ssm, d_groups, d_groups]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=bias)
        self.conv1d = CausalConv1d(sum(self.conv_widths), d_conv, bias=conv_bias)
        self.dt_bias = nn.Parameter(initial_dt_bias(heads, dt_min=dt_min, dt_max=dt_max, floor=dt_init_floor))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(d_ssm if D_has_hdim else heads))
        self.norm: GatedRMSNorm | None = None
        if rmsnorm:
            self.norm = GatedRMSNorm(d_ssm, groups=ngroups, norm_before_gate=norm_before_gate, eps=eps)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    def forward(self, u: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        conv_state, ssm_state = (None, None) if state is None else state
        z0, x0, z, xBC, dt = torch.split(self.in_proj(u), self.widths, -1)
        xBC, conv_state = self.conv1d(xBC, conv_state, mask)
        x, B, C = torch.split(F.silu(xBC), self.conv_widths, -1)
        x, gate = (rearrange(each, "b l (h p) -> b l h p", p=self.headdim) for each in (x, z))
        B, C = (rearrange(each, "b l (g n) -> b l g n", g=self.ngroups) for each in (B, C))
        y, ssm_state = ssd(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            D=self.D if self.D.numel() == x.shape[2] else rearrange(self.D, "(h p) -> h p", p=self.headdim),
            z=gate if self.norm is None else None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            mask=mask,
            initial_state=ssm_state,
        )
        y = rearrange(y, "b l h p -> b l (h p)")
        if self.norm is not None:
            y = self.norm(y, z)
        return self.out_proj(torch.cat((F.silu(z0) * x0, y), -1)), (conv_state, ssm_state)


class GatedRMSNorm(nn.Module):
    """norm(y SiLU(z)) weight, or norm(y) weight SiLU(z) where `norm_before_gate`; statistics per group."""

    def __init__(self, channels: int, *, groups: int, norm_before_gate: bool, eps: float) -> None:
        super().__init__()
        self.groups, self.norm_before_gate, self.eps = groups, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gate, wide = F.silu(z.float()), y.float()
        grouped = rearrange(wide if self.norm_before_gate else wide * gate, "... (g c) -> ... g c", g=self.groups)
        normed = F.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2) * self.weight.float()
        return (normed * gate if self.norm_before_gate else normed).to(y.dtype)


def initial_dt_bias(channels: int, *, dt_min: float, dt_max: float, floor: float) -> Tensor:
    """The inverse of softplus at time steps that are log-uniform in [dt_min, dt_max]."""
    dt = torch.empty(channels).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
