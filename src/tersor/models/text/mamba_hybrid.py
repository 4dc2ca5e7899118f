"""Hybrids of Mamba-2, attention and MLP layers after a pattern (Waleffe et al., arXiv 2406.07887; Nemotron-H).

What it is for: language models with almost the speed of Mamba, and with what a few attention layers add: recall of what
stands far back, copying, in-context learning.

    model = tersor.models.load("mamba2-hybrid-8b", "nemotron-like.safetensors")
    model = tersor.models.create("mamba_hybrid", pattern="M-M*-M-")
    pattern = pattern_from_ratios(56, attention=4 / 56, mlp=1 / 2)       # the 8B model's

    x = x + layer(norm(x))          one layer per symbol, each with its own RMSNorm;  x (B, L, hidden_size)
    M  Mamba-2 mixer                layers/mamba2_mixer.py
    *  attention                    causal, grouped heads, no positions at all
    -  MLP                          W_down act(W_up x)

`forward`, `prefill`, `step` and left padding with `attention_mask` are those of `mamba`. A pattern may hold more, which
`parse_pattern` reads: `|` bounds pipeline stages and means nothing to a model in one piece; what follows `/` are layers
for predicting several tokens at once. These, and E (experts), G (gated delta net), D and + (latent attention), are not
built: a pattern with them is refused.

Origin: patterns of NVIDIA/Megatron-LM at d98e8a6 (BSD-style); numbers and key names of transformers' NemotronH, whose
older prefix `backbone.` is read too. The MLP of the 8B model is GELU, Nemotron-H's is relu2.

Proven: the golden cases (transformers' NemotronH, Megatron's patterns) to 1e-5; steps equal to the whole sequence. Not
proven: the 8B models themselves, whose released files are in Megatron's own layout, which is not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.causal_attention import attend
from tersor.layers.mamba2_mixer import Mamba2Mixer
from tersor.models.registry import register

LayerState = tuple[Tensor, ...]
State = list[LayerState]

SYMBOLS = "*DGM+-E"
BUILT = "M*-"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class LayerPattern:
    """A pattern string taken apart: the model's own layers (with `|`), and those of `depths` further tokens."""

    main: str
    mtp: str | None = None
    depths: int = 0

    @property
    def layers(self) -> str:
        return self.main.replace("|", "")

    @property
    def segments(self) -> int:
        return self.main.count("|") + 1

    def counts(self) -> dict[str, int]:
        """How many layers of each kind there are, those of every further token included."""
        everything = self.layers + (self.mtp or "") * self.depths
        return {symbol: everything.count(symbol) for symbol in SYMBOLS}


def parse_pattern(pattern: str) -> LayerPattern:
    """Read "M-M*|M-/MM/MM"; TersorError where it is malformed."""
    main, *further = pattern.split("/")
    if unknown := set(main.replace("|", "") + "".join(further)) - set(SYMBOLS):
        raise TersorError(
            f"the pattern {pattern!r} has {', '.join(map(repr, sorted(unknown)))}; its layers are {' '.join(SYMBOLS)}, "
            "and | divides only what stands before the first /"
        )
    if len(set(further)) > 1:
        raise TersorError(f"the parts of {pattern!r} after the first / differ: {', '.join(map(repr, further))}")
    if "*" in pattern and {"D", "+"} & set(pattern):
        raise TersorError(f"the pattern {pattern!r} mixes plain attention (*) with latent attention (D, +)")
    if not any(further):
        return LayerPattern(main)
    return LayerPattern(main, further[0], len(further))


def pattern_from_ratios(layers: int, *, attention: float = 0.0, mlp: float = 0.0) -> str:
    """Attention spread evenly with Mamba layers at both ends, then MLPs spread evenly over the Mamba layers left."""
    if layers < 1 or attention < 0 or mlp < 0 or attention + mlp > 1:
        raise TersorError(
            f"{layers} layers with shares {attention} of attention and {mlp} of MLP: shares add up to at most 1"
        )
    n_attention, n_mlp = round(layers * attention), round(layers * mlp)
    symbols = ["M"] * layers
    _replace_evenly(symbols, "*", (layers - n_attention) / (n_attention + 1))
    if n_mlp:
        _replace_evenly(symbols, "-", (layers - n_attention - n_mlp) / n_mlp)
    return "".join(symbols)


def _replace_evenly(symbols: list[str], new: str, section: float) -> None:
    """Put `new` in the place of an M whenever about `section` other Ms have passed."""
    left = section
    for index, symbol in enumerate(symbols):
        if symbol != "M":
            continue
        if left < 0.5:
            symbols[index] = new
            left += section
        else:
            left -= 1


@dataclass(frozen=True, kw_only=True)
class MambaHybridConfig:
    pattern: str = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
    hidden_size: int = 4096
    vocab_size: int = 256000
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    attention_bias: bool = False
    intermediate_size: int = 16384
    mlp_hidden_act: str = "gelu"
    mlp_bias: bool = False
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    expand: int = 2  # as in the published configs; mamba_num_heads * mamba_head_dim is what counts
    use_bias: bool = False  # of the Mamba layers' projections
    use_conv_bias: bool = True
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    chunk_size: int = 128  # as in the published configs; every chunk size computes the same
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.mlp_hidden_act not in ACTIVATIONS:
            raise TersorError(f"mlp_hidden_act is one of {', '.join(ACTIVATIONS)}, not {self.mlp_hidden_act!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise TersorError(
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key-value heads"
            )
        parsed = parse_pattern(self.pattern)
        if not parsed.layers or parsed.mtp or set(parsed.layers) - set(BUILT):
            raise TersorError(
                f"of the pattern {self.pattern!r} only the layers {' '.join(BUILT)} can be built, without /"
            )


class Attention(nn.Module):
    def __init__(self, config: MambaHybridConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        d, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(d, queries, bias=bias)
        self.k_proj = nn.Linear(d, keys, bias=bias)
        self.v_proj = nn.Linear(d, keys, bias=bias)
        self.o_proj = nn.Linear(queries, d, bias=bias)

    def forward(self, x: Tensor, state: LayerState | None, mask: Tensor | None) -> tuple[Tensor, LayerState]:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)) for each in projected)
        y, state = attend(q, k, v, state, mask)
        return self.o_proj(y), state


class MLP(nn.Module):
    """Remembers nothing: its state is empty."""

    def __init__(self, config: MambaHybridConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.mlp_hidden_act]
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, state: LayerState | None, mask: Tensor | None) -> tuple[Tensor, LayerState]:
        return self.down_proj(self.act(self.up_proj(x))), ()


class Layer(nn.Module):
    """x (B, L, hidden_size) -> x of that shape, and the mixer's state."""

    def __init__(self, config: MambaHybridConfig, symbol: str) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = {"M": _mamba2_mixer, "*": Attention, "-": MLP}[symbol](config)

    def forward(self, x: Tensor, state: LayerState | None, mask: Tensor | None) -> tuple[Tensor, LayerState]:
        mixed, state = self.mixer(self.norm(x.to(self.norm.weight.dtype)), state, mask)
        return x + mixed, state


class Backbone(nn.Module):
    def __init__(self, config: MambaHybridConfig) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, symbol) for symbol in parse_pattern(config.pattern).layers)
        self.norm_f = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, input_ids: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, State]:
        x = self.embeddings(input_ids)
        if self.residual_in_fp32:
            x = x.float()
        after = []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, None if state is None else state[index], mask)
            after.append(layer_state)
        return self.norm_f(x.to(self.norm_f.weight.dtype)), after


@register(
    "mamba_hybrid",
    task="language-model",
    input="tokens",
    paper="arXiv 2406.07887",
    variants={
        "mamba2-hybrid-8b": (8_654_517_248, {}),
        "mamba2-8b": (8_236_999_680, {"pattern": "MMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMM"}),
    },
    small={
        "pattern": "M-M*-M-",
        "hidden_size": 32,
        "vocab_size": 61,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
    },
)
class MambaHybrid(nn.Module):
    """input_ids (B, L) -> logits (B, L, vocab_size)."""

    def __init__(self, config: MambaHybridConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight

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
        x, state = self.model(input_ids, state, mask)
        return self.lm_head(x[:, -1:] if last_only else x), state

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token (B,) -> logits (B, vocab_size) of the next one, and the next state."""
        logits, state = self.prefill(token[:, None], state)
        return logits[:, 0], state

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(self.config.vocab_size, (batch_size, 24))}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {re.sub(r"^backbone\.", "model.", key): value for key, value in state.items()}
        if self.config.tie_word_embeddings and "model.embeddings.weight" in state:
            state = {"lm_head.weight": state["model.embeddings.weight"], **state}
        return state


def _mamba2_mixer(config: MambaHybridConfig) -> Mamba2Mixer:
    return Mamba2Mixer(
        config.hidden_size,
        d_inner=config.mamba_num_heads * config.mamba_head_dim,
        d_state=config.ssm_state_size,
        headdim=config.mamba_head_dim,
        ngroups=config.n_groups,
        d_conv=config.conv_kernel,
        bias=config.use_bias,
        conv_bias=config.use_conv_bias,
        dt_limit=config.time_step_limit,
        eps=config.layer_norm_epsilon,
    )
