"""TripoSG's shape VAE (Li et al. 2025, arXiv 2502.06608): a surface as a set of latent tokens, a signed distance out of them.

What it is for: shapes in a form that a flow model learns (`triposg`), and their compression: any closed surface becomes M tokens
of 64 numbers, from which the signed distance at any point is read.

    model = tersor.models.create("triposg_vae", width_encoder=64, width_decoder=64, num_layers_decoder=2, num_tokens=16)
    posterior = model.encode(torch.rand(1, 100, 6))                     # points with normals -> mean, logvar (1, 16, 64)
    distances = model.decode(posterior.mean, torch.rand(1, 500, 3))     # (1, 500, 1), negative inside

Meshes to points and back: tersor.data.shapes. Training: `tersor train triposg_vae --data FOLDER` (closed meshes).

points (B, P, 3 + F) positions and F features (normals), in a box of about +-1. With e(p) = [p, sin(2^k p), cos(2^k p)], k < 8, of
3 + 48 numbers:

    x = W_in [e(p) | features]                  all P points; queries z: those of M of them
    z = z + A(LN(z), LN(x)),  z = z + MLP(z)    then blocks of z = z + A(LN(z)), z = z + MLP(LN(z)); widths 512
    mean, logvar = W LN(z)                      logvar in [-30, 20]
    z = W mean or W (mean + std * noise)        then blocks as above, width 1024, once for all distances
    s(p) = -W LN(MLP'(q + A(LN(q), LN(z))))     q = W e(p); distances of different p do not meet: chunks are exact

The M points are the farthest from one another in turn (from the first point on) among 4M that are drawn: at random in
training, in evaluation evenly through the cloud, whose rows come in random order; so the same cloud gives the same tokens
(as published, it is random there too). Fewer than 4M points: all take part.

`decode(..., fast=True)`, approximate: each head of the last attention keeps a third of the tokens (1024 of 3072, 256 of
512), those with the largest mean product with every 100th query, as in FlashVDM.

Losses (`losses`): mean |s - s'| + (s - s')^2; 10 x (1 - cosine of gradient and normal) on the surface; 0.1 x (|gradient| - 1)^2;
0.001 x KL to a standard normal, mean over the numbers. The weights are read from the paper, not checked against its code.
Gradients in space are exact, or central differences with `interval`.

Heads are cut from joined q, k, v as in `triposg`. Origin: VAST-AI-Research/TripoSG at fc5c409, MIT, parts derived from
Tencent HunyuanDiT and FlashVDM (see its NOTICE); written anew. Its `vae/` folder loads without a key map.

Proven: the golden cases (tiny and published size), the parameter count, gradients against differences, chunks equal to the whole.
Not proven: the published training and its weights of the losses (a small one of 4,343 steps, with the normals' weight at 0.1
instead of 10, gives an IoU of 0.69 to 0.91 on the shapes it learned from, benchmarks/results/shapes.md), the official file's
reconstructions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides, one_of
from tersor.models.registry import register

POOL = 4  # so many points for each token are drawn, before the farthest are taken
KEPT = {3072: 1024, 512: 256}  # tokens that the fast decoder keeps; of other numbers a third


@dataclass(frozen=True, kw_only=True)
class TripoSGVAEConfig:
    in_channels: int = 3  # F, features of a point beside its position
    latent_channels: int = 64
    num_attention_heads: int = 8
    width_encoder: int = 512
    width_decoder: int = 1024
    num_layers_encoder: int = 8
    num_layers_decoder: int = 16
    embedding_type: str = "frequency"  # the only one published
    embed_frequency: int = 8  # k < 8
    embed_include_pi: bool = False  # 2^k pi instead of 2^k
    num_tokens: int = 2048  # M

    def __post_init__(self) -> None:
        one_of("triposg_vae", "embedding_type", self.embedding_type, ("frequency",))
        at_least("triposg_vae", 0, in_channels=self.in_channels, embed_frequency=self.embed_frequency)
        at_least(
            "triposg_vae", 0, num_layers_encoder=self.num_layers_encoder, num_layers_decoder=self.num_layers_decoder
        )
        at_least("triposg_vae", 1, latent_channels=self.latent_channels, num_tokens=self.num_tokens)
        for name in ("width_encoder", "width_decoder"):
            divides("triposg_vae", "num_attention_heads", self.num_attention_heads, name, getattr(self, name))

    @property
    def embedded(self) -> int:
        return 3 + 6 * self.embed_frequency


@dataclass(frozen=True)
class Posterior:
    """Each (B, M, C)."""

    mean: Tensor
    logvar: Tensor

    def sample(self) -> Tensor:
        return self.mean + (0.5 * self.logvar).exp() * torch.randn_like(self.mean)

    def kl(self) -> Tensor:
        """(B,), nats a number, from a standard normal."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).mean(1)


class Attention(nn.Module):
    """z (B, N, W) to itself, or to a context (B, K, D) of its own norm."""

    def __init__(self, width: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads, keys = heads, width if context_dim is None else context_dim
        if context_dim is not None:
            self.norm_cross = nn.LayerNorm(context_dim)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(keys, width, bias=False)
        self.to_v = nn.Linear(keys, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, z: Tensor, context: Tensor | None = None, keep: int | None = None) -> Tensor:
        """keep: so many of the context's tokens, for each head those that the queries look at most."""
        if context is None:
            joined = torch.cat((self.to_q(z), self.to_k(z), self.to_v(z)), -1)
            q, k, v = rearrange(joined, "b n (h c) -> b h n c", h=self.heads).chunk(3, -1)
        else:
            context = self.norm_cross(context)
            q = rearrange(self.to_q(z), "b n (h c) -> b h n c", h=self.heads)
            joined = torch.cat((self.to_k(context), self.to_v(context)), -1)
            k, v = rearrange(joined, "b n (h c) -> b h n c", h=self.heads).chunk(2, -1)
        if keep is not None:
            score = (q[:, :, ::100] @ k.mT).mean(2)  # (B, h, K)
            chosen = score.topk(keep, -1).indices[..., None].expand(-1, -1, -1, k.shape[-1])
            k, v = k.gather(2, chosen), v.gather(2, chosen)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](rearrange(mixed, "b h n c -> b n (h c)"))


class GELUProjection(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, z: Tensor) -> Tensor:
        return F.gelu(self.proj(z))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GELUProjection(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)


class SelfBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, heads)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.attn1(self.norm1(z))
        return z + self.ff(self.norm3(z))


class CrossBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, heads, width)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, z: Tensor, context: Tensor, keep: int | None = None) -> Tensor:
        z = z + self.attn2(self.norm2(z), context, keep)
        return z + self.ff(self.norm3(z))


class Encoder(nn.Module):
    def __init__(self, config: TripoSGVAEConfig) -> None:
        super().__init__()
        w, heads = config.width_encoder, config.num_attention_heads
        self.proj_in = nn.Linear(config.embedded + config.in_channels, w)
        layers = (SelfBlock(w, heads) for _ in range(config.num_layers_encoder))
        self.blocks = nn.ModuleList([CrossBlock(w, heads), *layers])
        self.norm_out = nn.LayerNorm(w)

    def forward(self, points: Tensor, queries: Tensor) -> Tensor:
        z = self.blocks[0](self.proj_in(queries), self.proj_in(points))
        for block in self.blocks[1:]:
            z = block(z)
        return self.norm_out(z)


class Decoder(nn.Module):
    def __init__(self, config: TripoSGVAEConfig) -> None:
        super().__init__()
        w, heads = config.width_decoder, config.num_attention_heads
        layers = (SelfBlock(w, heads) for _ in range(config.num_layers_decoder))
        self.blocks = nn.ModuleList([*layers, CrossBlock(w, heads)])
        self.proj_query = nn.Linear(config.embedded, w)
        self.norm_out, self.proj_out = nn.LayerNorm(w), nn.Linear(w, 1)

    def tokens(self, z: Tensor) -> Tensor:
        for block in self.blocks[:-1]:
            z = block(z)
        return z

    def forward(self, z: Tensor, embedded: Tensor, keep: int | None = None) -> Tensor:
        """z: what `tokens` returns."""
        return -self.proj_out(self.norm_out(self.blocks[-1](self.proj_query(embedded), z, keep)))


@register(
    "triposg_vae",
    task="encode-shape",
    input="points",
    paper="arXiv 2502.06608",
    variants={"triposg_vae": (242_662_017, {})},
    small={
        "latent_channels": 6,
        "num_attention_heads": 2,
        "width_encoder": 32,
        "width_decoder": 48,
        "num_layers_encoder": 1,
        "num_layers_decoder": 1,
        "num_tokens": 8,
    },
)
class TripoSGVAE(nn.Module):
    """points (B, P, 3 + F), query_points (B, Q, 3) -> signed distances (B, Q, 1)."""

    def __init__(self, config: TripoSGVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant = nn.Linear(config.width_encoder, 2 * config.latent_channels)
        self.post_quant = nn.Linear(config.latent_channels, config.width_decoder)

    def forward(
        self, points: Tensor, query_points: Tensor, distances: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """By the posterior's mean; in training by a sample of it. With distances (B, Q), the losses instead."""
        if distances is not None:
            return self.losses(points, query_points, distances)
        posterior = self.encode(points)
        return self.decode(posterior.sample() if self.training else posterior.mean, query_points)

    def encode(self, points: Tensor, *, rows: Tensor | None = None) -> Posterior:
        """rows (B, M): the points that become tokens, instead of those that are farthest from one another."""
        wanted = 3 + self.config.in_channels
        if points.dim() != 3 or points.shape[-1] != wanted or not points.shape[1]:
            raise TersorError(
                f"this triposg_vae takes points (batch, number, {wanted}), positions and {self.config.in_channels} "
                f"features, not {list(points.shape)}"
            )
        if rows is None:
            rows = self.choose(points[..., :3])
        x = torch.cat((self.embed(points[..., :3]), points[..., 3:]), -1)
        queries = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
        mean, logvar = self.quant(self.encoder(x, queries)).chunk(2, -1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def choose(self, positions: Tensor) -> Tensor:
        """(B, M) rows of positions (B, P, 3)."""
        P, M = positions.shape[1], self.config.num_tokens
        if P < M:
            raise TersorError(f"this triposg_vae makes {M} tokens of at least as many points, not of {P}")
        if P <= POOL * M:
            pool = torch.arange(P, device=positions.device)
        elif self.training:
            pool = torch.randperm(P, device=positions.device)[: POOL * M]
        else:
            pool = torch.arange(POOL * M, device=positions.device) * P // (POOL * M)
        return pool[farthest_points(positions[:, pool], M)]

    def decode(self, latents: Tensor, query_points: Tensor, *, fast: bool = False, chunk: int = 50_000) -> Tensor:
        """latents (B, M, C), query_points (B, Q, 3) -> (B, Q, 1). `fast` is approximate, `chunk` changes memory only (where not
        fast)."""
        z = self.tokens(latents)
        K = z.shape[1]
        keep = KEPT.get(K, max(K // 3, 1)) if fast else None
        pieces = torch.split(query_points, chunk, 1)
        return torch.cat([self.decoder(z, self.embed(piece), keep) for piece in pieces], 1)

    def tokens(self, latents: Tensor) -> Tensor:
        """(B, M, W): the part of decoding that all distances share; `distances` takes it."""
        if latents.dim() != 3 or latents.shape[-1] != self.config.latent_channels:
            raise TersorError(
                f"this triposg_vae decodes latents (batch, tokens, {self.config.latent_channels}), not {list(latents.shape)}"
            )
        return self.decoder.tokens(self.post_quant(latents))

    def distances(self, tokens: Tensor, query_points: Tensor) -> Tensor:
        return self.decoder(tokens, self.embed(query_points))

    def embed(self, p: Tensor) -> Tensor:
        """(..., 3) -> (..., 51): of x with all k, then y, then z."""
        rates = 2.0 ** torch.arange(self.config.embed_frequency, dtype=p.dtype, device=p.device)
        if self.config.embed_include_pi:
            rates = rates * torch.pi
        angles = (p[..., None] * rates).flatten(-2)
        return torch.cat((p, angles.sin(), angles.cos()), -1)

    def losses(
        self,
        points: Tensor,
        query_points: Tensor,
        distances: Tensor,
        *,
        surface: int = 256,
        normal_weight: float = 10.0,
        eikonal_weight: float = 0.1,
        kl_weight: float = 0.001,
        interval: float | None = None,
        rows: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """points (B, P, 6) with unit normals, query_points (B, Q, 3), their signed distances (B, Q), negative inside.

        Scalars by name; "loss" is their weighted sum. The gradient is taken at the query points and at the first `surface` of
        the points, where it should be the normal; exactly, or by central differences over 2 `interval`. rows: as in `encode`.
        """
        if self.config.in_channels < 3 or points.shape[-1] < 6:
            raise TersorError(f"the normal loss needs points with normals (batch, number, 6), not {list(points.shape)}")
        posterior = self.encode(points, rows=rows)
        tokens = self.tokens(posterior.sample() if self.training else posterior.mean)
        near, normals = points[:, :surface, :3], points[:, :surface, 3:6]
        s, gradient = self.with_gradient(tokens, torch.cat((query_points, near), 1), interval=interval)
        wanted = torch.cat((distances, distances.new_zeros(near.shape[:2])), 1)
        error = s[..., 0] - wanted
        distance = (error.abs() + error.square()).mean()
        normal = (1 - F.cosine_similarity(gradient[:, query_points.shape[1] :], normals, dim=-1)).mean()
        eikonal = (gradient.norm(dim=-1) - 1).square().mean()
        kl = posterior.kl().mean()
        loss = distance + normal_weight * normal + eikonal_weight * eikonal + kl_weight * kl
        return {"loss": loss, "distance": distance, "normal": normal, "eikonal": eikonal, "kl": kl}

    def with_gradient(self, tokens: Tensor, p: Tensor, *, interval: float | None = None) -> tuple[Tensor, Tensor]:
        """Distances (B, Q, 1) at p (B, Q, 3) and their gradient (B, Q, 3) in space; both can be differentiated again."""
        if interval is not None:
            offsets = interval * torch.eye(3, dtype=p.dtype, device=p.device)
            moved = torch.stack([p + sign * offset for offset in offsets for sign in (1, -1)], 1)  # (B, 6, Q, 3)
            all_points = torch.cat((p[:, None], moved), 1).flatten(1, 2)
            s = rearrange(self.distances(tokens, all_points), "b (m q) 1 -> b m q 1", m=7)
            above, below = s[:, 1::2, :, 0], s[:, 2::2, :, 0]  # (B, 3, Q)
            return s[:, 0], ((above - below) / (2 * interval)).mT
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
            p = p.detach().requires_grad_()
            s = self.distances(tokens, p)
            (gradient,) = torch.autograd.grad(s.sum(), p, create_graph=True)
        return s, gradient

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        config = self.config
        points = 2 * torch.rand(batch_size, 2 * config.num_tokens, 3) - 1
        features = F.normalize(torch.randn(batch_size, 2 * config.num_tokens, config.in_channels), dim=-1)
        return {"points": torch.cat((points, features), -1), "query_points": 2 * torch.rand(batch_size, 20, 3) - 1}


def farthest_points(positions: Tensor, count: int) -> Tensor:
    """(B, count) rows of positions (B, P, 3): the first, then each time the one farthest from all taken so far."""
    rows = torch.arange(len(positions), device=positions.device)
    taken = torch.zeros_like(rows)
    chosen = [taken]
    nearest = torch.full(positions.shape[:2], torch.inf, dtype=positions.dtype, device=positions.device)
    for _ in range(count - 1):
        apart = (positions - positions[rows, taken][:, None]).square().sum(-1)
        nearest = torch.minimum(nearest, apart)
        taken = nearest.argmax(1)
        chosen.append(taken)
    return torch.stack(chosen, 1)
