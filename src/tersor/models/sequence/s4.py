"""S4, structured state space layers (Gu, Goel and Ré, ICLR 2022, arXiv 2111.00396), and its Long Range Arena models.

What it is for: very long sequences (bytes, pixels, audio): one long convolution in training, a recurrence with a state
of fixed size in generation. `mode="diag"` makes every layer a full S4D (arXiv 2206.11893) instead.

    model = tersor.models.load("s4_lra_image", "checkpoint.ckpt")
    logits = model(x)                                       # tokens (B, L), or numbers (B, L, d_input) without `vocab`

    block = S4Block(S4BlockConfig(d_model=64))              # the layer alone: (B, 64, L) -> (B, 64, L)
    recurrence = block.recurrence()
    y, state = block.step(x[..., 0], state, recurrence)     # a position at a time; block.chunk(x, state): many at once

Each of the H = d_model channels is x' = A x + B u, y = C x + D u with N = d_state states, A = diag(a) - P P^*, all in
conjugate pairs of which n = N/2 are stored; a = -f(A_real) - i g(A_imag). Bilinear discretisation with the step dt:

    A_d = (I - dt/2 A)^-1 (I + dt/2 A),   B_d = (I - dt/2 A)^-1 dt B,   kernel k_l = C A_d^l B_d

The kernel of length L comes from its values at the L-th roots of unity w, with C~ = C (I - A_d^L) and Woodbury's
identity over Cauchy sums S_vu = dt sum_n v_n u_n / (2 (1 - w) - (1 + w) dt a_n), conjugates included:

    k^(w) = 2 (S_CB - (1 + w) S_CP (1 + (1 + w) S_QP)^-1 S_QB),   Q = conj(P);   k = irfft(k^)

which is the published formula without its division by 1 + w, that vanishes at w = -1.
Block: y = GLU(W GELU(k * u + D u) + b). Model: encoder, n_layers residual blocks, mean over the length, Linear.

Origin: state-spaces/s4 at e757cef (v4: models/s4/s4.py, src/models/sequence), Apache-2.0; key names are ours. Quirks:
* The parameter C is C~ of the length in the buffer l_kernel. A checkpoint with l_kernel = 0, or without it, holds the
  true C, which is turned into C~ of length l_max on loading (published: at the first forward). When a longer kernel is
  asked for, C~ and l_kernel are doubled in place until it is long enough.
* A, B, P of n_ssm copies serve the channels cyclically: row t the channels t, t + n_ssm, ...
* The backward kernel of a bidirectional layer starts one position later than the forward one.
* disc="dss" takes the real part of the sum without the factor 2, and has no recurrence.
* dt, A, B, P learn at 0.001 at most without weight decay: `model.parameter_groups(lr=0.01, weight_decay=0.05)`.
The published options `gate` and `bottleneck` do not work there and are absent here.

Proven: the golden cases of the published code (both modes, all discretisations, rates, recurrences, two LRA models at
their sizes), the two parameter counts that were published, recurrence and state passing equal to the convolution.
Not proven: the LRA accuracies; the retrieval head's key names, and its vocabulary's and Text's size (257, bytes).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.diagonal_state_space import DiagonalRecurrence, discretize, parameter_groups, vandermonde
from tersor.layers.hippo import initial_state_space
from tersor.layers.long_convolution import long_convolution, wide
from tersor.models.registry import register

_MODES = {"nplr": "nplr", "dplr": "nplr", "diag": "diag", "s4d": "diag"}
_DISCRETISATIONS = ("zoh", "bilinear", "dss")
_SMALLEST = 1e-4  # of the initial -Re A and -Im A

# name: (parameter -> value, its inverse)
_TRANSFORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (lambda x: x, lambda y: y),
    "exp": (torch.exp, torch.log),
    "relu": (lambda x: F.relu(x) + 1e-4, lambda y: y),
    "sigmoid": (torch.sigmoid, torch.logit),
    "softplus": (F.softplus, lambda y: y + torch.log(-torch.expm1(-y))),
}

_ACTIVATIONS: dict[str | None, Callable[[], nn.Module]] = {
    **dict.fromkeys((None, "id", "identity", "linear"), nn.Identity),
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "glu": nn.GLU,  # halves the last axis
}


@dataclass(frozen=True, kw_only=True)
class S4BlockConfig:
    d_model: int = 256
    d_state: int = 64  # N
    l_max: int | None = None  # the kernel is never longer; None: as long as the input
    channels: int = 1  # kernels per input channel
    bidirectional: bool = False
    activation: str | None = "gelu"
    mult_act: str | None = None  # one more, between the convolution's and the output's
    final_act: str | None = "glu"  # None: no output linear either
    dropout: float = 0.0
    tie_dropout: bool = False  # one mask for the whole length
    drop_kernel: float = 0.0
    transposed: bool = True  # (B, H, L) in and out; False: (B, L, H)
    # the kernel
    mode: str = "nplr"  # "diag": S4D
    init: str = "legs"  # see tersor.layers.hippo.initial_state_space
    B_init: str = "constant"
    rank: int = 1
    n_ssm: int | None = None  # copies of A, B, P; None: one for each channel
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_tie: bool = True  # one dt a channel; False: one a state
    dt_transform: str = "exp"
    real_transform: str = "exp"
    imag_transform: str = "none"
    bandlimit: float | None = None  # states faster than this fraction of the sampling rate are left out
    # mode "diag" only
    disc: str = "zoh"
    is_real: bool = False  # d_state real states instead of d_state/2 complex ones

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, _MODES)
        _one_of("disc", self.disc, _DISCRETISATIONS)
        for name in ("dt_transform", "real_transform", "imag_transform"):
            _one_of(name, getattr(self, name), _TRANSFORMS)
        for name in ("activation", "mult_act", "final_act"):
            _one_of(name, getattr(self, name), _ACTIVATIONS)
        if self.mult_act == "glu":
            raise TersorError("s4's mult_act keeps the width, so it cannot be 'glu'")
        if self.d_state < 2 or self.d_state % 2:
            raise TersorError(f"s4 keeps one of each conjugate pair, so d_state must be even; it is {self.d_state}")
        if self.d_model % (self.n_ssm or self.d_model):
            raise TersorError(f"s4's n_ssm must divide d_model; they are {self.n_ssm} and {self.d_model}")
        if self.is_real and _MODES[self.mode] != "diag":
            raise TersorError(f"s4's is_real needs mode 'diag'; it is {self.mode!r}")


@dataclass(frozen=True, kw_only=True)
class S4Config(S4BlockConfig):
    """The Long Range Arena models; the block's options are those of every layer."""

    vocab: int | None = None  # None: the input is numbers
    d_input: int = 1  # without vocab
    d_output: int = 10
    n_layers: int = 6
    prenorm: bool = False
    norm: str = "batch"  # or "layer", "none"
    pool: str = "mean"  # "last": no averaging
    l_output: int = 0  # the last so many positions, averaged over all before them; 0: only the last, without an axis
    retrieval: bool = False  # pairs of sequences: the batch is all first ones, then all second ones
    # what differs from a block alone
    d_model: int = 256
    transposed: bool = False
    bidirectional: bool = True
    n_ssm: int | None = 1
    dt_transform: str = "softplus"
    tie_dropout: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("norm", self.norm, _NORMS)
        _one_of("pool", self.pool, ("mean", "last"))
        if self.transposed:
            raise TersorError("s4's layers work on (B, L, d_model), so transposed must be False; it is True")


class StateSpace(nn.Module):
    """The continuous-time parameters, complex ones as (re, im): what both kernels share."""

    def __init__(self, config: S4BlockConfig) -> None:
        super().__init__()
        self.config = config
        H, copies = config.d_model, config.n_ssm or config.d_model
        self.n = n = config.d_state if config.is_real else config.d_state // 2
        channels = config.channels * (2 if config.bidirectional else 1) * (2 if config.activation == "glu" else 1)
        a, P, b = initial_state_space(config.init, 2 * n, rank=config.rank, copies=copies, B_init=config.B_init)

        dt = torch.rand(H, 1 if config.dt_tie else n) * math.log(config.dt_max / config.dt_min)
        self.inv_dt = nn.Parameter(_TRANSFORMS[config.dt_transform][1](torch.exp(dt + math.log(config.dt_min))))
        self.A_real = nn.Parameter(_inverse(config.real_transform, -a.real))
        self.C = self._parameter(torch.randn(channels, H, n, dtype=torch.complex64))
        self.B = self._parameter(torch.tensor(b, dtype=torch.complex64)[None])
        if not config.is_real:
            self.A_imag = nn.Parameter(_inverse(config.imag_transform, -a.imag))
        if _MODES[config.mode] == "nplr":
            self.P = self._parameter(torch.tensor(P, dtype=torch.complex64))

    def dt(self, rate: float = 1.0) -> Tensor:
        """[H, 1] or [H, n]."""
        return _TRANSFORMS[self.config.dt_transform][0](wide(self.inv_dt)) * rate

    def a(self) -> Tensor:
        """The diagonal of A, [H, n]."""
        real = -_TRANSFORMS[self.config.real_transform][0](wide(self.A_real))
        if self.config.is_real:
            return self._per_channel(torch.complex(real, torch.zeros_like(real)))
        imaginary = -_TRANSFORMS[self.config.imag_transform][0](wide(self.A_imag))
        return self._per_channel(torch.complex(real, imaginary))

    def b(self) -> Tensor:
        """[H, n]."""
        return self._per_channel(self._complex(self.B)[0])

    def p(self) -> Tensor:
        """[rank, H, n]."""
        return self._per_channel(self._complex(self.P))

    def c(self) -> Tensor:
        """[channels, H, n], without the states beyond the band limit."""
        C = self._complex(self.C)
        if self.config.bandlimit is None:
            return C
        frequency = self.dt() * self.a().imag.abs() / (2 * math.pi)
        return C * (frequency < self.config.bandlimit / 2)

    def _per_channel(self, x: Tensor) -> Tensor:
        """[..., n_ssm, n] -> [..., H, n]: channel h takes row h mod n_ssm."""
        return x.repeat(*[1] * (x.dim() - 2), self.config.d_model // x.shape[-2], 1)

    def _parameter(self, x: Tensor) -> nn.Parameter:
        return nn.Parameter(x.real.clone() if self.config.is_real else torch.view_as_real(x))

    def _complex(self, x: Tensor) -> Tensor:
        x = wide(x)
        return torch.complex(x, torch.zeros_like(x)) if self.config.is_real else torch.view_as_complex(x.contiguous())


class DiagonalKernel(StateSpace):
    """S4D: A = diag(a)."""

    def forward(self, length: int, *, rate: float = 1.0, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Kernel [channels, H, length] and, for a state [batch, H, n], what it adds [batch, channels, H, length]."""
        a, b, dt = self.a(), self.b(), self.dt(rate)
        if self.config.disc == "dss":
            if state is not None:
                raise TersorError("s4 with disc='dss' has no state to continue from; use 'zoh' or 'bilinear'")
            return self._softmax_kernel(length, a, b, dt), None
        A, B = discretize(a, b, dt, self.config.disc)
        log_A = dt * a if self.config.disc == "zoh" else A.log()
        kernel = vandermonde(self.c() * B, log_A, length)
        if state is None:
            return kernel, None
        return kernel, vandermonde(self.c() * (A * state)[:, None], log_A, length)

    def recurrence(self, *, rate: float = 1.0) -> DiagonalRecurrence:
        A, B = discretize(self.a(), self.b(), self.dt(rate), self.config.disc)
        return DiagonalRecurrence(A, B, self.c())

    def _softmax_kernel(self, length: int, a: Tensor, b: Tensor, dt: Tensor) -> Tensor:
        """DSS: every state's powers are normalised over the length, from the end for those that grow."""
        grows = a.real > 0
        position = torch.arange(length, device=a.device)
        from_end = (dt * a * grows * (length - 1))[..., None]
        powers = torch.exp((dt * a)[..., None] * position - from_end.detach())  # [H, n, length]
        shrinking = torch.where(grows, -dt * a, dt * a)
        x = torch.expm1(shrinking * length) * a
        weight = b * torch.expm1(shrinking) * x.conj() / (x.abs() ** 2 + 1e-7)
        return torch.einsum("chn,hnl->chl", self.c() * weight, powers).real


@dataclass(frozen=True)
class LowRankRecurrence:
    """A = diag(a) - P P^* step by step in O(n) a channel: x <- D (s - P (R s)), s = E x - P (Q x) + 2 B u."""

    B: Tensor  # [H, n]
    C: Tensor  # [channels, H, n]: the true C
    P: Tensor  # [rank, H, n], and Q = conj(P)
    D: Tensor  # 1 / (2/dt - a), [H, n]
    E: Tensor  # 2/dt + a, [H, n]
    R: Tensor  # (I + 2 Re Q D P)^-1 Q D, [rank, H, n]
    A_d: Tensor  # all N states: [H, N, N]
    B_d: Tensor  # [H, N]

    def initial_state(self, batch_size: int) -> Tensor:
        return self.B.new_zeros(batch_size, *self.B.shape)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """u (batch, H) -> y (batch, channels, H) and the next state."""
        s = self.E * state - self._low_rank(self.P.conj(), state) + 2 * self.B * u[..., None]
        state = self.D * (s - self._low_rank(self.R, s))
        return 2 * torch.einsum("chn,bhn->bch", self.C, state).real, state

    def advance(self, u: Tensor, state: Tensor) -> Tensor:
        """The state after a chunk u (batch, H, L): neighbouring positions are merged until one is left."""
        A = self.A_d
        x = self.B_d[:, None] * u[..., None]  # [batch, H, L, N]
        x = torch.cat((torch.cat((state, state.conj()), -1)[:, :, None], x), 2)
        while x.shape[2] > 1:
            if x.shape[2] % 2:
                x = F.pad(x, (0, 0, 1, 0))  # a zero before the first changes nothing
            x = x[:, :, 0::2] @ A.mT + x[:, :, 1::2]
            A = A @ A
        return x[:, :, 0, : state.shape[-1]]

    def _low_rank(self, row: Tensor, x: Tensor) -> Tensor:
        """P (row x), the product over all N states."""
        return torch.einsum("rhn,bhr->bhn", self.P, 2 * torch.einsum("rhn,bhn->bhr", row, x).real.to(x.dtype))


class LowRankKernel(StateSpace):
    """S4: A = diag(a) - P P^*. The parameter C is C~ of length `l_kernel` (see the module's docstring)."""

    l_kernel: Tensor

    def __init__(self, config: S4BlockConfig) -> None:
        super().__init__(config)
        self.register_buffer("l_kernel", torch.tensor(0))
        self.length = 0  # l_kernel as a number: graphs that torch.export traces depend on it
        self.register_load_state_dict_post_hook(_read_length)  # type: ignore[no-untyped-call]
        self.reach(config.l_max or 0)

    @torch.no_grad()
    def reach(self, length: int) -> None:
        """Make C~ that of a kernel of at least `length`: from the true C if it was that, else by doubling."""
        while length > self.length:
            start = self.length
            power = torch.linalg.matrix_power(self._dense()[0], start or length)
            C = self._both_halves(self._complex(self.C)).to(power.dtype)
            product = torch.einsum("chn,hnm->chm", C, power)
            C = C + product if start else C - product  # (I - A^2L) = (I - A^L) (I + A^L)
            self.C.copy_(torch.view_as_real(C[..., : self.n]))
            self.length = 2 * start or length
            self.l_kernel.fill_(self.length)

    def forward(self, length: int, *, rate: float = 1.0, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Kernel [channels, H, length] and, for a state [batch, H, n], what it adds [batch, channels, H, length]."""
        self.reach(round(rate * length))
        a, dt, P, C = self.a(), self.dt(rate), self.p(), self.c()
        B = self.b()[None]
        if state is not None:  # C A^l+1 x is the kernel of B = (1/dt + A/2) x
            A_x = a * state - torch.einsum("rhn,bhr->bhn", P, _full_sum("rhn,bhn->bhr", P.conj(), state))
            B = torch.cat((B, state / dt + A_x / 2))
        inputs, outputs = torch.cat((B, P)), torch.cat((C, P.conj()))  # [i, H, n], [o, H, n]

        internal = round(self.length / rate)
        angle = -2 * math.pi / internal * torch.arange(internal // 2 + 1, dtype=torch.float64, device=a.device)
        w = torch.polar(torch.ones_like(angle), angle)
        below, above = (2 * (1 - w)).to(a.dtype), (1 + w).to(a.dtype)  # [f]
        terms = 1 / (below - above * self._both_halves(dt * a)[..., None])  # [H, 2n, f]
        pairs = self._both_halves(inputs[:, None] * outputs * dt)  # [i, o, H, 2n]
        sums = torch.einsum("iohn,hnf->hfio", pairs, terms)

        b, c = len(B), len(C)
        S_CB, S_QB = sums[..., :b, :c], sums[..., :b, c:]
        S_CP, S_QP = sums[..., b:, :c], sums[..., b:, c:]
        above = above[:, None, None]
        if self.config.rank == 1:
            correction = S_QB @ S_CP * (above / (1 + above * S_QP))
        else:
            identity = torch.eye(self.config.rank, device=a.device)
            correction = above * S_QB @ torch.linalg.solve(identity + above * S_QP, S_CP)
        spectrum = 2 * (S_CB - correction)  # [H, f, i, c]
        kernel = torch.fft.irfft(spectrum.permute(2, 3, 0, 1), n=internal)[..., :length]
        return kernel[0], None if state is None else kernel[1:]

    def recurrence(self, *, rate: float = 1.0) -> LowRankRecurrence:
        a, b, P, dt = self.a(), self.b(), self.p(), self.dt(rate)
        C = self.c()
        if self.length:  # back to the true C
            power = torch.linalg.matrix_power(self._dense()[0], self.length)
            identity = torch.eye(2 * self.n, dtype=power.dtype, device=power.device)
            full = self._both_halves(C).to(power.dtype).transpose(0, 1)  # [H, channels, N]
            C = torch.linalg.solve(identity - power, full, left=False)[..., : self.n].transpose(0, 1).to(C.dtype)
        D = 1 / (2 / dt - a)
        Q_D = P.conj() * D
        inner = torch.eye(len(P), device=a.device) + _full_sum("rhn,shn->hrs", Q_D, P).real
        R = torch.einsum("hrs,shn->rhn", torch.linalg.inv(inner).to(a.dtype), Q_D)
        A_d, B_d = self._dense(rate)
        return LowRankRecurrence(b, C, P, D, 2 / dt + a, R, A_d.to(a.dtype), B_d.to(a.dtype))

    def _dense(self, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """A_d [H, N, N] and B_d [H, N] over both halves of the states, in double precision."""
        a, b = (self._both_halves(x.to(torch.complex128)) for x in (self.a(), self.b()))
        P = self._both_halves(self.p().to(torch.complex128))
        half_dt = self._both_halves(self.dt(rate).double().expand(-1, self.n))[..., None] / 2
        half_A = half_dt * (torch.diag_embed(a) - torch.einsum("rhn,rhm->hnm", P, P.conj()))
        identity = torch.eye(2 * self.n, dtype=a.dtype, device=a.device)
        solved = torch.linalg.solve(identity - half_A, torch.cat((identity + half_A, 2 * half_dt * b[..., None]), -1))
        return solved[..., :-1], solved[..., -1]

    @staticmethod
    def _both_halves(x: Tensor) -> Tensor:
        return torch.cat((x, x.conj()), -1)


class LongConvolution(nn.Module):
    """x [B, H, L] -> activation(k * x + D x) [B, channels H, L]."""

    def __init__(self, config: S4BlockConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels * (2 if config.activation == "glu" else 1)
        self.D = nn.Parameter(torch.randn(channels, config.d_model))
        self.kernel = (LowRankKernel if _MODES[config.mode] == "nplr" else DiagonalKernel)(config)
        self.drop_kernel = nn.Dropout(config.drop_kernel)
        self.drop = _dropout(config)
        self.activation = _ACTIVATIONS[config.activation]()

    def forward(self, x: Tensor, *, rate: float = 1.0, state: Tensor | None = None) -> Tensor:
        length = x.shape[-1]
        if self.config.l_max is not None:
            length = min(length, round(self.config.l_max / rate))
        kernel, from_state = self.kernel(length, rate=rate, state=state)
        kernel, backward = self.drop_kernel(kernel), None
        if self.config.bidirectional:
            kernel, backward = kernel.chunk(2)
        y = long_convolution(x[:, None], kernel, backward_kernel=backward) + self.D[..., None] * x[:, None]
        if from_state is not None:
            y = y + F.pad(from_state, (0, x.shape[-1] - length))
        return self.finish(y)

    def finish(self, y: Tensor) -> Tensor:
        """[B, channels, H, L] -> [B, channels H, L]."""
        return self.activation(self.drop(y.flatten(1, 2)).transpose(1, 2)).transpose(1, 2)


class S4Block(nn.Module):
    """x [B, H, L] -> [B, H, L]; with transposed=False both are [B, L, H]."""

    def __init__(self, config: S4BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = LongConvolution(config)
        self.mult_activation = _ACTIVATIONS[config.mult_act]()
        self.drop = _dropout(config)
        self.output_linear: nn.Module = nn.Identity()
        if config.final_act is not None:
            width = config.d_model * (2 if config.final_act == "glu" else 1)
            linear = nn.Linear(config.d_model * config.channels, width)
            self.output_linear = nn.Sequential(linear, _ACTIVATIONS[config.final_act]())

    def forward(
        self, x: Tensor, *, lengths: Tensor | None = None, rate: float = 1.0, state: Tensor | None = None
    ) -> Tensor:
        """lengths (B,): what comes after them is taken as zero. rate: 2 for an input sampled half as often."""
        x = x if self.config.transposed else x.transpose(1, 2)
        if lengths is not None:
            x = x * (torch.arange(x.shape[-1], device=x.device) < lengths[:, None, None])
        return self._output(self.layer(x, rate=rate, state=state))

    def recurrence(self, *, rate: float = 1.0) -> DiagonalRecurrence | LowRankRecurrence:
        """What `step` and `chunk` need of the parameters, discretised once."""
        if self.config.bidirectional:
            raise TersorError("a bidirectional s4 layer sees the future, so it cannot run step by step")
        return self.layer.kernel.recurrence(rate=rate)

    def step(
        self, x: Tensor, state: Tensor, recurrence: DiagonalRecurrence | LowRankRecurrence
    ) -> tuple[Tensor, Tensor]:
        """One position x (B, H) and the state before it (at first `recurrence.initial_state(B)`) -> y (B, H), state."""
        y, state = recurrence.step(x, state)
        y = self._output(self.layer.finish((y + self.layer.D * x[:, None])[..., None]))
        return y.flatten(1), state

    def chunk(
        self, x: Tensor, state: Tensor, recurrence: DiagonalRecurrence | LowRankRecurrence, *, rate: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Many positions at once, by convolution: x as in forward -> y of the same shape, and the state after them."""
        u = x if self.config.transposed else x.transpose(1, 2)
        return self(x, rate=rate, state=state), recurrence.advance(u, state)

    def _output(self, y: Tensor) -> Tensor:
        """[B, channels H, L] -> the block's own layout."""
        y = self.output_linear(self.drop(self.mult_activation(y)).transpose(1, 2))
        return y.transpose(1, 2) if self.config.transposed else y

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return _with_length(self, state)


class Normalization(nn.Module):
    """x [B, L, d] -> [B, L, d]."""

    def __init__(self, kind: str, d: int) -> None:
        super().__init__()
        self.norm = _NORMS[kind](d)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, nn.BatchNorm1d):
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.norm(x)


class ResidualBlock(nn.Module):
    def __init__(self, config: S4Config) -> None:
        super().__init__()
        self.prenorm = config.prenorm
        self.norm = Normalization(config.norm, config.d_model)
        self.layer = S4Block(config)
        self.drop = _dropout(config)

    def forward(self, x: Tensor, rate: float) -> Tensor:
        y = self.layer(self.norm(x) if self.prenorm else x, rate=rate)
        x = x + self.drop(y.transpose(1, 2)).transpose(1, 2)
        return x if self.prenorm else self.norm(x)


class Backbone(nn.Module):
    """x [B, L, d] -> [B, L, d]."""

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ResidualBlock(config) for _ in range(config.n_layers))
        self.norm = Normalization(config.norm, config.d_model) if config.prenorm else nn.Identity()

    def forward(self, x: Tensor, rate: float) -> Tensor:
        for layer in self.layers:
            x = layer(x, rate)
        return self.norm(x)


class Decoder(nn.Module):
    """Features [B, L, d] -> [B, d_output], or [B, l_output, d_output]."""

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        self.config = config
        self.output_transform = nn.Identity() if config.retrieval else nn.Linear(config.d_model, config.d_output)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None:
            return self.output_transform(self._pool(x))
        return self.output_transform(self._pool_each(x, lengths))

    def _pool_each(self, x: Tensor, lengths: Tensor) -> Tensor:
        return torch.stack([self._pool(x[i : i + 1, :length])[0] for i, length in enumerate(lengths.tolist())])

    def _pool(self, x: Tensor) -> Tensor:
        if self.config.pool == "mean":
            if not self.config.l_output:
                return x.mean(1)
            x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x[:, -self.config.l_output :] if self.config.l_output else x[:, -1]


class PairHead(nn.Module):
    """Pooled features [2 B, d], first members first -> [B, d_output] from [e1, e2, e1 e2, e1 - e2]."""

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        d = config.d_model
        self.classifier = nn.Sequential(nn.Linear(4 * d, d), nn.ReLU(), nn.Linear(d, config.d_output))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2)
        return self.classifier(torch.cat((first, second, first * second, first - second), -1))


class RetrievalDecoder(nn.Module):
    def __init__(self, config: S4Config) -> None:
        super().__init__()
        self.feature = Decoder(config)
        self.retrieval = PairHead(config)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return self.retrieval(self.feature(x, lengths))


@register(
    "s4",
    task="classify",
    input="sequence",
    paper="arXiv 2111.00396",
    variants={
        "s4_lra_listops": (815_186, {"vocab": 18, "d_state": 4, "l_max": 2048}),
        "s4_lra_text": (
            874_826,
            {"vocab": 257, "d_output": 2, "d_state": 4, "l_max": 4096, "prenorm": True},
        ),
        "s4_lra_retrieval": (
            1_137_226,
            {"vocab": 257, "d_output": 2, "d_state": 4, "l_max": 4000, "prenorm": True, "retrieval": True},
        ),
        "s4_lra_image": (3_564_682, {"d_model": 512, "l_max": 1024, "dropout": 0.1}),
        "s4_lra_pathfinder": (1_288_706, {"d_output": 2, "n_ssm": 256, "l_max": 1024, "prenorm": True}),
        "s4_lra_pathx": (1_288_706, {"d_output": 2, "n_ssm": 256, "l_max": 16384, "prenorm": True, "dt_min": 0.0001}),
    },
    small={"d_model": 8, "n_layers": 2, "d_state": 8, "l_max": 32},
)
class S4Model(nn.Module):
    """x: tokens (B, L), or numbers (B, L, d_input) -> logits (B, d_output)."""

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.encoder = nn.Linear(config.d_input, d) if config.vocab is None else nn.Embedding(config.vocab, d)
        self.model = Backbone(config)
        self.decoder = RetrievalDecoder(config) if config.retrieval else Decoder(config)

    def forward(self, x: Tensor, lengths: Tensor | None = None, rate: float = 1.0) -> Tensor:
        """lengths (B,): every sequence is pooled over its own. rate: 2 for an input sampled half as often."""
        return self.decoder(self.model(self.encoder(x), rate), lengths)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        batch_size *= 2 if self.config.retrieval else 1
        length = min(64, self.config.l_max or 64)
        if self.config.vocab is None:
            return {"x": torch.randn(batch_size, length, self.config.d_input)}
        return {"x": torch.randint(self.config.vocab, (batch_size, length))}

    def pretraining_config(self, *, channels: int, outputs: int, length: int, causal: bool) -> S4Config:
        """Of the same backbone with `channels` of numbers in, and `outputs` at each of `length` positions."""
        if causal and self.config.bidirectional:
            raise TersorError("s4 with bidirectional=True sees the next element: its pretraining is masked, not causal")
        at_each: dict[str, Any] = {"pool": "last", "l_output": length, "retrieval": False}
        return dataclasses.replace(self.config, d_input=channels, d_output=outputs, **at_each)

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return _with_length(self, state)

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimizer, as published: dt, A, B and P learn at 0.001 at most, without weight decay."""
        return parameter_groups(self, lr=lr, weight_decay=weight_decay)


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
    "none": lambda d: nn.Identity(),
}


def _one_of(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise TersorError(f"s4's {name} is one of {', '.join(map(repr, known))}, not {value!r}")


def _inverse(transform: str, values: Any) -> Tensor:
    """The parameter whose transform is `values`, at least 1e-4, in float32 on the default device."""
    return _TRANSFORMS[transform][1](torch.tensor(values.clip(_SMALLEST), dtype=torch.float32))


def _dropout(config: S4BlockConfig) -> nn.Module:
    """On [B, channels, L]."""
    return nn.Dropout1d(config.dropout) if config.tie_dropout else nn.Dropout(config.dropout)


def _full_sum(equation: str, x: Tensor, y: Tensor) -> Tensor:
    """A product summed over both halves of the states: real, in x's complex dtype."""
    return (2 * torch.einsum(equation, x, y).real).to(x.dtype)


def _with_length(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint without l_kernel holds the true C: l_kernel = 0."""
    absent = {key: torch.tensor(0) for key in module.state_dict() if key.endswith("l_kernel") and key not in state}
    return {**state, **absent}


def _read_length(kernel: nn.Module, _incompatible: Any) -> None:
    assert isinstance(kernel, LowRankKernel)
    kernel.length = int(kernel.l_kernel)
    kernel.reach(kernel.config.l_max or 0)
