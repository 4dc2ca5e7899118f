"""H3, "hungry hungry hippos": a state space layer that recalls and compares (Fu et al., ICLR 2023, arXiv 2212.14052).

What it is for: language models with almost no attention: the cost grows as L log L with the text, and a token costs the
same however much came before. One or two attention layers among many make the published hybrids.

    model = tersor.models.load("h3-125m", "model.pt")
    logits = model(input_ids)                                          # (B, L) -> (B, L, padded vocabulary)
    logits, state = model.prefill(input_ids)                           # the same, and what the model remembers
    logits, state = model.step(token, state)                           # token (B,) -> (B, padded vocabulary)

    x = embedding(ids);  x = x + mixer(LN1 x),  x = x + W2 GELU(W1 LN2 x);  logits = head(LN x)      head tied

An H3 mixer, H = d_model / head_dim heads, N = d_state:

    q, k, v = Wq u, Wk u, Wv u                                         (B, d_model, L)
    k' = shift * k + D_k k                          shift_l = sum_n C_{n+l} B_n, l < N: a delay line's output
    y[i, j, h] = (ssm_h + D_h delta) * (k'[h, i] v[h, j])              head_dim^2 sequences a head, one kernel ssm_h
    z[j, h] = sum_i q[h, i] y[i, j, h];   out = Wo z

ssm is a diagonal state space (S4D): a = -exp(inv_A_real) + i A_imag, bilinear, C times B. No activation anywhere. Here
`*` is the causal convolution by FFT; `prefill` of one piece after another is the same with the states passed on, for
texts whose FFT does not fit, and `step` is the recurrence.

On a GPU, in 16 bits, with head_dim 1 and up to 2,048 tokens, a layer takes FlashConv (tersor.kernels.fft_conv) where it is
faster than torch.fft on the GPU at hand, which is measured once a length: both convolutions and both gates with transforms that
stay on the chip, in a third of the memory (benchmarks/results/flash_conv.md). `H3Layer.flash` does longer ones too, in pieces
with the state passed on: on an H200 0.6 to 1.2 times as fast as torch.fft, with 0.6 to 1 times its memory.

Quirks kept: z is flattened as (j, h), with h last, though q, k, v are split as (h, i); with head_dim 1 that is the same.
With l_max the convolution's kernel ends there, the recurrence does not. dt, A and B learn at 0.001 at most without
weight decay: `model.parameter_groups(lr=6e-4, weight_decay=0.1)`. The published decoding is for head_dim 1 only, this
for any. Older checkpoints, whose norms are named one place later, are recognised by their ln_0. What chooses among its
CUDA kernels (use_fast_fftconv, fused_mlp, fused_dropout_add_ln) is accepted and has no effect.

Origin: HazyResearch/H3 at 5c4d06b, Apache-2.0. Its key names are ours.

Proven: the golden cases of the published code (layers of both widths, a hybrid, the 125M shape), steps and pieces equal
to the whole. Not proven: the released files, the published perplexities, rotary attention, for which there is no case.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.kernels.fft_conv import LONGEST, causal_taps, faster_on_chip, fft_conv
from tersor.layers.causal_attention import attend
from tersor.layers.checks import at_least, divides, one_of
from tersor.layers.diagonal_state_space import (
    DiagonalRecurrence,
    convolve_in_pieces,
    discretize,
    parameter_groups,
    vandermonde,
)
from tersor.layers.hippo import initial_state_space
from tersor.layers.long_convolution import convolve_overlapped, long_convolution
from tersor.layers.positions import rotary_table, rotate
from tersor.models.key_maps import rename
from tersor.models.registry import register

LayerState = tuple[Tensor, ...]
State = list[LayerState]


@dataclass(frozen=True, kw_only=True)
class H3LayerConfig:
    d_state: int = 64  # N
    l_max: int | None = None  # longest kernel; None: as long as the text
    head_dim: int = 1
    mode: str = "diag"
    measure: str = "diag-lin"  # initial A: "diag-" and a name of tersor.layers.hippo.initial_state_space
    disc: str = "bilinear"  # or "zoh"
    n_ssm: int | None = None  # copies of A and B, which the heads take in turn; None: one a head
    dt_min: float = 0.001  # dt_*: initial values only
    dt_max: float = 0.1
    dropout: float = 0.0  # no effect, as published
    use_fast_fftconv: bool = False  # no effect

    def __post_init__(self) -> None:
        one_of("h3", "ssm_cfg.mode", self.mode, ("diag",))
        one_of("h3", "ssm_cfg.disc", self.disc, ("bilinear", "zoh"))
        if not self.measure.startswith("diag-"):
            raise TersorError(f"h3's ssm_cfg.measure begins with 'diag-', it is {self.measure!r}")
        divides("h3", "the two of a conjugate pair,", 2, "ssm_cfg.d_state", self.d_state)


@dataclass(frozen=True, kw_only=True)
class H3AttentionConfig:
    num_heads: int = 12
    bias: bool = True
    dropout: float = 0.0
    rotary_emb_dim: int = 0  # channels of each head that turn with the position
    causal: bool = True

    def __post_init__(self) -> None:
        if not self.causal:
            raise TersorError("attn_cfg.causal is False, but a language model must not see what follows")
        if self.rotary_emb_dim % 2:
            raise TersorError(f"attn_cfg.rotary_emb_dim must be even, not {self.rotary_emb_dim}")


@dataclass(frozen=True, kw_only=True)
class H3Config:
    d_model: int = 768
    n_layer: int = 12
    d_inner: int | None = None  # of the MLP; None: 4 d_model
    vocab_size: int = 50257
    ssm_cfg: H3LayerConfig = H3LayerConfig()
    attn_layer_idx: tuple[int, ...] = ()
    attn_cfg: H3AttentionConfig = H3AttentionConfig()
    max_position_embeddings: int = 0  # learned positions; 0: none
    resid_dropout: float = 0.0
    embed_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    pad_vocab_size_multiple: int = 8
    fused_mlp: bool = False  # no effect
    fused_dropout_add_ln: bool = False  # no effect

    def __post_init__(self) -> None:
        at_least("h3", 1, n_layer=self.n_layer, vocab_size=self.vocab_size)
        divides("h3", "ssm_cfg.head_dim", self.ssm_cfg.head_dim, "d_model", self.d_model)
        heads = self.d_model // self.ssm_cfg.head_dim
        divides("h3", "ssm_cfg.n_ssm", self.ssm_cfg.n_ssm or heads, "number of heads", heads)
        if outside := [index for index in self.attn_layer_idx if not 0 <= index < self.n_layer]:
            raise TersorError(f"h3's attn_layer_idx has {outside}, but the layers are 0 to {self.n_layer - 1}")
        if self.attn_layer_idx:
            divides("h3", "attn_cfg.num_heads", self.attn_cfg.num_heads, "d_model", self.d_model)

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


class ShiftParameters(nn.Module):
    """A delay line of N places, written to by B and read by C; at first B writes the newest place alone."""

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        self.B = nn.Parameter(F.one_hot(torch.zeros(d_model, dtype=torch.long), d_state).float())
        self.C = nn.Parameter(torch.empty(1, d_model, d_state))
        nn.init.kaiming_uniform_(self.C, a=math.sqrt(5))

    def forward(self, length: int) -> Tensor:
        """(1, d_model, min(N, length)): the correlation of B and C."""
        N = self.B.shape[-1]
        B, C = (torch.fft.rfft(_wide(each), n=2 * N) for each in (self.B, self.C))
        return torch.fft.irfft(B.conj() * C, n=2 * N)[..., : min(N, length)]


class DiagonalParameters(nn.Module):
    def __init__(self, heads: int, config: H3LayerConfig) -> None:
        super().__init__()
        self.heads, self.disc, n = heads, config.disc, config.d_state // 2
        copies = config.n_ssm or heads
        a, _, b = initial_state_space(config.measure, config.d_state, rank=1, copies=copies, B_init="constant")
        self.C = nn.Parameter(torch.randn(1, heads, n, 2) * 0.5**0.5)
        spread = math.log(config.dt_max / config.dt_min)
        self.log_dt = nn.Parameter(torch.rand(heads) * spread + math.log(config.dt_min))
        self.B = nn.Parameter(torch.view_as_real(torch.tensor(b, dtype=torch.complex64)))
        self.inv_A_real = nn.Parameter(torch.tensor(-a.real).log().float())
        self.A_imag = nn.Parameter(torch.tensor(a.imag).float())

    def recurrence(self) -> DiagonalRecurrence:
        copies = self.heads // len(self.A_imag)
        a = torch.complex(-_wide(self.inv_A_real).exp(), _wide(self.A_imag)).repeat(copies, 1)
        b, C = (torch.view_as_complex(_wide(each).contiguous()) for each in (self.B, self.C))
        A, B = discretize(a, b.repeat(copies, 1), _wide(self.log_dt).exp()[:, None], self.disc)
        return DiagonalRecurrence(A, B, C)

    def forward(self, length: int) -> Tensor:
        """(1, heads, length)."""
        recurrence = self.recurrence()
        return vandermonde(recurrence.C * recurrence.B, recurrence.A.log(), length)


class Kernel(nn.Module):
    """Holds the parameters as `kernel`, for the published names `kernel.kernel.*`; no longer than l_max."""

    def __init__(self, kernel: nn.Module, l_max: int | None = None) -> None:
        super().__init__()
        self.kernel: Any = kernel
        self.l_max = l_max

    def forward(self, length: int) -> Tensor:
        return self.kernel(length if self.l_max is None else min(length, self.l_max))


class H3Layer(nn.Module):
    """u (B, L, d_model) -> (B, L, d_model). State: the last N - 1 of k, and head_dim^2 states of the SSM."""

    def __init__(self, d_model: int, config: H3LayerConfig) -> None:
        super().__init__()
        self.head_dim, self.heads, self.past = config.head_dim, d_model // config.head_dim, config.d_state - 1
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.ssm_k_kernel = Kernel(ShiftParameters(d_model, config.d_state), config.l_max)
        self.ssm_k_D = nn.Parameter(torch.randn(d_model))
        self.kernel = Kernel(DiagonalParameters(self.heads, config), config.l_max)
        self.D = nn.Parameter(torch.randn(self.heads))
        self.output_linear = nn.Linear(d_model, d_model)

    def forward(
        self, u: Tensor, state: LayerState | None = None, *, keep: bool = False
    ) -> tuple[Tensor, LayerState | None]:
        """keep: also give the state after the last place."""
        length = u.shape[1]
        q, k, v = (project(u).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))  # (B, d, L)
        if state is None and not keep and self._flashes(k):
            return self.output_linear(self.flash(q, k, v).transpose(1, 2)), None
        before = k if state is None else torch.cat((state[0], k), -1)
        shifted = (
            long_convolution(before, self.ssm_k_kernel(before.shape[-1]))[..., -length:] + self.ssm_k_D[:, None] * k
        )
        left, right = (rearrange(each, "b (h e) l -> b e h l", e=self.head_dim) for each in (shifted, v))
        kv = left[:, :, None] * right[:, None]  # (B, i, j, H, L)
        y = long_convolution(kv, self.kernel(length)) + self.D[:, None] * kv
        after = None
        if state is not None or keep:
            recurrence = self.kernel.kernel.recurrence()
            memory = recurrence.initial_state(len(u) * self.head_dim**2) if state is None else state[1]
            if state is not None:
                y = y + _free_response(recurrence, memory, length).reshape(y.shape).to(y.dtype)
            memory = recurrence.advance(_wide(kv.flatten(0, 2)), memory)
            after = (F.pad(before, (self.past, 0))[..., before.shape[-1] :], memory)
        z = torch.einsum("bihl,bijhl->bjhl", rearrange(q, "b (h e) l -> b e h l", e=self.head_dim), y)
        return self.output_linear(z.flatten(1, 2).transpose(1, 2)), after

    def _flashes(self, k: Tensor) -> bool:
        """Whether the layer takes `flash`: where it does the same and is faster on this GPU."""
        length = k.shape[-1]
        if self.head_dim > 1 or length > (self.kernel.l_max or length):
            return False
        return faster_on_chip(length, k.dtype, k.device, backward=torch.is_grad_enabled())

    def flash(self, q: Tensor, k: Tensor, v: Tensor, *, longest: int = LONGEST) -> Tensor:
        """q, k, v (B, d, L) -> q ssm(v shift(k)) for head_dim 1: FlashConv, both gates within its kernel; longer texts in pieces
        of `longest`, with the states passed on."""
        length = k.shape[-1]
        shift = self.ssm_k_kernel(length)[0]
        shift = torch.cat((shift[:, :1] + self.ssm_k_D[:, None], shift[:, 1:]), 1)
        if length > longest:
            kv = convolve_overlapped(k, shift, longest) * v
            return q * convolve_in_pieces(self.kernel.kernel.recurrence(), kv, self.D, longest)
        shift = F.pad(shift, (0, length - shift.shape[1]))
        taps = causal_taps(self.kernel(length)[0], self.D)
        return fft_conv(fft_conv(k, causal_taps(shift)), taps, gate_in=v, gate_out=q)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _free_response(recurrence: DiagonalRecurrence, state: Tensor, length: int) -> Tensor:
    """What a state (batch, H, n) adds to the next outputs: 2 Re(C A^(l+1) x), (batch, H, length)."""
    return vandermonde(recurrence.C * recurrence.A * state, recurrence.A.log(), length)


class Attention(nn.Module):
    def __init__(self, d_model: int, config: H3AttentionConfig) -> None:
        super().__init__()
        self.heads, self.rotary_dim, self.dropout = config.num_heads, config.rotary_emb_dim, config.dropout
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=config.bias)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self, u: Tensor, state: LayerState | None = None, *, keep: bool = False
    ) -> tuple[Tensor, LayerState | None]:
        q, k, v = rearrange(self.Wqkv(u), "b l (three h d) -> three b l h d", three=3, h=self.heads)
        if self.rotary_dim:
            past = 0 if state is None else state[0].shape[1]
            q, k = (self._turn(each, past) for each in (q, k))
        if self.training and self.dropout:
            q, k, v = (each.transpose(1, 2) for each in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
            return self.out_proj(rearrange(y, "b h l d -> b l (h d)")), None
        y, state = attend(q, k, v, state)
        return self.out_proj(y), state

    def _turn(self, x: Tensor, past: int) -> Tensor:
        cos, sin = (part.to(x)[past:, None] for part in rotary_table(past + x.shape[1], self.rotary_dim))
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        return torch.cat((rotate(turned, cos, sin), rest), -1)


class MLP(nn.Module):
    def __init__(self, d_model: int, d_inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_inner)
        self.fc2 = nn.Linear(d_inner, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """x (B, L, d_model) -> x of that shape, and the mixer's state."""

    def __init__(self, config: H3Config, index: int) -> None:
        super().__init__()
        d = config.d_model
        attention = index in config.attn_layer_idx
        self.mixer = Attention(d, config.attn_cfg) if attention else H3Layer(d, config.ssm_cfg)
        self.norm1 = nn.LayerNorm(d, eps=config.layer_norm_epsilon)
        self.mlp = MLP(d, config.d_inner or 4 * d)
        self.norm2 = nn.LayerNorm(d, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor, state: LayerState | None, *, keep: bool) -> tuple[Tensor, LayerState | None]:
        dtype = self.norm1.weight.dtype  # x itself may be kept in float32
        mixed, state = self.mixer(self.norm1(x.to(dtype)), state, keep=keep)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.norm2(x.to(dtype)))), state


class Embeddings(nn.Module):
    def __init__(self, config: H3Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.most = config.max_position_embeddings
        if self.most:
            self.position_embeddings = nn.Embedding(self.most, config.d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.word_embeddings(input_ids)
        if not self.most:
            return x
        if x.shape[1] > self.most:
            raise TersorError(f"this h3 has learned positions for {self.most} tokens, not for {x.shape[1]}")
        return x + self.position_embeddings.weight[: x.shape[1]]


class Backbone(nn.Module):
    def __init__(self, config: H3Config) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embeddings = Embeddings(config)
        self.drop = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(
        self, input_ids: Tensor, state: State | None = None, *, keep: bool = False
    ) -> tuple[Tensor, list[LayerState | None]]:
        x = self.drop(self.embeddings(input_ids))
        if self.residual_in_fp32:
            x = x.float()
        after: list[LayerState | None] = []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, None if state is None else state[index], keep=keep)
            after.append(layer_state)
        return self.ln_f(x.to(self.ln_f.weight.dtype)), after


@register(
    "h3",
    task="language-model",
    input="tokens",
    paper="arXiv 2212.14052",
    variants={
        "h3-125m": (126_387_456, {"attn_layer_idx": (6,)}),
        "h3-355m": (
            361_058_304,
            {"d_model": 1024, "n_layer": 24, "attn_layer_idx": (8, 16), "attn_cfg": {"num_heads": 16}},
        ),
        "h3-1.3b": (
            1_326_096_384,
            {"d_model": 2048, "n_layer": 24, "attn_layer_idx": (8, 16), "attn_cfg": {"num_heads": 16}},
        ),
        "h3-2.7b": (
            2_670_307_840,
            {"d_model": 2560, "n_layer": 32, "attn_layer_idx": (8, 16, 24), "attn_cfg": {"num_heads": 20}},
        ),
        "h3-2.7b-rotary": (
            2_671_134_720,
            {
                "d_model": 2560,
                "n_layer": 32,
                "attn_layer_idx": (10, 21),
                "attn_cfg": {"num_heads": 20, "rotary_emb_dim": 64},
            },
        ),
    },
    small={
        "d_model": 16,
        "n_layer": 3,
        "vocab_size": 61,
        "ssm_cfg": {"d_state": 8, "head_dim": 2},
        "attn_layer_idx": (1,),
        "attn_cfg": {"num_heads": 4},
    },
)
class H3(nn.Module):
    """input_ids (B, L) -> logits (B, L, padded vocabulary)."""

    def __init__(self, config: H3Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self._initialise()
        self.lm_head.weight = self.backbone.embeddings.word_embeddings.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.backbone(input_ids)[0])

    def prefill(
        self, input_ids: Tensor, state: State | None = None, *, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """Logits of all tokens, or of the last one only, and the state after it; a text may come in several pieces."""
        if self.config.max_position_embeddings:
            raise TersorError("an h3 with learned positions has no state: max_position_embeddings must be 0")
        x, state = self.backbone(input_ids, state, keep=True)
        return self.lm_head(x[:, -1:] if last_only else x), state

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token (B,) -> logits (B, padded vocabulary) of the next one, and the next state."""
        logits, state = self.prefill(token[:, None], state)
        return logits[:, 0], state

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return parameter_groups(self, lr=lr, weight_decay=weight_decay)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(self.config.vocab_size, (batch_size, 24))}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = rename(
            state,
            (r"^model\.", ""),
            (r"^s4seq\.encoder\.", "backbone."),
            (r"^embedding\.", "backbone.embeddings.word_embeddings."),
            (r"^backbone\.norm\.", "backbone.ln_0."),
        )
        if any(key.startswith("backbone.ln_0.") for key in state):
            state = {_norm_one_place_later(key, self.config.n_layer - 1): value for key, value in state.items()}
        embedding, head = "backbone.embeddings.word_embeddings.weight", "lm_head.weight"
        shared = {name: state[given] for given in (embedding, head) if given in state for name in (embedding, head)}
        return state | shared

    @torch.no_grad()
    def _initialise(self) -> None:
        """As in GPT-2: what writes into the residual stream is smaller the more layers there are."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writer = name.endswith(("out_proj", "output_linear", "fc2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if writer else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def _norm_one_place_later(key: str, last: int) -> str:
    """Older checkpoints name a norm by what is before it; ours by what comes behind it."""
    key = re.sub(r"^backbone\.ln_0\.", "backbone.layers.-1.norm2.", key)
    match = re.fullmatch(r"backbone\.layers\.(-?\d+)\.norm([12])\.(.+)", key)
    if match is None:
        return key
    layer, after_mixer = int(match[1]), match[2] == "1"
    if after_mixer:
        return f"backbone.layers.{layer}.norm2.{match[3]}"
    return f"backbone.ln_f.{match[3]}" if layer == last else f"backbone.layers.{layer + 1}.norm1.{match[3]}"
