"""Autoformer: seasons and trends taken apart inside a transformer (Wu et al., NeurIPS 2021, arXiv 2106.13008).

What it is for: long-horizon forecasting of series with periods. Every sub-layer is followed by a decomposition that keeps
the seasonal part and sums up the trends; in place of attention, whole stretches of the series that resemble each other at
a lag are averaged, the lags being found by FFT, at O(L log L).

    model = tersor.models.create("autoformer", enc_in=3)                   # or load(name, "checkpoint.pth", ...)
    forecast = model(x_enc, x_mark_enc, None, x_mark_dec)                  # (B, pred_len, N)

    tersor train autoformer --data ETTh1.csv --schedule halving --patience 3      # the published recipe: lr 1e-4, batch 32

x_enc (B, seq_len, N) in the z-scores of the training part, x_mark_enc (B, seq_len, C), x_mark_dec (B, label_len + pred_len,
C). decomp(x) = x - avg(x), avg(x): seasonal part and moving average of `moving_avg` steps. Then, with
lambda = label_len and H = pred_len:

    s, t = decomp(x_enc);   S = [last lambda of s; 0_H],   T = [last lambda of t; mean of x_enc, H times]
    x = conv(x_enc) + time(marks)                                                        (B, L, D)
    x = season(x + AC(x, x)),   x = season(x + W2 act(W1 x))                             e_layers times, then norm
    y = conv(S) + time(marks);  y, t1 = decomp(y + AC(y, y));  y, t2 = decomp(y + AC(y, x));
    y, t3 = decomp(y + W2 act(W1 y));   T = T + conv(t1 + t2 + t3)                       d_layers times, then norm
    forecast = last H of T + (P y)                                                       (B, H, N)

    AC(q, k): r(d) = mean over heads and channels of sum_t q_(t+d) k_t      by FFT, for all lags d = 0 .. L - 1
              the K = int(factor ln L) largest r, softmax over them = w;    sum_i w_i v_(t + d_i mod L)

K largest lags: in evaluation of each sample by itself; in training of the batch's mean, and w is each sample's own at
these: the two differ even without dropout. Keys and values are cut, or padded with zeros, to the queries' length. norm is a
LayerNorm whose result has its mean over time taken away. Nothing is causal, and x_dec is without effect: the decoder's input
is made of x_enc (published as well; it is an argument only for callers that pass it). Without marks their part is 0.

Origin: thuml/Autoformer at 51c7d41, MIT. Its key names are ours, but for the buffers `position_embedding.pe`, which it
never adds and we drop; convolutions of kernel 1 are linear layers here. An even moving_avg shortens the series there and
fails; here it is refused. `output_attention` makes it (forecast, one (B, L, h, E) correlation an encoder layer).

Proven: the golden cases of the published code (longer and shorter decoders, one training step). Trained by us at horizon 96
(benchmarks/results/forecasting.md), test MSE: ETTm1 0.516 (published 0.505), Exchange 0.171 (0.197; 0.081 by repeating the last
value), ETTh1 0.462 to 0.509 with three seeds (0.449). Not proven: published errors at other horizons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.layers.activations import activation
from tersor.layers.checks import at_least, divides, one_of
from tersor.layers.series_parts import (
    EMBEDDINGS,
    MARKS,
    CircularConv,
    TimeEmbedding,
    TokenEmbedding,
    decompose,
    example_marks,
)
from tersor.models.key_maps import drop, squeeze_to
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class AutoformerConfig:
    seq_len: int = 96  # L: look-back
    label_len: int = 48  # steps of the look-back that the decoder sees again
    pred_len: int = 96  # horizon
    moving_avg: int = 25  # steps of the trend's average, odd
    enc_in: int = 7  # N
    dec_in: int | None = None  # as enc_in
    c_out: int | None = None  # as enc_in; or 1
    d_model: int = 512  # D
    n_heads: int = 8
    e_layers: int = 2
    d_layers: int = 1
    d_ff: int = 2048
    factor: float = 3  # lags kept: factor * ln L
    dropout: float = 0.05
    activation: str = "gelu"  # exact; or "relu"
    embed: str = "timeF"  # of the marks; or "fixed", "learned"
    freq: str = "h"  # how many marks a row has
    output_attention: bool = False

    def __post_init__(self) -> None:
        for name in ("seq_len", "pred_len", "enc_in", "d_model", "n_heads", "d_ff", "moving_avg"):
            at_least("autoformer", 1, **{name: getattr(self, name)})
        at_least("autoformer", 0, label_len=self.label_len, e_layers=self.e_layers, d_layers=self.d_layers)
        divides("autoformer", "n_heads", self.n_heads, "d_model", self.d_model)
        one_of("autoformer", "activation", self.activation, ("gelu", "relu"))
        one_of("autoformer", "embed", self.embed, EMBEDDINGS)
        one_of("autoformer", "freq", self.freq, MARKS)
        if self.label_len > self.seq_len:
            raise TersorError(f"autoformer's label_len {self.label_len} is more than its seq_len {self.seq_len}")
        if self.moving_avg % 2 == 0:
            raise TersorError(f"autoformer's moving_avg is odd, not {self.moving_avg}: take {self.moving_avg + 1}")
        if self.dec_in not in (None, self.enc_in):
            raise TersorError(f"autoformer's dec_in {self.dec_in} must be its enc_in {self.enc_in}")
        if self.c_out not in (None, 1, self.enc_in):
            raise TersorError(f"autoformer's c_out {self.c_out} must be its enc_in {self.enc_in}, or 1")
        for length in (self.seq_len, self.label_len + self.pred_len):
            if not 1 <= lags(self.factor, length) <= length:
                raise TersorError(
                    f"autoformer's factor {self.factor} keeps {lags(self.factor, length)} lags of {length} steps"
                )

    @property
    def outputs(self) -> int:
        return self.enc_in if self.c_out is None else self.c_out


def lags(factor: float, length: int) -> int:
    """K: how many lags auto-correlation keeps of a series of `length` steps."""
    return int(factor * math.log(length))


class Embedding(nn.Module):
    """Values and marks of each step, no positions."""

    def __init__(self, config: AutoformerConfig) -> None:
        super().__init__()
        self.value_embedding = TokenEmbedding(config.enc_in, config.d_model, bias=False)
        self.temporal_embedding = TimeEmbedding(config.d_model, embed=config.embed, freq=config.freq, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, marks: Tensor | None) -> Tensor:
        tokens = self.value_embedding(x)  # (B, L, D)
        return self.dropout(tokens if marks is None else tokens + self.temporal_embedding(marks))


class AutoCorrelation(nn.Module):
    """q (B, L, D), k (B, S, D) -> (B, L, D), and the correlations (B, L, h, E) where they are asked for."""

    def __init__(self, config: AutoformerConfig, *, keep_map: bool = False) -> None:
        super().__init__()
        self.n_heads, self.factor, self.keep_map = config.n_heads, config.factor, keep_map
        self.query_projection = nn.Linear(config.d_model, config.d_model)
        self.key_projection = nn.Linear(config.d_model, config.d_model)
        self.value_projection = nn.Linear(config.d_model, config.d_model)
        self.out_projection = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor | None]:
        L = x.shape[1]
        q, k, v = self.query_projection(x), self.key_projection(other), self.value_projection(other)
        k, v = (_to_length(each, L) for each in (k, v))
        spectrum = torch.fft.rfft(q, dim=1) * torch.fft.rfft(k, dim=1).conj()  # (B, L / 2 + 1, D)
        r = torch.fft.irfft(spectrum.mean(-1), n=L, dim=1)  # (B, L): the mean goes before the inverse, which is linear
        mixed = self.out_projection(mix_lags(v, r, lags(self.factor, L), per_sample=not self.training))
        if not self.keep_map:
            return mixed, None
        return mixed, torch.fft.irfft(spectrum, n=L, dim=1).unflatten(-1, (self.n_heads, -1))


def mix_lags(v: Tensor, r: Tensor, K: int, *, per_sample: bool) -> Tensor:
    """v (B, L, D) shifted by the K lags at which r (B, L) is largest, weighted by softmax of r there."""
    B, L, _ = v.shape
    lag = (r if per_sample else r.mean(0, keepdim=True)).topk(K, dim=-1).indices.expand(B, K)
    w = r.gather(1, lag).softmax(-1)  # (B, K)
    steps = torch.arange(L, device=v.device)
    mixed = torch.zeros_like(v)
    for n in range(K):
        at = (steps + lag[:, n, None]) % L  # (B, L)
        mixed = mixed + w[:, n, None, None] * v.gather(1, at[..., None].expand_as(v))
    return mixed


def _to_length(x: Tensor, L: int) -> Tensor:
    if x.shape[1] >= L:
        return x[:, :L]
    return torch.cat((x, x.new_zeros(x.shape[0], L - x.shape[1], x.shape[2])), 1)


class SeasonNorm(nn.Module):
    """LayerNorm, then each channel's mean over time is taken away."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layernorm(x)
        return x - x.mean(1, keepdim=True)


class FeedForward(nn.Module):
    """conv1 and conv2 as published, without bias; a base class, so that their keys are the layer's own."""

    def __init__(self, config: AutoformerConfig) -> None:
        super().__init__()
        self.conv1 = nn.Linear(config.d_model, config.d_ff, bias=False)  # published as convolutions of kernel 1
        self.conv2 = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = activation(config.activation, of="autoformer")
        self.moving_avg = config.moving_avg

    def feed(self, x: Tensor) -> Tensor:
        return self.dropout(self.conv2(self.dropout(self.activation(self.conv1(x)))))


class EncoderLayer(FeedForward):
    def __init__(self, config: AutoformerConfig) -> None:
        super().__init__(config)
        self.attention = AutoCorrelation(config, keep_map=config.output_attention)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        mixed, correlation = self.attention(x, x)
        x, _ = decompose(x + self.dropout(mixed), self.moving_avg)
        x, _ = decompose(x + self.feed(x), self.moving_avg)
        return x, correlation


class Encoder(nn.Module):
    def __init__(self, config: AutoformerConfig) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.e_layers))
        self.norm = SeasonNorm(config.d_model)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        correlations = []
        for layer in self.attn_layers:
            x, correlation = layer(x)
            correlations.append(correlation)
        return self.norm(x), correlations


class DecoderLayer(FeedForward):
    def __init__(self, config: AutoformerConfig) -> None:
        super().__init__(config)
        self.self_attention = AutoCorrelation(config)
        self.cross_attention = AutoCorrelation(config)
        self.projection = CircularConv(config.d_model, config.outputs, bias=False)

    def forward(self, y: Tensor, encoded: Tensor) -> tuple[Tensor, Tensor]:
        y, first = decompose(y + self.dropout(self.self_attention(y, y)[0]), self.moving_avg)
        y, second = decompose(y + self.dropout(self.cross_attention(y, encoded)[0]), self.moving_avg)
        y, third = decompose(y + self.feed(y), self.moving_avg)
        return y, self.projection(first + second + third)  # (B, L, D), (B, L, c_out)


class Decoder(nn.Module):
    """y (B, label_len + pred_len, D), encoded, trend -> seasonal part and trend (B, label_len + pred_len, c_out)."""

    def __init__(self, config: AutoformerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.d_layers))
        self.norm = SeasonNorm(config.d_model)
        self.projection = nn.Linear(config.d_model, config.outputs)

    def forward(self, y: Tensor, encoded: Tensor, trend: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            y, more = layer(y, encoded)
            trend = trend + more
        return self.projection(self.norm(y)), trend


@register(
    "autoformer",
    task="forecast",
    input="series",
    paper="arXiv 2106.13008",
    variants={
        "autoformer": (10_535_943, {}),
        "autoformer_exchange": (10_541_064, {"enc_in": 8}),
        "autoformer_weather": (10_607_637, {"enc_in": 21}),
        "autoformer_ecl": (12_143_937, {"enc_in": 321}),
        "autoformer_traffic": (14_914_398, {"enc_in": 862}),
        "autoformer_ili": (10_535_943, {"seq_len": 36, "label_len": 18, "pred_len": 24}),
    },
    small={"seq_len": 24, "label_len": 12, "pred_len": 18, "moving_avg": 5, "enc_in": 4, "d_model": 16, "d_ff": 32},
)
class Autoformer(nn.Module):
    """x_enc (B, seq_len, N), marks (B, seq_len, C) and (B, label_len + pred_len, C) -> forecast (B, pred_len, N)."""

    def __init__(self, config: AutoformerConfig) -> None:
        super().__init__()
        self.config = config
        self.enc_embedding = Embedding(config)
        self.dec_embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(
        self,
        x_enc: Tensor,
        x_mark_enc: Tensor | None = None,
        x_dec: Tensor | None = None,  # without effect, see above
        x_mark_dec: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor | None]]:
        config = self.config
        start = x_enc.shape[1] - config.label_len
        season, trend = decompose(x_enc, config.moving_avg)
        mean = x_enc.mean(1, keepdim=True).expand(-1, config.pred_len, -1)
        trend = torch.cat((trend[:, start:], mean), 1)  # (B, label_len + pred_len, N)
        season = torch.cat((season[:, start:], torch.zeros_like(mean)), 1)
        encoded, correlations = self.encoder(self.enc_embedding(x_enc, x_mark_enc))
        season, trend = self.decoder(self.dec_embedding(season, x_mark_dec), encoded, trend)
        forecast = (trend + season)[:, config.label_len :]
        return (forecast, correlations) if config.output_attention else forecast

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        config = self.config
        rows = (batch_size, config.seq_len), (batch_size, config.label_len + config.pred_len)
        x, (marks, marks_dec) = torch.randn(*rows[0], config.enc_in), (self._marks(each) for each in rows)
        return {"x_enc": x, "x_mark_enc": marks, "x_mark_dec": marks_dec}

    def _marks(self, rows: tuple[int, int]) -> Tensor:
        return example_marks(rows, embed=self.config.embed, freq=self.config.freq)

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.state_dict()
        tables = {key: value for key, value in own.items() if key.endswith("_embed.emb.weight")}  # a file may lack them
        return squeeze_to({**tables, **drop(state, r"position_embedding\.pe$")}, own)
