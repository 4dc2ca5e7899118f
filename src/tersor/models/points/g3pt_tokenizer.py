"""G3PT's cross-scale tokenizer (Zhang, Xiong, Xu 2024, arXiv 2409.06322): a shape as a few bits, coarse to fine.

What it is for: the first stage of `g3pt`, and compression of shapes: a closed surface becomes sum(scales) tokens of `bits` bits
(1,000 tokens of 13 bits are 1.6 kB), and each further scale adds detail.

    model = tersor.models.create("g3pt_tokenizer", num_latents=16, width=32, num_heads=2, scales=(1, 4, 16), bits=6)
    tokens = model.encode(torch.rand(1, 100, 6))                        # (1, 21), whole numbers below 2^6
    inside = model.decode(model.features(tokens, scales=2), torch.rand(1, 500, 3)) > 0      # by the two coarsest scales

points (B, P, 6), positions in a box of about +-1 and unit normals. L learned queries look at all points, so that neither their
order nor their number counts:

    Z = blocks(A(queries, W [e(p) | normal]))       (B, L, C); e(p) = sines and cosines, as in `triposg_vae`
    f = Z, Zhat = 0; for each scale s of n_s tokens:
        r = D_s(f)                                  (B, n_s, C): n_s learned queries look at f
        q = LFQ(r)                                  signs of d numbers (tersor.layers.lookup_free); its index is the token
        h = U_s(q)                                  (B, L, C): L learned queries look at the n_s tokens
        Zhat = Zhat + h, f = f - h                  so Z - f = Zhat
    logit(p) = W A(W' e(p), blocks(Zhat))           above 0: inside

D_s and U_s are one attention to the set and an MLP, on learned queries: the cross-scale querying transformer. Logits of
different p do not meet.

Losses (`losses`): binary cross-entropy of inside and outside; LFQ's entropy and commitment, mean over the scales; and
`residual_weight` x mean (Z - Zhat)^2, which makes the residual fall with the scales (VAR's term, arXiv 2404.02905; ours here). In
training a batch is decoded from its first k scales, k at random, with the share `scale_drop`.

Origin: the paper has neither code nor weights. What its abstract does not say (sizes, scales, LFQ's bits, the losses' weights) is
a reconstruction, as are the blocks (pre-norm, MLP of four times the width). Proven: LFQ's golden case (of a well-known
re-implementation) and the properties of the scheme: order does not count, Z - f = Zhat, codes and indices, straight-through
gradients, scale-wise decoding; five shapes come back with an IoU of 0.94 to 0.97 (benchmarks/results/shapes.md). Not
proven: any published number.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides
from tersor.layers.lookup_free import LFQ
from tersor.models.registry import register

FREQUENCIES = 8  # of the positions' sines and cosines


@dataclass(frozen=True, kw_only=True)
class G3PTTokenizerConfig:
    num_latents: int = 3072  # L
    width: int = 768  # C
    num_heads: int = 12
    num_layers_encoder: int = 8
    num_layers_decoder: int = 16
    scales: tuple[int, ...] = (1, 4, 16, 64, 256, 576, 1024, 2304)  # n_s, ascending
    bits: int = 13  # d
    inv_temperature: float = 1.0  # tau of LFQ's entropy
    entropy_weight: float = 0.1
    commitment_weight: float = 0.25
    residual_weight: float = 1.0
    scale_drop: float = 0.1  # share of training batches that are decoded from a random number of scales

    def __post_init__(self) -> None:
        at_least("g3pt_tokenizer", 1, num_latents=self.num_latents, width=self.width)
        at_least(
            "g3pt_tokenizer", 0, num_layers_encoder=self.num_layers_encoder, num_layers_decoder=self.num_layers_decoder
        )
        divides("g3pt_tokenizer", "num_heads", self.num_heads, "width", self.width)
        check_scales("g3pt_tokenizer", self.scales)


def check_scales(model: str, scales: tuple[int, ...]) -> None:
    if not scales or scales[0] < 1 or list(scales) != sorted(set(scales)):
        raise TersorError(f"{model}'s scales are ascending numbers of tokens, such as (1, 4, 16), not {scales}")


class Attention(nn.Module):
    """x (B, N, C) to itself, or to a context (B, K, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q = rearrange(self.q(x), "b n (h e) -> b h n e", h=self.heads)
        k, v = rearrange(self.kv(x if context is None else context), "b n (s h e) -> s b h n e", s=2, h=self.heads)
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n e -> b n (h e)"))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SelfBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """x (B, N, C) looks at a set (B, K, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm_context, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.norm_context(context))
        return x + self.mlp(self.norm2(x))


class Querying(nn.Module):
    """A set (B, K, C) -> (B, count, C), whatever its order: `count` learned queries look at it."""

    def __init__(self, count: int, width: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(count, width))
        self.block = CrossBlock(width, heads)

    def forward(self, z: Tensor) -> Tensor:
        return self.block(self.queries.expand(z.shape[0], -1, -1), z)


@dataclass(frozen=True)
class Quantized:
    """What the scales made of Z (B, L, C)."""

    tokens: Tensor  # (B, sum n_s)
    total: Tensor  # Zhat (B, L, C) of the scales asked for
    residuals: tuple[Tensor, ...]  # f after each scale
    pooled: tuple[Tensor, ...]  # r of each scale, what was quantized


class CrossScaleQuantizer(nn.Module):
    def __init__(self, scales: tuple[int, ...], latents: int, width: int, heads: int, lfq: LFQ) -> None:
        super().__init__()
        self.scales, self.lfq = scales, lfq
        self.down = nn.ModuleList(Querying(count, width, heads) for count in scales)
        self.up = nn.ModuleList(Querying(latents, width, heads) for _ in scales)

    def forward(self, z: Tensor, scales: int | None = None) -> Quantized:
        """scales: how many of them Zhat sums; tokens and residuals are of all."""
        f, total = z, torch.zeros_like(z)
        tokens, residuals, pooled = [], [], []
        for index, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            pooled.append(down(f))
            values, indices = self.lfq(pooled[-1])
            h = up(values)
            f = f - h
            if scales is None or index < scales:
                total = total + h
            tokens.append(indices)
            residuals.append(f)
        return Quantized(torch.cat(tokens, 1), total, tuple(residuals), tuple(pooled))

    def contribution(self, scale: int, tokens: Tensor) -> Tensor:
        """h of the scale's tokens (B, n_s): (B, L, C)."""
        return self.up[scale](self.lfq.values(tokens))

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens (B, sum of the first n_s), for any number of whole scales, by scale."""
        count, ends = tokens.shape[1], list(accumulate(self.scales))
        if count not in ends:
            raise TersorError(f"tokens of whole scales come as {', '.join(map(str, ends))}, not as {count}")
        return torch.split(tokens, list(self.scales[: ends.index(count) + 1]), 1)


@register(
    "g3pt_tokenizer",
    task="encode-shape",
    input="points",
    paper="arXiv 2409.06322",
    variants={"g3pt_tokenizer": (322_317_326, {})},
    small={
        "num_latents": 8,
        "width": 16,
        "num_heads": 2,
        "num_layers_encoder": 1,
        "num_layers_decoder": 1,
        "scales": (1, 4, 8),
        "bits": 5,
    },
)
class G3PTTokenizer(nn.Module):
    """points (B, P, 6), query_points (B, Q, 3) -> logits (B, Q, 1), above 0 inside."""

    def __init__(self, config: G3PTTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        C, heads = config.width, config.num_heads
        embedded = 3 + 6 * FREQUENCIES
        self.point_in, self.query_in = nn.Linear(embedded + 3, C), nn.Linear(embedded, C)
        self.latents = Querying(config.num_latents, C, heads)
        self.encoder = nn.Sequential(*(SelfBlock(C, heads) for _ in range(config.num_layers_encoder)))
        lfq = LFQ(C, config.bits, inv_temperature=config.inv_temperature)
        self.quantizer = CrossScaleQuantizer(config.scales, config.num_latents, C, heads, lfq)
        self.decoder = nn.Sequential(*(SelfBlock(C, heads) for _ in range(config.num_layers_decoder)))
        self.look = CrossBlock(C, heads)
        self.norm_out, self.out = nn.LayerNorm(C), nn.Linear(C, 1)

    def forward(
        self, points: Tensor, query_points: Tensor, distances: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Logits; with the signed distances of the query points (B, Q), the losses instead."""
        if distances is not None:
            return self.losses(points, query_points, distances)
        return self.decode(self.quantizer(self.latent_set(points)).total, query_points)

    def latent_set(self, points: Tensor) -> Tensor:
        """Z (B, L, C)."""
        if points.dim() != 3 or points.shape[-1] != 6 or not points.shape[1]:
            raise TersorError(f"g3pt_tokenizer takes points with normals (batch, number, 6), not {list(points.shape)}")
        x = self.point_in(torch.cat((embed(points[..., :3]), points[..., 3:]), -1))
        return self.encoder(self.latents(x))

    def encode(self, points: Tensor) -> Tensor:
        """(B, sum n_s) tokens, the coarsest scale first."""
        return self.quantizer(self.latent_set(points)).tokens

    def features(self, tokens: Tensor, *, scales: int | None = None) -> Tensor:
        """Zhat (B, L, C) of tokens of whole scales, or of the first `scales` of them."""
        parts = self.quantizer.split(tokens)
        if scales is not None and not 1 <= scales <= len(parts):
            raise TersorError(f"the tokens have 1 to {len(parts)} scales, not {scales}")
        return torch.stack([self.quantizer.contribution(s, part) for s, part in enumerate(parts[:scales])]).sum(0)

    def decode(self, features: Tensor, query_points: Tensor, *, chunk: int = 50_000) -> Tensor:
        """features (B, L, C), query_points (B, Q, 3) -> logits (B, Q, 1); `chunk` changes memory only."""
        z = self.tokens(features)
        return torch.cat([self.distances(z, piece) for piece in torch.split(query_points, chunk, 1)], 1)

    def tokens(self, features: Tensor) -> Tensor:
        """The part of decoding that all query points share."""
        return self.decoder(features)

    def distances(self, tokens: Tensor, query_points: Tensor) -> Tensor:
        """Logits (B, Q, 1) at the points, of what `tokens` returned."""
        return self.out(self.norm_out(self.look(self.query_in(embed(query_points)), tokens)))

    def losses(self, points: Tensor, query_points: Tensor, distances: Tensor) -> dict[str, Tensor]:
        """distances (B, Q): signed, negative inside; only their sign counts. Scalars by name; "loss" is their weighted sum."""
        config, keep = self.config, None
        if self.training and float(torch.rand(())) < config.scale_drop:
            keep = int(torch.randint(1, len(config.scales) + 1, ()))
        z = self.latent_set(points)
        made = self.quantizer(z, keep)
        logits = self.decode(made.total, query_points)[..., 0]
        inside = (distances < 0).to(logits)
        terms = [
            self.quantizer.lfq.losses(r).total(entropy=config.entropy_weight, commitment=config.commitment_weight)
            for r in made.pooled
        ]
        occupancy, quantizer = F.binary_cross_entropy_with_logits(logits, inside), torch.stack(terms).mean()
        residual = made.residuals[-1].square().mean()
        loss = occupancy + quantizer + config.residual_weight * residual
        return {"loss": loss, "occupancy": occupancy, "quantizer": quantizer, "residual": residual}

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        normals = F.normalize(torch.randn(batch_size, 20, 3), dim=-1)
        return {
            "points": torch.cat((0.8 * normals, normals), -1),
            "query_points": 2 * torch.rand(batch_size, 20, 3) - 1,
        }


def embed(p: Tensor) -> Tensor:
    """(..., 3) -> (..., 51)."""
    angles = (p[..., None] * 2.0 ** torch.arange(FREQUENCIES, dtype=p.dtype, device=p.device)).flatten(-2)
    return torch.cat((p, angles.sin(), angles.cos()), -1)
