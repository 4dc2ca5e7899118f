"""Informer: sparse attention for long series, with a decoder that gives the whole horizon at once (Zhou et al., AAAI 2021,
arXiv 2012.07436).

What it is for: long-horizon forecasting; today mostly a yardstick of the papers. Only the queries that single out some keys
are attended with (ProbSparse), the sequence is halved between encoder layers (distilling), and the decoder is given the last
known steps and zeros in place of the future, and answers in one pass.

    model = tersor.models.create("informer", enc_in=3, out_len=48)         # or load(name, "checkpoint.pth", ...)
    forecast = model(x_enc, x_mark_enc, x_dec, x_mark_dec)                 # (B, out_len, c_out)

    tersor train informer --data ETTh1.csv --schedule halving --patience 3        # the published recipe: lr 1e-4, batch 32

x_enc (B, seq_len, N) in the z-scores of the training part; x_dec (B, label_len + out_len, N): its last label_len rows, then
zeros; marks of the same rows (B, rows, C). Left out, x_dec is made of x_enc. Then, with PE the sinusoids:

    x = conv(x_enc) + PE + time(marks)                                                 (B, L, D)
    x = LN1(x + P(x, x, x));  x = LN2(x + W2 act(W1 x))                                an encoder layer
    x = maxpool(ELU(BN(conv(x))))                                between layers, if `distil`: L -> floor((L - 1) / 2) + 1
    y = LN1(y + P_causal(y, y, y));  y = LN2(y + A(y, x, x));  y = LN3(y + W2 act(W1 y))       a decoder layer
    forecast = last out_len rows of W LN(y)

    P(q, k, v): of each query's dot products with U = min(factor ceil(ln S), S) keys drawn with replacement,
                M = their maximum - their sum / S;    the u = min(factor ceil(ln L), L) queries of largest M: attention;
                all others: the mean of v, in the causal form the sum of v up to there

The keys are the same for all samples and heads and are drawn anew at every call, in evaluation too, as published: two calls
differ. `forward(..., index_sample=[...])` says them, one (L, U) table for each P in order of execution, encoder first. Where
u = L the result is attention. `attn="full"` is attention everywhere. `mix` (decoder's P alone, published default) reads the
heads' outputs (h, L, E) as rows of h E numbers as they lie in memory, which interleaves the heads over time. A tuple of
e_layers is the published "InformerStack": encoder j sees the last L / 2^j steps, their results are joined along time.

Origin: zhouhaoyi/Informer2020 at 29f2a73, Apache-2.0. Its key names are ours, but for the sinusoids, which we drop;
convolutions of kernel 1 are linear layers here. The published padding of the circular convolutions depends on comparing
torch's version as text and is wrong for 1.10 to 1.13; here it is always 1. `output_attention` (encoder's maps beside the
forecast) is not here: set attn="full" and hook the layer where they are wanted.

Proven: the golden cases of the published code (full attention, all queries, given keys). Trained by us at horizon 96
(benchmarks/results/forecasting.md), test MSE: ETTh1 0.834 to 1.042 with three seeds (printed later 0.865), ETTm1 0.606 (0.672),
Exchange 0.907 (0.847; 0.081 by repeating the last value); ETTh1 at 720 1.113 (1.181). Not proven: the stacked form, for which
there is no case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.activations import activation
from tersor.layers.checks import at_least, one_of
from tersor.layers.positions import sinusoids
from tersor.layers.series_parts import EMBEDDINGS, MARKS, CircularConv, TimeEmbedding, TokenEmbedding, example_marks
from tersor.models.key_maps import drop, squeeze_to
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class InformerConfig:
    enc_in: int = 7  # N
    dec_in: int | None = None  # as enc_in
    c_out: int | None = None  # as enc_in
    seq_len: int = 96  # L: look-back
    label_len: int = 48  # steps of the look-back that the decoder sees again
    out_len: int = 24  # horizon
    factor: int = 5  # of the logarithms
    d_model: int = 512  # D
    n_heads: int = 8
    e_layers: int | tuple[int, ...] = 3  # a tuple: one encoder each, on halved look-backs
    d_layers: int = 2
    d_ff: int = 512
    dropout: float = 0.0
    attn: str = "prob"  # or "full"
    embed: str = "fixed"  # of the marks; or "learned", "timeF"
    freq: str = "h"  # how many marks a row has
    activation: str = "gelu"  # exact; or "relu"
    distil: bool = True
    mix: bool = True

    def __post_init__(self) -> None:
        for name in ("enc_in", "seq_len", "out_len", "factor", "d_model", "n_heads", "d_ff"):
            at_least("informer", 1, **{name: getattr(self, name)})
        at_least("informer", 0, label_len=self.label_len, d_layers=self.d_layers)
        for name, value in (("dec_in", self.dec_in), ("c_out", self.c_out)):
            if value is not None:
                at_least("informer", 1, **{name: value})
        for layers in self.depths:
            at_least("informer", 1, e_layers=layers)
        one_of("informer", "attn", self.attn, ("prob", "full"))
        one_of("informer", "embed", self.embed, EMBEDDINGS)
        one_of("informer", "freq", self.freq, MARKS)
        one_of("informer", "activation", self.activation, ("gelu", "relu"))
        if self.n_heads > self.d_model:
            raise TersorError(f"informer cannot split d_model {self.d_model} into {self.n_heads} heads")
        if self.label_len > self.seq_len:
            raise TersorError(f"informer's label_len {self.label_len} is more than its seq_len {self.seq_len}")
        if self.seq_len >> (len(self.depths) - 1) < 1:
            raise TersorError(f"informer's seq_len {self.seq_len} cannot be halved for {len(self.depths)} encoders")

    @property
    def depths(self) -> tuple[int, ...]:
        return self.e_layers if isinstance(self.e_layers, tuple) else (self.e_layers,)

    @property
    def pred_len(self) -> int:  # what the other forecasters call it
        return self.out_len


def sampled_keys(factor: int, queries: int, keys: int) -> Tensor:
    """(queries, U) numbers of keys, drawn with replacement: those on which sparsity is judged."""
    return torch.randint(keys, (queries, kept(factor, keys)))


def kept(factor: int, length: int) -> int:
    """U of `length` keys, u of `length` queries."""
    return min(factor * math.ceil(math.log(length)), length)


def prob_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, *, factor: int, causal: bool) -> Tensor:
    """q (B, h, L, E), k, v (B, h, S, E), keys (L, U): the sampled ones. Returns (B, h, L, E)."""
    L, S = q.shape[2], k.shape[2]
    sampled = (q[..., None, :] @ k[:, :, keys].transpose(-1, -2)).squeeze(-2)  # (B, h, L, U)
    M = sampled.amax(-1) - sampled.sum(-1) / S
    top = M.topk(kept(factor, L), sorted=False).indices  # (B, h, u)
    rows = top[..., None].expand(-1, -1, -1, q.shape[-1])
    scores = q.gather(2, rows) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, h, u, S)
    if causal:
        scores = scores.masked_fill(torch.arange(S, device=q.device) > top[..., None], -math.inf)
        rest = v.cumsum(2)
    else:
        rest = v.mean(2, keepdim=True).expand(-1, -1, L, -1)
    return rest.scatter(2, rows, scores.softmax(-1) @ v)


class Attention(nn.Module):
    """q (B, L, D), k (B, S, D) -> (B, L, D)."""

    def __init__(self, config: InformerConfig, *, prob: bool, causal: bool = False, mix: bool = False) -> None:
        super().__init__()
        width = config.d_model // config.n_heads * config.n_heads
        self.n_heads, self.factor, self.dropout = config.n_heads, config.factor, config.dropout
        self.prob, self.causal, self.mix = prob, causal, mix
        self.query_projection = nn.Linear(config.d_model, width)
        self.key_projection = nn.Linear(config.d_model, width)
        self.value_projection = nn.Linear(config.d_model, width)
        self.out_projection = nn.Linear(width, config.d_model)

    def forward(self, x: Tensor, other: Tensor, samples: Iterator[Tensor] | None = None) -> Tensor:
        B, L, _ = x.shape
        projected = self.query_projection(x), self.key_projection(other), self.value_projection(other)
        q, k, v = (rearrange(each, "b l (h e) -> b h l e", h=self.n_heads) for each in projected)
        if self.prob:
            keys = sampled_keys(self.factor, L, k.shape[2]) if samples is None else next(samples)
            mixed = prob_attention(q, k, v, keys.to(x.device), factor=self.factor, causal=self.causal)
        else:
            dropout = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        heads_first = self.mix  # (h, L, E) read as L rows
        return self.out_projection(mixed.reshape(B, L, -1) if heads_first else rearrange(mixed, "b h l e -> b l (h e)"))


class FeedForward(nn.Module):
    """conv1 and conv2 as published; a base class, so that their keys are the layer's own."""

    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        self.conv1 = nn.Linear(config.d_model, config.d_ff)  # published as convolutions of kernel 1
        self.conv2 = nn.Linear(config.d_ff, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = activation(config.activation, of="informer")

    def feed(self, x: Tensor) -> Tensor:
        return self.dropout(self.conv2(self.dropout(self.activation(self.conv1(x)))))


class EncoderLayer(FeedForward):
    def __init__(self, config: InformerConfig) -> None:
        super().__init__(config)
        self.attention = Attention(config, prob=config.attn == "prob")
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, samples: Iterator[Tensor] | None) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x, x, samples)))
        return self.norm2(x + self.feed(x))


class Distil(nn.Module):
    """(B, L, D) -> (B, floor((L - 1) / 2) + 1, D)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.downConv = CircularConv(d_model, d_model, bias=True)
        self.norm = nn.BatchNorm1d(d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.norm(self.downConv(x).transpose(1, 2)))
        return F.max_pool1d(x, kernel_size=3, stride=2, padding=1).transpose(1, 2)


class Encoder(nn.Module):
    def __init__(self, config: InformerConfig, depth: int) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(EncoderLayer(config) for _ in range(depth))
        self.conv_layers = nn.ModuleList(Distil(config.d_model) for _ in range(depth - 1 if config.distil else 0))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, samples: Iterator[Tensor] | None) -> Tensor:
        for n, layer in enumerate(self.attn_layers):
            x = layer(x, samples)
            if n < len(self.conv_layers):
                x = self.conv_layers[n](x)
        return self.norm(x)


class EncoderStack(nn.Module):
    """Encoder j on the last L / 2^j steps, the results one after the other in time."""

    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(Encoder(config, depth) for depth in config.depths)

    def forward(self, x: Tensor, samples: Iterator[Tensor] | None) -> Tensor:
        L = x.shape[1]
        return torch.cat([encoder(x[:, L - L // 2**j :], samples) for j, encoder in enumerate(self.encoders)], 1)


class DecoderLayer(FeedForward):
    def __init__(self, config: InformerConfig) -> None:
        super().__init__(config)
        self.self_attention = Attention(config, prob=config.attn == "prob", causal=True, mix=config.mix)
        self.cross_attention = Attention(config, prob=False)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.norm3 = nn.LayerNorm(config.d_model)

    def forward(self, y: Tensor, encoded: Tensor, samples: Iterator[Tensor] | None) -> Tensor:
        y = self.norm1(y + self.dropout(self.self_attention(y, y, samples)))
        y = self.norm2(y + self.dropout(self.cross_attention(y, encoded)))
        return self.norm3(y + self.feed(y))


class Decoder(nn.Module):
    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.d_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, y: Tensor, encoded: Tensor, samples: Iterator[Tensor] | None) -> Tensor:
        for layer in self.layers:
            y = layer(y, encoded, samples)
        return self.norm(y)


class Embedding(nn.Module):
    """Values, positions and marks of each step."""

    positions: Tensor

    def __init__(self, config: InformerConfig, variates: int) -> None:
        super().__init__()
        self.value_embedding = TokenEmbedding(variates, config.d_model, bias=True)
        self.temporal_embedding = TimeEmbedding(config.d_model, embed=config.embed, freq=config.freq, bias=True)
        longest = max(config.seq_len, config.label_len + config.out_len)
        self.register_buffer("positions", sinusoids(longest, config.d_model), persistent=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, marks: Tensor | None) -> Tensor:
        tokens = self.value_embedding(x) + self.positions[: x.shape[1]]  # (B, L, D)
        return self.dropout(tokens if marks is None else tokens + self.temporal_embedding(marks))


@register(
    "informer",
    task="forecast",
    input="series",
    paper="arXiv 2012.07436",
    variants={
        "informer": (11_675_143, {}),
        "informer_etth1": (
            11_330_055,
            {"out_len": 48, "e_layers": 2, "d_layers": 1, "d_ff": 2048, "dropout": 0.05, "embed": "timeF"},
        ),
        "informer_stack": (
            29_721_607,
            {"out_len": 48, "e_layers": [3, 2, 1], "d_ff": 2048, "dropout": 0.05, "embed": "timeF"},
        ),
    },
    small={
        "seq_len": 24,
        "label_len": 8,
        "out_len": 6,
        "enc_in": 3,
        "d_model": 16,
        "n_heads": 4,
        "d_ff": 24,
        "factor": 50,
    },
)
class Informer(nn.Module):
    """x_enc (B, seq_len, N), x_dec (B, label_len + out_len, N) and marks of both -> forecast (B, out_len, c_out)."""

    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        self.config = config
        self.enc_embedding = Embedding(config, config.enc_in)
        self.dec_embedding = Embedding(config, config.dec_in or config.enc_in)
        stacked = isinstance(config.e_layers, tuple)
        self.encoder = EncoderStack(config) if stacked else Encoder(config, config.depths[0])
        self.decoder = Decoder(config)
        self.projection = nn.Linear(config.d_model, config.c_out or config.enc_in)

    def forward(
        self,
        x_enc: Tensor,
        x_mark_enc: Tensor | None = None,
        x_dec: Tensor | None = None,
        x_mark_dec: Tensor | None = None,
        index_sample: Sequence[Tensor] | None = None,  # of the ProbSparse attentions in order of execution
    ) -> Tensor:
        config = self.config
        samples = None if index_sample is None else iter(index_sample)
        if x_dec is None:
            known = x_enc[:, x_enc.shape[1] - config.label_len :]
            x_dec = torch.cat((known, known.new_zeros(known.shape[0], config.out_len, known.shape[2])), 1)
        encoded = self.encoder(self.enc_embedding(x_enc, x_mark_enc), samples)
        decoded = self.decoder(self.dec_embedding(x_dec, x_mark_dec), encoded, samples)
        return self.projection(decoded)[:, -config.out_len :]

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        config = self.config
        x = torch.randn(batch_size, config.seq_len, config.enc_in)
        rows = config.label_len + config.out_len
        x_dec = torch.zeros(batch_size, rows, config.dec_in or config.enc_in)
        if config.dec_in in (None, config.enc_in):
            x_dec[:, : config.label_len] = x[:, config.seq_len - config.label_len :]
        marks = example_marks((batch_size, config.seq_len), embed=config.embed, freq=config.freq)
        marks_dec = example_marks((batch_size, rows), embed=config.embed, freq=config.freq)
        return {"x_enc": x, "x_mark_enc": marks, "x_dec": x_dec, "x_mark_dec": marks_dec}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.state_dict()
        tables = {key: value for key, value in own.items() if key.endswith("_embed.emb.weight")}  # a file may lack them
        return squeeze_to({**tables, **drop(state, r"position_embedding\.pe$")}, own)
