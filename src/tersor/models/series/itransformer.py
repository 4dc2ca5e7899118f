"""iTransformer: the inverted transformer for multivariate forecasting (Liu et al., ICLR 2024, arXiv 2310.06625).

What it is for: long-horizon forecasting of many parallel series: electricity, weather, traffic, exchange rates. The
whole look-back window of one variate is one token, so attention mixes variates and the feed-forward net works on each
variate's history; no positional encoding, no decoder. The number of variates is free at run time.

    model = tersor.models.create("itransformer_etth1", pred_len=192)       # or load(name, "checkpoint.pth", ...)
    forecast = model(x_enc, x_mark_enc)      # (B, seq_len, N), time marks (B, seq_len, C) or None -> (B, pred_len, N)

    tersor train itransformer_etth1 --data ETTh1.csv --schedule halving --patience 3      # the published recipe

x_enc in the z-scores of the training part (tersor.data.series). Then, with T = N + C tokens of width D:

    m, s = mean, sqrt(var + 1e-5) over time, per sample and variate;   x = (x_enc - m) / s           use_norm
    z = W [x, marks]^T + b                                             (B, T, D): marks are tokens like the variates
    z = LN1(z + A(z)),  z = LN2(z + W2 act(W1 z))                      e_layers times; A: attention of n_heads heads
    forecast = (P LN(z))[:N]^T * s + m                                 (B, pred_len, N)

The gradient is stopped through m, not through s. Heads are d_model // n_heads wide: where that does not divide, q, k
and v are narrower than d_model, as published. `output_attention` makes it (forecast, one (B, h, T, T) map a layer).
The variants are those of the published scripts, look-back 96; horizons are 96 by default, 12 for PEMS, and `_long` are
the sizes for the longer horizons of a data set (ETTh1: 336, 720; PEMS: 48, 96). Train at lr 1e-4, batch 32, except ECL
5e-4 and 16, Traffic 1e-3 and 16, Solar and PEMS04 5e-4, PEMS03, PEMS07 and the long PEMS08 1e-3. Solar and PEMS are
given no marks; all others four of them, the hourly ones, even those of minutes and days.

Origin: thuml/iTransformer at c2426e6 (model/iTransformer.py), MIT. Its key names are ours; its convolutions of kernel 1
are linear layers here, and their weights (F, D, 1) are accepted. Its arguments without effect (factor, embed, freq,
class_strategy, ...) are left out, and an activation other than "gelu" and "relu", which it takes for GELU, is refused.

Proven: the golden cases of the published code (with and without marks and norm, one training step) to 1e-5; trained
by us at horizon 96, test MSE on ETTh1 0.386 (published 0.386), Exchange 0.087 (0.086), ETTm1 0.341 (0.334); at 720 on ETTh1
0.528 (0.503), Exchange 0.865 (0.847). One linear map shared by all variates is ahead of it on all but ETTm1, see
benchmarks/results/forecasting.md. Not proven: the other data sets and horizons, PEMS, unseen variates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class ITransformerConfig:
    seq_len: int = 96  # L: look-back
    pred_len: int = 96  # horizon
    d_model: int = 512  # D
    n_heads: int = 8
    d_ff: int = 512
    e_layers: int = 2
    dropout: float = 0.1
    activation: str = "gelu"  # exact; or "relu"
    use_norm: bool = True
    output_attention: bool = False

    def __post_init__(self) -> None:
        for name in ("seq_len", "pred_len", "d_model", "n_heads", "d_ff"):
            if getattr(self, name) < 1:
                raise TersorError(f"itransformer needs {name} of at least 1, not {getattr(self, name)}")
        if self.n_heads > self.d_model:
            raise TersorError(f"itransformer cannot split d_model {self.d_model} into {self.n_heads} heads")
        if self.activation not in ("gelu", "relu"):
            raise TersorError(f"itransformer's activation is 'gelu' or 'relu', not {self.activation!r}")


class VariateEmbedding(nn.Module):
    """One linear map from a look-back window to a token, the same for variates and marks."""

    def __init__(self, seq_len: int, d_model: int, dropout: float) -> None:
        super().__init__()
        self.value_embedding = nn.Linear(seq_len, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, marks: Tensor | None) -> Tensor:
        rows = x if marks is None else torch.cat((x, marks), -1)  # (B, L, T)
        return self.dropout(self.value_embedding(rows.transpose(1, 2)))  # (B, T, D)


class Attention(nn.Module):
    """Softmax attention over all tokens, without a mask. Returns the map only where it is asked for."""

    def __init__(self, config: ITransformerConfig) -> None:
        super().__init__()
        width = config.d_model // config.n_heads * config.n_heads
        self.n_heads, self.dropout, self.keep_map = config.n_heads, config.dropout, config.output_attention
        self.query_projection = nn.Linear(config.d_model, width)
        self.key_projection = nn.Linear(config.d_model, width)
        self.value_projection = nn.Linear(config.d_model, width)
        self.out_projection = nn.Linear(width, config.d_model)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        projections = (self.query_projection, self.key_projection, self.value_projection)
        q, k, v = (rearrange(project(z), "b t (h e) -> b h t e", h=self.n_heads) for project in projections)
        dropout = self.dropout if self.training else 0.0
        attention = None
        if self.keep_map:
            attention = F.dropout((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1), dropout)
            mixed = attention @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out_projection(rearrange(mixed, "b h t e -> b t (h e)")), attention


class EncoderLayer(nn.Module):
    def __init__(self, config: ITransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.conv1 = nn.Linear(config.d_model, config.d_ff)  # published as convolutions of kernel 1
        self.conv2 = nn.Linear(config.d_ff, config.d_model)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = F.relu if config.activation == "relu" else F.gelu

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        mixed, attention = self.attention(z)
        z = self.norm1(z + self.dropout(mixed))
        y = self.dropout(self.conv2(self.dropout(self.activation(self.conv1(z)))))
        return self.norm2(z + y), attention


class Encoder(nn.Module):
    def __init__(self, config: ITransformerConfig) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.e_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, z: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        attentions = []
        for layer in self.attn_layers:
            z, attention = layer(z)
            attentions.append(attention)
        return self.norm(z), attentions


@register(
    "itransformer",
    task="forecast",
    input="series",
    paper="arXiv 2310.06625",
    variants={
        "itransformer_etth1": (841_568, {"d_model": 256, "d_ff": 256}),
        "itransformer_etth1_long": (3_379_024, {"pred_len": 336}),
        "itransformer_etth2": (224_224, {"d_model": 128, "d_ff": 128}),
        "itransformer_ettm1": (224_224, {"d_model": 128, "d_ff": 128}),
        "itransformer_ettm2": (224_224, {"d_model": 128, "d_ff": 128}),
        "itransformer_exchange": (224_224, {"d_model": 128, "d_ff": 128}),
        "itransformer_weather": (4_833_888, {"e_layers": 3}),
        "itransformer_solar": (3_255_904, {}),
        "itransformer_ecl": (4_833_888, {"e_layers": 3}),
        "itransformer_traffic": (6_411_872, {"e_layers": 4}),
        "itransformer_pems03": (6_368_780, {"pred_len": 12, "e_layers": 4}),
        "itransformer_pems04": (
            25_320_460,
            {"pred_len": 12, "d_model": 1024, "d_ff": 1024, "e_layers": 4, "use_norm": False},
        ),
        "itransformer_pems07": (3_212_812, {"pred_len": 12, "use_norm": False}),
        "itransformer_pems07_long": (6_387_248, {"pred_len": 48, "e_layers": 4, "use_norm": False}),
        "itransformer_pems08": (3_212_812, {"pred_len": 12}),
        "itransformer_pems08_long": (6_387_248, {"pred_len": 48, "e_layers": 4, "use_norm": False}),
    },
    small={"seq_len": 24, "pred_len": 12, "d_model": 32, "d_ff": 48, "n_heads": 4},
)
class ITransformer(nn.Module):
    """x_enc (B, seq_len, N), x_mark_enc (B, seq_len, C) or None -> forecast (B, pred_len, N)."""

    def __init__(self, config: ITransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.enc_embedding = VariateEmbedding(config.seq_len, config.d_model, config.dropout)
        self.encoder = Encoder(config)
        self.projector = nn.Linear(config.d_model, config.pred_len)

    def forward(
        self,
        x_enc: Tensor,
        x_mark_enc: Tensor | None = None,
        x_dec: Tensor | None = None,  # the decoder's inputs of the other forecasters: without effect here
        x_mark_dec: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor | None]]:
        x, N = x_enc, x_enc.shape[-1]
        if self.config.use_norm:
            m = x.mean(1, keepdim=True).detach()
            x = x - m
            s = (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
            x = x / s
        z, attentions = self.encoder(self.enc_embedding(x, x_mark_enc))  # (B, T, D)
        forecast = self.projector(z).transpose(1, 2)[:, :, :N]  # (B, pred_len, N)
        if self.config.use_norm:
            forecast = forecast * s + m
        return (forecast, attentions) if self.config.output_attention else forecast

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        seq_len = self.config.seq_len
        return {"x_enc": torch.randn(batch_size, seq_len, 7), "x_mark_enc": torch.rand(batch_size, seq_len, 4) - 0.5}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        convolutions = ("conv1.weight", "conv2.weight")
        return {
            key: value.squeeze(-1) if key.endswith(convolutions) and value.dim() == 3 else value
            for key, value in state.items()
        }
