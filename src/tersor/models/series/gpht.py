"""GPHT: one pretrained, hierarchical, autoregressive forecaster for any horizon (Liu et al., KDD 2024, arXiv 2402.16516).

What it is for: one model for many data sets and every horizon. Each variate is a series by itself, cut into tokens of
`token_len` steps; the model predicts the next token, and a longer forecast is the prediction fed back in. Stages see the
series at several resolutions, coarse first, and each works on what the earlier ones did not foresee.

    model = tersor.models.create("gpht")                                   # or load(name, "checkpoint.pth", ...)
    forecast = model.eval()(x_enc)                 # (B, L, N) -> (B, pred_len, N); L any multiple of token_len, N any
    forecast = model.forecast(x_enc, 720)          # any other horizon
    next_tokens = model.next_tokens(x_enc)         # (B, L, N): what each token says of the one after it

    tersor train gpht --data ETTh1.csv --set data.seq_len=336              # pretraining on one data set
    tersor train gpht --checkpoint run/model.safetensors --set model.heads_only=true --set model.dropout=0.0 ...

x_enc in the z-scores of the training part, T = token_len, m and s mean and deviation of each variate's window:

    x_0 = (x_enc - m) / s,  result = 0
    o_i = head_i(E_i(W_i tokens(maxpool_(r_i)(x_i)) + PE))        tokens of T / r_i numbers -> D -> T numbers, (B, L, N)
    result = result + o_i,  x_(i+1) = x_i - shift(o_i)            shift: one token later, zeros in front; i = 0 .. depth - 1
    next_tokens = result * s + m

E_i is a post-norm encoder of GT_e_layers layers in which a token attends to itself and earlier ones. Instance statistics are
of the whole window, so in training a token's prediction knows the mean of what follows: published. In a roll-out the window
slides by a token, and its statistics are taken anew.

In training mode a call gives all that is learned from: the prediction of every step from T to L + pred_len; with the
published pred_len, that of one token, these are `next_tokens`. tersor.train's forecasting compares them with the series
itself. `heads_only` freezes all but the heads: fine-tuning as published (dropout 0, lr 1e-4, batch 32). Pretraining on a
mixture: torch.utils.data.ConcatDataset of tersor.data.series.SingleVariates of several sets' training parts.

Origin: icantnamemyself/GPHT at cfdbbd2, MIT. Its key names are ours, but for the sinusoids, which we drop; convolutions of
kernel 1 are linear layers here. Its pred_len has to be token_len; ours is the horizon of `forward`. `factor` has no effect
and is left out; `output_attention` returns nothing there either. No pretrained weights are published.

Proven: the golden cases of the published code (roll-outs, one training step at full and small size). Not proven: published
errors. Pretrained by us for two epochs on a mixture without three of the published data sets, and then fine-tuned, its errors
are 3 to 9 % above the published (benchmarks/results/forecasting_336.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.activations import activation
from tersor.layers.checks import at_least, divides, one_of
from tersor.layers.positions import sinusoids
from tersor.layers.series_parts import InstanceScale
from tersor.models.key_maps import drop, squeeze_to
from tersor.models.registry import register

LONGEST = 5000  # rows of the published table of positions: tokens of a window


@dataclass(frozen=True, kw_only=True)
class GPHTConfig:
    GT_pooling_rate: tuple[int, ...] = (8, 4, 2, 1)  # r_i, of the first `depth` stages
    token_len: int = 48  # T
    GT_d_model: int = 512  # D
    GT_d_ff: int = 2048
    GT_e_layers: int = 3
    depth: int = 4
    n_heads: int = 8
    dropout: float = 0.1
    activation: str = "gelu"  # exact; or "relu"
    seq_len: int = 336  # look-back of the examples and of `tersor train`; any multiple of token_len will do
    pred_len: int = 48  # horizon of `forward`, any
    heads_only: bool = False  # only the forecast heads are trained

    def __post_init__(self) -> None:
        for name in ("token_len", "GT_d_model", "GT_d_ff", "GT_e_layers", "depth", "n_heads", "pred_len"):
            at_least("gpht", 1, **{name: getattr(self, name)})
        one_of("gpht", "activation", self.activation, ("gelu", "relu"))
        divides("gpht", "token_len", self.token_len, "seq_len", self.seq_len)
        if self.n_heads > self.GT_d_model:
            raise TersorError(f"gpht cannot split GT_d_model {self.GT_d_model} into {self.n_heads} heads")
        if len(self.GT_pooling_rate) < self.depth:
            raise TersorError(f"gpht of depth {self.depth} needs as many GT_pooling_rate, not {self.GT_pooling_rate}")
        for rate in self.GT_pooling_rate[: self.depth]:
            divides("gpht", "a GT_pooling_rate", rate, "token_len", self.token_len)


class Attention(nn.Module):
    """z (B, P, D) -> (B, P, D), causal."""

    def __init__(self, config: GPHTConfig) -> None:
        super().__init__()
        width = config.GT_d_model // config.n_heads * config.n_heads
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.query_projection = nn.Linear(config.GT_d_model, width)
        self.key_projection = nn.Linear(config.GT_d_model, width)
        self.value_projection = nn.Linear(config.GT_d_model, width)
        self.out_projection = nn.Linear(width, config.GT_d_model)

    def forward(self, z: Tensor) -> Tensor:
        projections = (self.query_projection, self.key_projection, self.value_projection)
        q, k, v = (rearrange(project(z), "b p (h e) -> b h p e", h=self.n_heads) for project in projections)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out_projection(rearrange(mixed, "b h p e -> b p (h e)"))


class EncoderLayer(nn.Module):
    def __init__(self, config: GPHTConfig) -> None:
        super().__init__()
        D = config.GT_d_model
        self.attention = Attention(config)
        self.conv1 = nn.Linear(D, config.GT_d_ff)  # published as convolutions of kernel 1
        self.conv2 = nn.Linear(config.GT_d_ff, D)
        self.norm1 = nn.LayerNorm(D)
        self.norm2 = nn.LayerNorm(D)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = activation(config.activation, of="gpht")

    def forward(self, z: Tensor) -> Tensor:
        z = self.norm1(z + self.dropout(self.attention(z)))
        return self.norm2(z + self.dropout(self.conv2(self.dropout(self.activation(self.conv1(z))))))


class Encoder(nn.Module):
    def __init__(self, config: GPHTConfig) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.GT_e_layers))
        self.norm = nn.LayerNorm(config.GT_d_model)

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.attn_layers:
            z = layer(z)
        return self.norm(z)


class PatchEmbedding(nn.Module):
    """tokens (B N, P, T / r) -> (B N, P, D)."""

    positions: Tensor

    def __init__(self, patch_len: int, d_model: int, dropout: float) -> None:
        super().__init__()
        self.value_embedding = nn.Linear(patch_len, d_model, bias=False)
        self.register_buffer("positions", sinusoids(LONGEST, d_model), persistent=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.value_embedding(tokens) + self.positions[: tokens.shape[1]])


class Stage(nn.Module):
    """x (B, L, N) -> (B, L, N): for each token of each variate the one after it, seen through max-pooling by `rate`."""

    def __init__(self, config: GPHTConfig, rate: int) -> None:
        super().__init__()
        self.rate, self.patch_len = rate, config.token_len // rate
        self.patch_embedding = PatchEmbedding(self.patch_len, config.GT_d_model, config.dropout)
        self.encoder = Encoder(config)
        self.forecast_head = nn.Linear(config.GT_d_model, config.token_len)

    def forward(self, x: Tensor) -> Tensor:
        N = x.shape[-1]
        pooled = F.max_pool1d(x.transpose(1, 2), self.rate)  # (B, N, L / r)
        tokens = rearrange(pooled, "b n (p t) -> (b n) p t", t=self.patch_len)
        said = self.forecast_head(self.encoder(self.patch_embedding(tokens)))  # (B N, P, T)
        return rearrange(said, "(b n) p t -> b (p t) n", n=N)


@register(
    "gpht",
    task="forecast",
    input="series",
    paper="arXiv 2402.16516",
    variants={"gpht": (37_977_280, {})},
    small={
        "GT_pooling_rate": [4, 2, 1],
        "token_len": 8,
        "GT_d_model": 16,
        "GT_d_ff": 24,
        "GT_e_layers": 2,
        "depth": 3,
        "n_heads": 2,
        "seq_len": 40,
        "pred_len": 20,
    },
)
class GPHT(nn.Module):
    """x_enc (B, L, N) -> forecast (B, pred_len, N); in training the predictions of all steps (B, L - T + pred_len, N)."""

    takes_any_length = True  # the look-back of training need not be its config's

    def __init__(self, config: GPHTConfig) -> None:
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleList(Stage(config, rate) for rate in config.GT_pooling_rate[: config.depth])
        if config.heads_only:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("forecast_head" in name)

    def forward(
        self,
        x_enc: Tensor,
        x_mark_enc: Tensor | None = None,  # marks and the decoder's inputs of the other forecasters: without effect
        x_dec: Tensor | None = None,
        x_mark_dec: Tensor | None = None,
    ) -> Tensor:
        if not self.training:
            return self.forecast(x_enc, self.config.pred_len)
        said = self.next_tokens(x_enc)
        return self._extend(x_enc, said, self.config.pred_len)[:, : said.shape[1] - self.T + self.config.pred_len]

    def forecast(self, x: Tensor, horizon: int) -> Tensor:
        """The `horizon` steps (B, horizon, N) after x (B, L, N), token by token."""
        if horizon < 1:
            raise TersorError(f"gpht forecasts 1 step or more, not {horizon}")
        L = x.shape[1]
        said = self._extend(x, self.next_tokens(x), horizon)
        return said[:, L - self.T : L - self.T + horizon]

    def next_tokens(self, x: Tensor) -> Tensor:
        """(B, L, N): the predictions of steps T to L + T, those of a token made without the values of later ones."""
        L = x.shape[1]
        if L < self.T or L % self.T:
            raise TersorError(f"gpht takes look-backs of a multiple of token_len {self.T} steps, not {L}")
        scale = InstanceScale.of(x)
        rest = scale.apply(x)
        result = torch.zeros_like(rest)
        for stage in self.encoders:
            said = stage(rest)
            result = result + said
            rest = rest - F.pad(said, (0, 0, self.T, 0))[:, :L]  # what was said of a token, where that token is
        return scale.undo(result)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"x_enc": torch.randn(batch_size, self.config.seq_len, 3)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return squeeze_to(drop(state, r"position_embedding\.pe$"), self.state_dict())

    @property
    def T(self) -> int:
        return self.config.token_len

    def _extend(self, x: Tensor, said: Tensor, horizon: int) -> Tensor:
        """Predictions `said` of steps T to L + T and the tokens that follow, so that they reach L + horizon."""
        L = x.shape[1]
        token = said[:, -self.T :]
        for _ in range(-(-horizon // self.T) - 1):
            x = torch.cat((x, token), 1)[:, -L:]
            token = self.next_tokens(x)[:, -self.T :]
            said = torch.cat((said, token), 1)
        return said
