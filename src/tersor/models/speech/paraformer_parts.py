"""Encoders and decoders of Paraformer (see paraformer.py): SANM, Conformer, and an ordinary decoder.

Masks are (B, T), true where there is speech or a token. Every LayerNorm has eps 1e-12.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError

LayerNorm = partial(nn.LayerNorm, eps=1e-12)
TABLE = 5000  # rows of Conformer's position table


def padding_mask(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def attend(scores: Tensor, v: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
    """scores (B, h, N, T), v (B, h, T, e), mask of the keys -> (B, N, h e). A row without any key gives zeros."""
    hidden = ~mask[:, None, None]
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0.0)
    return rearrange(F.dropout(weights, dropout) @ v, "b h n e -> b n (h e)")


class Memory(nn.Module):
    """FSMN: x + depthwise convolution of x over time; nothing comes from the padding or goes to it."""

    def __init__(self, d: int, kernel: int, shift: int) -> None:
        super().__init__()
        self.left = (kernel - 1) // 2 + max(shift, 0)
        self.right = kernel - 1 - self.left
        self.fsmn_block = nn.Conv1d(d, d, kernel, groups=d, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * mask[..., None]
        y = self.fsmn_block(F.pad(x.transpose(1, 2), (self.left, self.right))).transpose(1, 2)
        return (x + y) * mask[..., None]


class SANM(Memory):
    """Self-attention, plus a memory of the values."""

    def __init__(self, d_in: int, d: int, heads: int, kernel: int, shift: int, dropout: float) -> None:
        super().__init__(d, kernel, shift)
        self.heads, self.dropout = heads, dropout
        self.linear_q_k_v = nn.Linear(d_in, 3 * d)
        self.linear_out = nn.Linear(d, d)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        values = self.linear_q_k_v(x).chunk(3, -1)
        q, k, v = (rearrange(y, "b t (h e) -> b h t e", h=self.heads) for y in values)
        y = attend(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), v, mask, self.dropout if self.training else 0.0)
        return self.linear_out(y) + super().forward(values[2], mask)


class FeedForward(nn.Module):
    def __init__(self, d: int, hidden: int, dropout: float, *, swish: bool = False) -> None:
        super().__init__()
        self.w_1 = nn.Linear(d, hidden)
        self.w_2 = nn.Linear(hidden, d)
        self.activation = F.silu if swish else F.relu
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(self.activation(self.w_1(x))))


class SANMLayer(nn.Module):
    def __init__(self, d_in: int, d: int, heads: int, hidden: int, kernel: int, shift: int, dropout: float) -> None:
        super().__init__()
        self.residual = d_in == d
        self.self_attn = SANM(d_in, d, heads, kernel, shift, dropout)
        self.feed_forward = FeedForward(d, hidden, dropout)
        self.norm1, self.norm2 = LayerNorm(d_in), LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.dropout(self.self_attn(self.norm1(x), mask))
        x = x + y if self.residual else y
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class SANMEncoder(nn.Module):
    def __init__(
        self, d_in: int, d: int, heads: int, hidden: int, blocks: int, kernel: int, *, shift: int, dropout: float
    ) -> None:
        super().__init__()
        self.scale = math.sqrt(d)
        self.dropout = nn.Dropout(dropout)
        self.encoders0 = nn.ModuleList([SANMLayer(d_in, d, heads, hidden, kernel, shift, dropout)])
        self.encoders = nn.ModuleList(SANMLayer(d, d, heads, hidden, kernel, shift, dropout) for _ in range(blocks - 1))
        self.after_norm = LayerNorm(d)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        pairs = x.shape[2] // 2
        rates = torch.exp(torch.arange(pairs, device=x.device) * (-math.log(10_000) / (pairs - 1)))
        angles = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None] * rates  # positions start at 1
        x = self.dropout(x * self.scale + torch.cat((angles.sin(), angles.cos()), -1).to(x.dtype))
        for layer in (*self.encoders0, *self.encoders):
            x = layer(x, mask)
        return self.after_norm(x), mask


class Subsampling(nn.Module):
    """Two convolutions of stride 2 over time and features: (B, T, d_in) -> (B, about T/4, d)."""

    def __init__(self, d_in: int, d: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, d, 3, 2), nn.ReLU(), nn.Conv2d(d, d, 3, 2), nn.ReLU())
        self.out = nn.Sequential(nn.Linear(d * (((d_in - 1) // 2 - 1) // 2), d))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(rearrange(self.conv(x[:, None]), "b d t f -> b t (d f)"))


class Projections(nn.Module):
    """Attention's four maps; q, k, v by heads."""

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_q, self.linear_k, self.linear_v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.linear_out = nn.Linear(d, d)

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = (self.linear_q(x), self.linear_k(memory), self.linear_v(memory))
        q, k, v = (rearrange(y, "b t (h e) -> b h t e", h=self.heads) for y in maps)
        return q, k, v

    def mix(self, scores: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.linear_out(attend(scores, v, mask, self.dropout if self.training else 0.0))


class Attention(Projections):
    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x, memory)
        return self.mix(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, v, mask)


class RelativeAttention(Projections):
    """Scores (q + u) k + shift((q + v) p): Transformer-XL's, with the shift whose upper triangle wraps around."""

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__(d, heads, dropout)
        self.linear_pos = nn.Linear(d, d, bias=False)
        self.pos_bias_u = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, d // heads)))
        self.pos_bias_v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, d // heads)))

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x, x)
        p = rearrange(self.linear_pos(positions), "t (h e) -> h t e", h=self.heads)
        by_content = (q + self.pos_bias_u[:, None]) @ k.transpose(-1, -2)  # (B, h, T, T)
        by_place = (q + self.pos_bias_v[:, None]) @ p.transpose(-1, -2)
        B, h, T, _ = by_place.shape
        by_place = F.pad(by_place, (1, 0)).reshape(B, h, T + 1, T)[:, :, 1:]
        return self.mix((by_content + by_place) * q.shape[-1] ** -0.5, v, mask)


class ConvolutionModule(nn.Module):
    def __init__(self, d: int, kernel: int) -> None:
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(d, 2 * d, 1)
        self.depthwise_conv = nn.Conv1d(d, d, kernel, padding=(kernel - 1) // 2, groups=d)
        self.norm = nn.BatchNorm1d(d)
        self.pointwise_conv2 = nn.Conv1d(d, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.pointwise_conv1(x.transpose(1, 2)), 1)
        return self.pointwise_conv2(F.silu(self.norm(self.depthwise_conv(y)))).transpose(1, 2)


class ConformerLayer(nn.Module):
    def __init__(
        self, d: int, heads: int, hidden: int, kernel: int, dropout: float, *, macaron: bool, convolution: bool
    ) -> None:
        super().__init__()
        self.macaron, self.convolution = macaron, convolution
        self.self_attn = RelativeAttention(d, heads, dropout)
        self.norm_mha = LayerNorm(d)
        self.feed_forward = FeedForward(d, hidden, dropout, swish=True)
        self.norm_ff = LayerNorm(d)
        if macaron:
            self.feed_forward_macaron = FeedForward(d, hidden, dropout, swish=True)
            self.norm_ff_macaron = LayerNorm(d)
        if convolution:
            self.conv_module = ConvolutionModule(d, kernel)
            self.norm_conv, self.norm_final = LayerNorm(d), LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        share = 0.5 if self.macaron else 1.0
        if self.macaron:
            x = x + share * self.dropout(self.feed_forward_macaron(self.norm_ff_macaron(x)))
        x = x + self.dropout(self.self_attn(self.norm_mha(x), positions, mask))
        if self.convolution:
            x = x + self.dropout(self.conv_module(self.norm_conv(x)))
        x = x + share * self.dropout(self.feed_forward(self.norm_ff(x)))
        return self.norm_final(x) if self.convolution else x


class ConformerEncoder(nn.Module):
    def __init__(
        self,
        d_in: int,
        d: int,
        heads: int,
        hidden: int,
        blocks: int,
        kernel: int,
        *,
        dropout: float,
        macaron: bool,
        convolution: bool,
    ) -> None:
        super().__init__()
        self.d, self.dropout = d, nn.Dropout(dropout)
        self.embed = Subsampling(d_in, d)
        self.encoders = nn.ModuleList(
            ConformerLayer(d, heads, hidden, kernel, dropout, macaron=macaron, convolution=convolution)
            for _ in range(blocks)
        )
        self.after_norm = LayerNorm(d)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] < 7:
            raise TersorError(f"paraformer's conformer needs speech of at least 7 frames, not {x.shape[1]}")
        x, mask = self.embed(x) * math.sqrt(self.d), mask[:, :-2:2][:, :-2:2]
        T = x.shape[1]
        positions = max(TABLE, T) - 1 - torch.arange(T, device=x.device)  # the table's first rows are its far end
        rates = torch.exp(torch.arange(0, self.d, 2, device=x.device) * (-math.log(10_000) / self.d))
        angles = positions[:, None] * rates
        table = self.dropout(torch.stack((angles.sin(), angles.cos()), -1).flatten(1).to(x.dtype))  # (T, d)
        x = self.dropout(x)
        for layer in self.encoders:
            x = layer(x, table, mask)
        return self.after_norm(x), mask


class CrossAttention(nn.Module):
    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_q = nn.Linear(d, d)
        self.linear_k_v = nn.Linear(d, 2 * d)
        self.linear_out = nn.Linear(d, d)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        maps = (self.linear_q(x), *self.linear_k_v(memory).chunk(2, -1))
        q, k, v = (rearrange(y, "b t (h e) -> b h t e", h=self.heads) for y in maps)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        return self.linear_out(attend(scores, v, mask, self.dropout if self.training else 0.0))


class NormedFeedForward(nn.Module):
    def __init__(self, d: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(d, hidden)
        self.w_2 = nn.Linear(hidden, d, bias=False)
        self.norm = LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.norm(self.dropout(self.w_1(x).relu())))


class SANMDecoderLayer(nn.Module):
    """Feed-forward (without a residual), memory, cross-attention; without `kernel` the first of these alone."""

    def __init__(
        self, d: int, heads: int, hidden: int, dropout: float, *, kernel: int = 0, shift: int = 0, cross: bool = False
    ) -> None:
        super().__init__()
        self.remembers, self.cross = kernel > 0, cross
        self.feed_forward = NormedFeedForward(d, hidden, dropout)
        self.norm1 = LayerNorm(d)
        if self.remembers:
            self.self_attn = Memory(d, kernel, shift)
            self.norm2 = LayerNorm(d)
        if cross:
            self.src_attn = CrossAttention(d, heads, dropout)
            self.norm3 = LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        y = self.feed_forward(self.norm1(x))
        if not self.remembers:
            return y
        x = x + self.dropout(self.self_attn(self.norm2(y), mask))
        if self.cross:
            x = x + self.dropout(self.src_attn(self.norm3(x), memory, memory_mask))
        return x


class TokenDecoder(nn.Module):
    """What the decoders share: the labels' embeddings (for training alone), the last norm and the map to the vocabulary."""

    def __init__(self, vocab: int, d: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Embedding(vocab, d))
        self.after_norm = LayerNorm(d)
        self.output_layer = nn.Linear(d, vocab)

    def name(self, x: Tensor) -> Tensor:
        return self.output_layer(self.after_norm(x))


class SANMDecoder(TokenDecoder):
    def __init__(
        self,
        vocab: int,
        d: int,
        heads: int,
        hidden: int,
        blocks: int,
        crossing: int,
        kernel: int,
        *,
        shift: int,
        dropout: float,
    ) -> None:
        super().__init__(vocab, d)

        def layers(count: int, *, cross: bool) -> nn.ModuleList:
            part = partial(SANMDecoderLayer, d, heads, hidden, dropout, kernel=kernel, shift=shift, cross=cross)
            return nn.ModuleList(part() for _ in range(count))

        self.decoders = layers(crossing, cross=True)
        self.decoders2 = layers(blocks - crossing, cross=False)
        self.decoders3 = nn.ModuleList([SANMDecoderLayer(d, heads, hidden, dropout)])

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        for layer in (*self.decoders, *self.decoders2, *self.decoders3):
            x = layer(x, mask, memory, memory_mask)
        return self.name(x)


class SANDecoderLayer(nn.Module):
    def __init__(self, d: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(d, heads, dropout)
        self.src_attn = Attention(d, heads, dropout)
        self.feed_forward = FeedForward(d, hidden, dropout)
        self.norm1, self.norm2, self.norm3 = LayerNorm(d), LayerNorm(d), LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y, y, mask))
        x = x + self.dropout(self.src_attn(self.norm2(x), memory, memory_mask))
        return x + self.dropout(self.feed_forward(self.norm3(x)))


class SANDecoder(TokenDecoder):
    """Every token sees all others; no positions."""

    def __init__(self, vocab: int, d: int, heads: int, hidden: int, blocks: int, *, dropout: float) -> None:
        super().__init__(vocab, d)
        self.decoders = nn.ModuleList(SANDecoderLayer(d, heads, hidden, dropout) for _ in range(blocks))

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        for layer in self.decoders:
            x = layer(x, mask, memory, memory_mask)
        return self.name(x)
