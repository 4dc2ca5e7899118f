"""Mamba and Mamba-2, language models of selective state spaces (Gu and Dao, arXiv 2312.00752; Dao and Gu, 2405.21060).

What it is for: language models whose cost grows linearly with the text and whose memory while generating does not grow
at all: a token costs the same after ten tokens as after a million.

    model = tersor.models.load("mamba-130m", "model.safetensors")      # official or transformers' checkpoint
    logits = model(input_ids)                                          # (B, L) -> (B, L, vocabulary)
    logits, state = model.prefill(input_ids)                           # the same, and what the model remembers
    logits, state = model.step(token, state)                           # token (B,) -> (B, vocabulary)

    x = embedding(ids)
    x = x + mixer(norm(x)),  and where d_intermediate > 0:  x = x + mlp(norm2(x))         in every layer
    logits = head(norm_f(x))                                           the head is the embedding where they are tied

    Mamba-1 mixer:  x, z = W_in u;   x = SiLU(conv(x));   dt, B, C = W_x x
                    y = selective_scan(x, softplus(W_dt dt + b_dt), -exp(A_log), B, C) + D x;   W_out (y SiLU(z))
    Mamba-2 mixer:  layers/mamba2_mixer.py
    attention:      in the layers of attn_layer_idx; grouped heads, a causal convolution on q, k, v and rotary
                    positions where asked for

No layer knows positions but rotary attention. The vocabulary is padded to a multiple of pad_vocab_size_multiple, so
logits have more columns than there are tokens. Texts of different lengths share a batch when padded on the left, with
`attention_mask` (B, L) False there. `state` holds, per layer, the last d_conv - 1 inputs of the convolution and the SSM
state (or keys and values); it is not changed in place, so one prompt can be continued in several ways.

Origin: state-spaces/mamba at e9594ce, Apache-2.0; its key names are ours. transformers' Mamba and Mamba2 differ by one
key. The published step keeps d_conv inputs of the convolution, one more than it needs. What chooses among its CUDA
kernels (fused_add_norm, chunk_size, use_fast_path, use_mem_eff_path) is accepted and has no effect.

To quantize Mamba-1 in groups, exclude `*.dt_proj`: its few inputs (dt_rank) are no multiple of the usual group sizes.

Proven: the golden cases of the published code to 1e-5, among them the 130m model; logits equal to transformers' of both
kinds with random weights; steps equal to the whole sequence. Not proven: published zero-shot accuracies; attention's
rotary form and the six layers of mamba2attn-2.7b, for which there is no case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.kernels.selective_scan import selective_scan
from tersor.layers.causal_attention import attend
from tersor.layers.causal_conv import CausalConv1d
from tersor.layers.mamba2_mixer import Mamba2Mixer, initial_dt_bias
from tersor.models.registry import register

LayerState = tuple[Tensor, ...]
State = list[LayerState]


@dataclass(frozen=True, kw_only=True)
class SSMConfig:
    layer: str = "Mamba1"  # or "Mamba2"
    d_state: int | None = None  # None: 16 for Mamba-1, 128 for Mamba-2
    d_conv: int = 4
    expand: int = 2  # d_inner / d_model
    bias: bool = False  # of in_proj and out_proj
    conv_bias: bool = True
    dt_min: float = 0.001  # dt_*, A_init_range: initial values only
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_rank: int | str = "auto"  # Mamba-1 from here; "auto": d_model / 16, rounded up
    dt_init: str = "random"  # or "constant"
    dt_scale: float = 1.0
    headdim: int = 64  # Mamba-2 from here
    ngroups: int = 1
    d_ssm: int | None = None  # channels that go through the SSM, the others are a gated MLP; None: all d_inner
    A_init_range: tuple[float, float] = (1.0, 16.0)
    D_has_hdim: bool = False  # D per channel, not per head
    rmsnorm: bool = True
    norm_before_gate: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    chunk_size: int = 256  # from here on no effect: the published kernels' choices
    use_fast_path: bool = True
    use_mem_eff_path: bool = True

    def __post_init__(self) -> None:
        if self.layer not in ("Mamba1", "Mamba2"):
            raise TersorError(f"ssm_cfg.layer is 'Mamba1' or 'Mamba2', not {self.layer!r}")
        if self.dt_init not in ("random", "constant"):
            raise TersorError(f"ssm_cfg.dt_init is 'random' or 'constant', not {self.dt_init!r}")
        if self.dt_rank != "auto" and not isinstance(self.dt_rank, int):
            raise TersorError(f"ssm_cfg.dt_rank is 'auto' or a number, not {self.dt_rank!r}")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    num_heads: int = 0
    num_heads_kv: int | None = None  # None: num_heads
    head_dim: int | None = None  # None: d_model / num_heads
    qkv_proj_bias: bool = True
    out_proj_bias: bool = True
    causal: bool = True
    d_conv: int = 0  # width of the convolution on q, k, v; 0: none
    rotary_emb_dim: int = 0  # channels of each head that turn with the position
    rotary_emb_base: float = 10000.0

    def __post_init__(self) -> None:
        if not self.causal:
            raise TersorError("attn_cfg.causal is False, but a language model must not see what follows")
        if self.rotary_emb_dim % 2:
            raise TersorError(f"attn_cfg.rotary_emb_dim must be even, not {self.rotary_emb_dim}")
        if self.num_heads % (self.num_heads_kv or 1):
            raise TersorError(
                f"attn_cfg: {self.num_heads} heads cannot share {self.num_heads_kv} heads of keys and values"
            )


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    d_model: int = 2560
    d_intermediate: int = 0  # of the gated MLP after each mixer, rounded up to a multiple of 128; 0: no MLP
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: SSMConfig = SSMConfig()
    attn_layer_idx: tuple[int, ...] = ()
    attn_cfg: AttentionConfig = AttentionConfig()
    rms_norm: bool = True  # False: LayerNorm
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if outside := [index for index in self.attn_layer_idx if not 0 <= index < self.n_layer]:
            raise TersorError(f"attn_layer_idx has {outside}, but the layers are 0 to {self.n_layer - 1}")
        if self.attn_layer_idx and self.attn_cfg.num_heads < 1:
            raise TersorError("attn_layer_idx asks for attention, but attn_cfg.num_heads is not given")

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


class Mamba1Mixer(nn.Module):
    def __init__(self, d_model: int, config: SSMConfig) -> None:
        super().__init__()
        d_inner, d_state = config.expand * d_model, config.d_state or 16
        dt_rank = config.dt_rank if isinstance(config.dt_rank, int) else math.ceil(d_model / 16)
        self.widths = (dt_rank, d_state, d_state)
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=config.bias)
        self.conv1d = CausalConv1d(d_inner, config.d_conv, bias=config.conv_bias)
        self.x_proj = nn.Linear(d_inner, sum(self.widths), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        scale = config.dt_scale * dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -scale if config.dt_init == "random" else scale, scale)
        self.dt_proj.bias = nn.Parameter(
            initial_dt_bias(d_inner, dt_min=config.dt_min, dt_max=config.dt_max, floor=config.dt_init_floor)
        )
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=config.bias)
        self._kept: tuple[Tensor, tuple[int, int], Tensor] | None = None

    def forward(
        self, u: Tensor, state: LayerState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        conv_state, ssm_state = (None, None) if state is None else state
        x, z = self.in_proj(u).chunk(2, -1)
        x, conv_state = self.conv1d(x, conv_state, mask, silu=True)
        dt, B, C = self.x_proj(x).split(self.widths, -1)
        dt = self.dt_proj(dt)
        y, ssm_state = selective_scan(
            x, dt, self._A(), B, C, D=self.D, z=z, dt_softplus=True, mask=mask, initial_state=ssm_state
        )
        return self.out_proj(y), (conv_state, ssm_state)

    def _A(self) -> Tensor:
        """-exp(A_log), float32; kept from token to token while nobody learns."""
        A_log = self.A_log
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return -torch.exp(A_log.float())
        if type(A_log) not in (Tensor, nn.Parameter) or A_log.is_inference():  # whose changes cannot be seen
            return -torch.exp(A_log.float())
        now = A_log.data_ptr(), A_log._version
        if self._kept is None or self._kept[0] is not A_log or self._kept[1] != now:
            self._kept = A_log, now, -torch.exp(A_log.float())
        return self._kept[2]


class Attention(nn.Module):
    def __init__(self, d_model: int, config: AttentionConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_heads_kv or config.num_heads
        self.head_dim = config.head_dim or d_model // config.num_heads
        self.rotary_dim, self.rotary_base = config.rotary_emb_dim, config.rotary_emb_base
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.in_proj = nn.Linear(d_model, width, bias=config.qkv_proj_bias)
        self.conv1d = CausalConv1d(width, config.d_conv) if config.d_conv else None
        self.out_proj = nn.Linear(self.heads * self.head_dim, d_model, bias=config.out_proj_bias)

    def forward(
        self, u: Tensor, state: LayerState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """The state is that of `attend`, then that of the convolution if there is one."""
        cache, conv_state = (None, ()) if state is None else (state[:3], state[3:])
        qkv = self.in_proj(u)
        if self.conv1d is not None:
            qkv, *conv_state = self.conv1d(qkv, *(conv_state or (None,)), mask)
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), -2)
        if self.rotary_dim:
            past = 0 if cache is None else cache[0].shape[1]
            q, k = (self._rotate(each, past) for each in (q, k))
        y, cache = attend(q, k, v, cache, mask)
        return self.out_proj(y), (*cache, *conv_state)

    def _rotate(self, x: Tensor, past: int) -> Tensor:
        """Channel i and i + rotary_dim / 2 of each head turn by position * base^(-2 i / rotary_dim)."""
        turns = torch.arange(0, self.rotary_dim, 2, device=x.device) / self.rotary_dim
        positions = torch.arange(past, past + x.shape[1], device=x.device)
        angle = (positions[:, None] * self.rotary_base**-turns)[:, None]  # (l, 1, rotary_dim / 2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        x1, x2, rest = x.tensor_split((self.rotary_dim // 2, self.rotary_dim), -1)
        return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest), -1)


class GatedMLP(nn.Module):
    def __init__(self, d_model: int, d_intermediate: int) -> None:
        super().__init__()
        hidden = math.ceil(d_intermediate / 128) * 128
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(value * F.silu(gate))


class Block(nn.Module):
    """x (B, L, d_model) -> x of that shape, and the mixer's state."""

    def __init__(self, config: MambaConfig, index: int) -> None:
        super().__init__()
        self.norm = _norm(config)
        if index in config.attn_layer_idx:
            self.mixer: nn.Module = Attention(config.d_model, config.attn_cfg)
        elif config.ssm_cfg.layer == "Mamba1":
            self.mixer = Mamba1Mixer(config.d_model, config.ssm_cfg)
        else:
            self.mixer = _mamba2_mixer(config.d_model, config.ssm_cfg)
        self.mlp: GatedMLP | None = None
        if config.d_intermediate:
            self.norm2 = _norm(config)
            self.mlp = GatedMLP(config.d_model, config.d_intermediate)

    def forward(
        self, x: Tensor, state: LayerState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        dtype = self.norm.weight.dtype  # x itself may be kept in float32
        mixed, state = self.mixer(self.norm(x.to(dtype)), state, mask)
        x = x + mixed
        if self.mlp is not None:
            x = x + self.mlp(self.norm2(x.to(dtype)))
        return x, state


class Backbone(nn.Module):
    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.norm_f = _norm(config)

    def forward(self, input_ids: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, State]:
        x = self.embedding(input_ids)
        if self.residual_in_fp32:
            x = x.float()
        after = []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, None if state is None else state[index], mask)
            after.append(layer_state)
        return self.norm_f(x.to(self.norm_f.weight.dtype)), after


@register(
    "mamba",
    task="language-model",
    input="tokens",
    paper="arXiv 2312.00752, 2405.21060",
    variants={
        "mamba-130m": (129_135_360, {"d_model": 768, "n_layer": 24}),
        "mamba-370m": (371_516_416, {"d_model": 1024, "n_layer": 48}),
        "mamba-790m": (793_204_224, {"d_model": 1536, "n_layer": 48}),
        "mamba-1.4b": (1_372_178_432, {"d_model": 2048, "n_layer": 48}),
        "mamba-2.8b": (2_768_345_600, {"d_model": 2560, "n_layer": 64}),
        "mamba-2.8b-slimpj": (2_768_345_600, {"d_model": 2560, "n_layer": 64}),
        "mamba2-130m": (
            128_989_632,
            {"d_model": 768, "n_layer": 24, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16},
        ),
        "mamba2-370m": (
            368_346_624,
            {"d_model": 1024, "n_layer": 48, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16},
        ),
        "mamba2-780m": (
            780_161_280,
            {"d_model": 1536, "n_layer": 48, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16},
        ),
        "mamba2-1.3b": (
            1_343_757_312,
            {"d_model": 2048, "n_layer": 48, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16},
        ),
        "mamba2-2.7b": (
            2_702_599_680,
            {"d_model": 2560, "n_layer": 64, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16},
        ),
        "mamba2attn-2.7b": (
            2_697_590_880,
            {
                "d_model": 2560,
                "n_layer": 64,
                "ssm_cfg": {"layer": "Mamba2"},
                "pad_vocab_size_multiple": 16,
                "attn_layer_idx": (9, 18, 27, 36, 45, 56),
                "attn_cfg": {
                    "num_heads": 30,
                    "head_dim": 128,
                    "d_conv": 4,
                    "rotary_emb_dim": 64,
                    "qkv_proj_bias": False,
                    "out_proj_bias": False,
                },
            },
        ),
    },
    small={
        "d_model": 32,
        "n_layer": 3,
        "vocab_size": 61,
        "d_intermediate": 64,
        "attn_layer_idx": (1,),
        "attn_cfg": {"num_heads": 4, "num_heads_kv": 2, "d_conv": 4, "rotary_emb_dim": 4},
        "ssm_cfg": {"d_state": 8},
    },
)
class Mamba(nn.Module):
    """input_ids (B, L) -> logits (B, L, padded vocabulary)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self._initialise()
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.prefill(input_ids, attention_mask=attention_mask)[0]

    def prefill(
        self,
        input_ids: Tensor,
        state: State | None = None,
        *,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, State]:
        """Logits of all tokens, or of the last one only, and the state after it; a text may come in several pieces."""
        mask = None if attention_mask is None else attention_mask.bool()
        x, state = self.backbone(input_ids, state, mask)
        return self.lm_head(x[:, -1:] if last_only else x), state

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token (B,) -> logits (B, padded vocabulary) of the next one, and the next state."""
        logits, state = self.prefill(token[:, None], state)
        return logits[:, 0], state

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(self.config.vocab_size, (batch_size, 24))}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {key.replace("backbone.embeddings.", "backbone.embedding."): value for key, value in state.items()}
        if (
            self.config.tie_embeddings
        ):  # files hold the shared matrix under either name or under both; the head's counts
            embedding, head = "backbone.embedding.weight", "lm_head.weight"
            shared = {name: state[given] for given in (embedding, head) if given in state for name in (embedding, head)}
            state |= shared
        return state

    @torch.no_grad()
    def _initialise(self) -> None:
        """As published: what writes into the residual stream is smaller the more layers there are."""
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        writers = self.config.n_layer * (2 if self.config.d_intermediate else 1)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and module.bias is not None and not name.endswith("dt_proj"):
                nn.init.zeros_(module.bias)
            if name.endswith(("out_proj", "fc2")):
                module.weight /= math.sqrt(writers)


def _norm(config: MambaConfig) -> nn.RMSNorm | nn.LayerNorm:
    return nn.RMSNorm(config.d_model, eps=1e-5) if config.rms_norm else nn.LayerNorm(config.d_model, eps=1e-5)


def _mamba2_mixer(d_model: int, config: SSMConfig) -> Mamba2Mixer:
    return Mamba2Mixer(
        d_model,
        d_inner=config.expand * d_model,
        d_state=config.d_state or 128,
        headdim=config.headdim,
        ngroups=config.ngroups,
        d_ssm=config.d_ssm,
        d_conv=config.d_conv,
        bias=config.bias,
        conv_bias=config.conv_bias,
        D_has_hdim=config.D_has_hdim,
        rmsnorm=config.rmsnorm,
        norm_before_gate=config.norm_before_gate,
        dt_limit=config.dt_limit,
        A_init_range=config.A_init_range,
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        dt_init_floor=config.dt_init_floor,
    )
