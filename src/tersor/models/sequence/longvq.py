"""LongVQ: gated attention over vector-quantised keys on a structured memory (Liu et al., IJCAI 2024, arXiv 2404.11163).

What it is for: long sequences in linear time with attention to single tokens and a state space model that
remembers what is far. No code was published; this is built from the paper's description, and what it leaves open is ours.

    model = tersor.models.create("longvq", vocab=18, d_output=10)
    logits = model(x, lengths=lengths)                          # tokens (B, L), or numbers (B, L, d_input) without `vocab`

    model = tersor.models.create("longvq_lm", vocab_size=259)
    logits, state = model.prefill(input_ids)                    # (B, L) -> (B, L, vocab_size), and what the model remembers
    logits, state = model.step(token, state)                    # token (B,) -> (B, vocab_size), in constant memory

A layer, X (B, L, d):

    M = SSM(LN X),  Z = SiLU(W_z M)                          the memory and the base that queries and keys share (d_z)
    Q = (kappa_q Z + mu_q) / sqrt(d_z),  K = kappa_k Z + mu_k
    V = SiLU(W_v LN X),  G = SiLU(W_g M)                     (expand d)
    X <- X + W_o (G VQAttention(Q, K, V))

The memory is a diagonal state space model (S4D, zero-order hold, d_state/2 complex modes a channel, with a skip); without
causality it has a kernel backwards too. Attention is `tersor.layers.vq_attention`: one head, S = codes codewords, exact over
quantised keys in O(L S), with a learned bias by distance for near positions (two blocks; three without causality). In
training the codebook follows the keys by moving averages, and the trainer adds beta |K - codeword|^2, the commitment
(`auxiliary_loss`). Decoding keeps S means, S counts and two blocks a layer.

Origin: none. Ours: the choice of S4D, where gates stand, one head, the scale of Q, sizes, beta, decay; near positions use
codewords like all others, as in Transformer-VQ. dt and A of the memory learn at 0.001 at most (`parameter_groups`).

Proven: equal to softmax attention over quantised keys, causal or not, with padding; with a codebook that holds the keys,
equal to full attention; in blocks, in pieces and step by step the same; the codebook's update; time linear in the length.
Not proven: any accuracy. Of 16 keys, 250 steps of a model of 32 channels taught it to recall a quarter; whether more do has
not been tried, nor a marker 4,000 positions back. ListOps: 32.3 % after 622 steps (benchmarks/results/sequence_proofs.md).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, one_of
from tersor.layers.diagonal_state_space import DiagonalRecurrence, discretize, parameter_groups, vandermonde
from tersor.layers.long_convolution import long_convolution, wide
from tersor.layers.vq_attention import Codebook, VQState, causal_vq_attention, vq_attention
from tersor.models.registry import register

LayerState = tuple[Tensor, VQState]  # of the memory (B, d, d_state / 2), complex, and of the attention
State = list[LayerState]


@dataclass(frozen=True, kw_only=True)
class LongVQLayers:
    """What both models are made of."""

    d_model: int = 128
    n_layers: int = 6
    d_z: int = 64  # width of queries and keys
    expand: int = 2  # width of values over d_model
    codes: int = 256
    block: int = 64  # positions; two blocks are near
    position_bias: bool = True  # of near positions
    d_state: int = 32  # real numbers a channel of the memory
    dt_min: float = 0.001
    dt_max: float = 0.1
    beta: float = 0.01  # weight of the commitment
    decay: float = 0.99  # of the codebook's averages
    dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least("longvq", 1, d_model=self.d_model, n_layers=self.n_layers, d_z=self.d_z, expand=self.expand)
        at_least("longvq", 1, codes=self.codes, block=self.block)
        if self.d_state < 2 or self.d_state % 2:
            raise TersorError(f"longvq keeps one of each conjugate pair, so d_state must be even; it is {self.d_state}")
        if not 0 < self.dt_min <= self.dt_max:
            raise TersorError(f"longvq needs 0 < dt_min <= dt_max; they are {self.dt_min} and {self.dt_max}")
        if not 0 < self.decay < 1 or self.beta < 0:
            raise TersorError(
                f"longvq's decay lies between 0 and 1 and beta is not negative; they are {self.decay}, {self.beta}"
            )


@dataclass(frozen=True, kw_only=True)
class LongVQConfig(LongVQLayers):
    vocab: int | None = None  # tokens; None: the input is numbers
    d_input: int = 1  # channels of numbers
    d_output: int = 10
    causal: bool = False
    pool: str = "mean"  # "none": an output at every position

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("longvq", "pool", self.pool, ("mean", "none"))


@dataclass(frozen=True, kw_only=True)
class LongVQLMConfig(LongVQLayers):
    vocab_size: int = 256


class MemoryKernel(nn.Module):
    """directions rows of C over one diagonal model a channel, S4D-Lin at first: a = -1/2 + i pi n."""

    def __init__(self, config: LongVQLayers, directions: int) -> None:
        super().__init__()
        d, n = config.d_model, config.d_state // 2
        self.C = nn.Parameter(torch.randn(directions, d, n, 2) * 0.5**0.5)
        span = math.log(config.dt_max / config.dt_min)
        self.log_dt = nn.Parameter(torch.rand(d) * span + math.log(config.dt_min))
        self.log_A_real = nn.Parameter(torch.full((d, n), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(n).repeat(d, 1))

    def recurrence(self) -> DiagonalRecurrence:
        a = torch.complex(-wide(self.log_A_real).exp(), wide(self.A_imag))
        A, B = discretize(a, torch.ones_like(a), wide(self.log_dt).exp()[:, None], "zoh")
        return DiagonalRecurrence(A, B, torch.view_as_complex(wide(self.C)))


class Memory(nn.Module):
    """x (B, L, d) and the state before it -> y (B, L, d), and the state after it if there was one before."""

    def __init__(self, config: LongVQLayers, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.kernel = MemoryKernel(config, 1 if causal else 2)
        self.D = nn.Parameter(torch.randn(config.d_model))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        u, recurrence = x.transpose(1, 2), self.kernel.recurrence()
        log_A = recurrence.A.log()
        kernels = vandermonde(recurrence.C * recurrence.B, log_A, u.shape[-1])  # (directions, d, L)
        y = long_convolution(u, kernels[0], backward_kernel=None if self.causal else kernels[1])
        if state is not None:
            y = y + vandermonde(recurrence.C[0] * recurrence.A * state, log_A, u.shape[-1]).to(y.dtype)
            state = recurrence.advance(wide(u), state)
        return (y + self.D[:, None] * u).transpose(1, 2), state


class Kept:
    """A tensor of the last pass with its graph; a copy of the model has none."""

    value: Tensor | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


class Layer(nn.Module):
    def __init__(self, config: LongVQLayers, *, causal: bool) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        d, d_z, e = config.d_model, config.d_z, config.expand * config.d_model
        self.norm = nn.LayerNorm(d)
        self.memory = Memory(config, causal=causal)
        self.base = nn.Linear(d, d_z)
        self.value = nn.Linear(d, e)
        self.gate = nn.Linear(d, e)
        self.out = nn.Linear(e, d)
        self.kappa = nn.Parameter(1 + 0.1 * torch.randn(2, d_z))  # of queries and keys
        self.mu = nn.Parameter(0.1 * torch.randn(2, d_z))
        self.codebook = Codebook(config.codes, d_z, decay=config.decay)
        if config.position_bias:
            self.bias = nn.Parameter(torch.zeros(2 * config.block if causal else 4 * config.block - 1))
        self.drop = nn.Dropout(config.dropout)
        self.commitment = Kept()  # |K - codeword|^2 of the last training pass

    def forward(
        self, x: Tensor, state: LayerState | None = None, valid: Tensor | None = None, *, remember: bool = False
    ) -> tuple[Tensor, LayerState | None]:
        u = self.norm(x)
        if valid is not None:
            u = u * valid[..., None]  # else the memory would read padding backwards
        before = None
        if remember:
            before = state[0] if state is not None else self.memory.kernel.recurrence().initial_state(x.shape[0])
        m, memory = self.memory(u, before)
        z = F.silu(self.base(m))
        q = (z * self.kappa[0] + self.mu[0]) * self.config.d_z**-0.5
        k = z * self.kappa[1] + self.mu[1]
        k_hat, index, codewords = self.codebook(k, valid)
        if self.training:
            error = (k - k_hat.detach()).square().sum(-1)
            self.commitment.value = error.mean() if valid is None else (error * valid).sum() / valid.sum()
        past = None if state is None else state[1]
        y, attention = self._attend(q, k_hat, F.silu(self.value(u)), index, codewords, past, valid)
        x = x + self.drop(self.out(F.silu(self.gate(m)) * y))
        if memory is None or attention is None:
            return x, None
        return x, (memory, attention)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        codewords: Tensor,
        state: VQState | None,
        valid: Tensor | None,
    ) -> tuple[Tensor, VQState | None]:
        block = self.config.block
        width = 2 * block if self.causal else 4 * block - 1
        bias = self.bias if self.config.position_bias else q.new_zeros(width)
        if self.causal:  # padding lies behind what is asked
            return causal_vq_attention(q, k, v, index, codewords, bias, block=block, state=state)
        return vq_attention(q, k, v, index, codewords, bias, block=block, valid=valid), None


class Backbone(nn.Module):
    """x (B, L, d) -> (B, L, d), and with `remember` the state after it."""

    def __init__(self, config: LongVQLayers, *, causal: bool) -> None:
        super().__init__()
        self.beta = config.beta
        self.layers = nn.ModuleList(Layer(config, causal=causal) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(
        self, x: Tensor, state: State | None = None, valid: Tensor | None = None, *, remember: bool = False
    ) -> tuple[Tensor, State]:
        after: State = []
        for index, layer in enumerate(self.layers):
            x, last = layer(x, None if state is None else state[index], valid, remember=remember)
            if last is not None:
                after.append(last)
        return self.norm(x), after

    def auxiliary_loss(self) -> Tensor:
        """beta times the commitment of all layers in the last training pass."""
        told = [layer.commitment.value for layer in self.layers if isinstance(layer, Layer)]
        if any(each is None for each in told):
            raise TersorError("longvq has a commitment only after a pass in training mode")
        return self.beta * torch.stack([each for each in told if each is not None]).sum()


@register(
    "longvq",
    task="classify",
    input="sequence",
    paper="arXiv 2404.11163",
    variants={
        "longvq_listops": (726_916, {"vocab": 18}),
        "longvq_image": (724_868, {}),
    },
    small={"d_model": 8, "n_layers": 2, "d_z": 8, "codes": 8, "block": 8, "d_state": 8},
)
class LongVQ(nn.Module):
    """x: tokens (B, L), or numbers (B, L, d_input) -> logits (B, d_output); (B, L, d_output) with pool="none"."""

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.encoder = nn.Linear(config.d_input, d) if config.vocab is None else nn.Embedding(config.vocab, d)
        self.backbone = Backbone(config, causal=config.causal)
        self.decoder = nn.Linear(d, config.d_output)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """lengths (B,): what is behind is neither seen by attention nor averaged."""
        h = self.encoder(x)
        valid = None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        h = self.backbone(h, None, valid)[0]
        if self.config.pool == "mean":
            h = h.mean(1) if valid is None else (h * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        logits: Tensor = self.decoder(h)
        return logits

    def auxiliary_loss(self) -> Tensor:
        """What the trainer adds to the loss."""
        return self.backbone.auxiliary_loss()

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        if self.config.vocab is None:
            return {"x": torch.randn(batch_size, 40, self.config.d_input)}
        return {"x": torch.randint(self.config.vocab, (batch_size, 40))}

    def pretraining_config(self, *, channels: int, outputs: int, length: int, causal: bool) -> LongVQConfig:
        """Of the same backbone with `channels` of numbers in, and `outputs` at every position."""
        if causal != self.config.causal:
            raise TersorError(
                f"longvq's causal is {self.config.causal}, the pretraining's {causal}; set causal={causal}"
            )
        return dataclasses.replace(self.config, d_input=channels, d_output=outputs, pool="none")

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimizer: dt and A of the memory learn at 0.001 at most, without weight decay."""
        return parameter_groups(self, lr=lr, weight_decay=weight_decay)


@register(
    "longvq_lm",
    task="language-model",
    input="tokens",
    paper="arXiv 2404.11163",
    variants={"longvq_lm": (763_520, {})},
    small={"d_model": 8, "n_layers": 2, "d_z": 8, "codes": 8, "block": 8, "d_state": 8, "vocab_size": 32},
)
class LongVQLM(nn.Module):
    """input_ids (B, L) -> logits (B, L, vocab_size)."""

    def __init__(self, config: LongVQLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.backbone = Backbone(config, causal=True)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.backbone(self.embed(input_ids))[0])
        return logits

    def prefill(
        self, input_ids: Tensor, state: State | None = None, *, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """Logits of all tokens, or of the last one only, and the state after it; a text may come in several pieces."""
        x, state = self.backbone(self.embed(input_ids), state, remember=True)
        return self.lm_head(x[:, -1:] if last_only else x), state

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token (B,) -> logits (B, vocab_size) of the next one, and the next state."""
        logits, state = self.prefill(token[:, None], state)
        return logits[:, 0], state

    def auxiliary_loss(self) -> Tensor:
        """What the trainer adds to the loss."""
        return self.backbone.auxiliary_loss()

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(self.config.vocab_size, (batch_size, 20))}

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimizer: dt and A of the memory learn at 0.001 at most, without weight decay."""
        return parameter_groups(self, lr=lr, weight_decay=weight_decay)
