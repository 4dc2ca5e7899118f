"""LRGT, the long-range grouping transformer for multi-view 3-D reconstruction (Yang et al., ICCV 2023).

What it is for: voxels of an object from any number of pictures of it, whose camera poses nobody knows.

    model = tersor.models.load("lrgt", "LRGT.pth")                  # the official file with its three parts
    volume = model(views)                                           # views (B, V, 3, 224, 224) -> (B, 1, 32, 32, 32)
    occupied = volume > 0.4

    tersor predict lrgt chair/ --checkpoint LRGT.pth --out shapes   # a folder of pictures -> chair.npy (voxels), chair.obj (mesh)

The published weights want pictures as `tersor.data.views.view_of` prepares them: B, G, R from -1 to 1, light grey around the
object.

Encoder: DeiT-B over the 14 x 14 patches of each view, without class tokens. Some of its blocks attend across views, in
groups spread over the picture (LGA): with a side of s groups, patch (row, column) belongs to group (row mod s, column
mod s), so that each of s^2 groups holds (14 / s)^2 V tokens. A depthwise 3x3 convolution of v within each view (IFS)
joins before the output projection. One view alone works: then groups are within it.

Merger, twice: x [N, D] -> M tokens that stand for clusters

    score = w . LN(x) + b,   d = pairwise distances / sqrt(D)
    rho_i = exp(-mean of the K smallest d_ij^2)          density
    delta_i = min of d_ij over denser j, else max d      centres are the M largest rho delta; each token joins the nearest
    merged = mean of the cluster's x, weighted by e^score
    f = merged + softmax(q(merged) k(x)^T / sqrt(d) + score) v(x);    f + MLP(LN f)

Decoder: 64 learned queries read the merged tokens and are a grid of 4^3, which transposed convolutions bring to 8^3,
16^3 and 32^3, with two transformer blocks over at most 512 tokens at each size.

Training: `dice_loss`. Evaluation: `intersection_over_union` at the published thresholds.

Origin: LiyingCV/Long-Range-Grouping-Transformer at a09fc43, MIT. Quirks kept: every encoder block owns an IFS that only
grouped blocks use; class and distillation tokens are parameters without use; the decoder's own blocks never drop
attention weights; results of the last two groups of blocks are added to what their residuals already hold. Changed: the
published merger adds noise of up to `density_noise` to the densities in evaluation too; here only in training, and
otherwise the first of equally dense tokens counts as the denser, so that answers can be repeated.

Proven: the golden cases of the published code to 5e-6 (encoder, merger, loss and gradient), the published model's volume
to 2e-5, which is the rounding of its float32; the encoder is equivariant to the order of views; volumes do not depend
on the order of merged tokens. Not proven: IoU on ShapeNet (.7590 with 3 views published).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides, one_of
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.volumes import dice_loss as dice_loss
from tersor.layers.volumes import intersection_over_union as intersection_over_union
from tersor.models import key_maps
from tersor.models.registry import register

QUERIES = 4  # a side of the first grid of voxels


@dataclass(frozen=True, kw_only=True)
class LRGTConfig:
    in_chans: int = 3
    img_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768  # D of all three parts
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True  # of the encoder; merger and decoder have none
    lga_layer: tuple[int, ...] = (5, 7, 9, 11)  # encoder blocks that attend across views, counted from 0
    patch_group: int = 7  # s: groups a side of the grid
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    merge_tokens: tuple[int, ...] = (196, 196)  # M of each merger block
    merge_neighbours: int = 15  # K
    merge_heads: int = 12
    density_noise: float = 1e-6  # added in training, so that equal tokens are not all centres
    decoder_depth: int = 8  # blocks, a quarter at each size
    decoder_heads: int = 12
    decoder_channels: tuple[int, int, int] = (96, 12, 3)  # of the grids 8^3, 16^3 and 32^3
    decoder_attn_drop: float = 0.4  # of the queries' block
    decoder_drop: float = 0.0

    def __post_init__(self) -> None:
        D, heads = self.embed_dim, self.decoder_heads
        divides("lrgt", "patch_size", self.patch_size, "img_size", self.img_size)
        divides("lrgt", "patch_group", self.patch_group, "grid", self.grid)
        divides("lrgt", "num_heads", self.num_heads, "embed_dim", D)
        divides("lrgt", "merge_heads", self.merge_heads, "embed_dim", D)
        divides("lrgt", "4 sizes", 4, "decoder_depth", self.decoder_depth)
        if len(self.decoder_channels) != 3:
            raise TersorError(f"lrgt has three decoder_channels, for 8^3, 16^3 and 32^3; not {self.decoder_channels}")
        for width in self.decoder_widths:
            divides("lrgt", "decoder_heads", heads, "decoder width", width)
        at_least("lrgt", 1, depth=self.depth, merge_neighbours=self.merge_neighbours, merge_tokens=self.least)
        at_least("lrgt", 0, density_noise=self.density_noise)
        for block in self.lga_layer:
            one_of("lrgt", "lga_layer", block, range(self.depth))

    @property
    def grid(self) -> int:
        return self.img_size // self.patch_size

    @property
    def least(self) -> int:
        return min(self.merge_tokens, default=0)

    @property
    def decoder_widths(self) -> tuple[int, int, int, int]:
        """Of the tokens at each size: voxels one by one, then in patches of 2^3 and 4^3."""
        a, b, c = self.decoder_channels
        return (self.embed_dim, a, b * 2**3, c * 4**3)


class Attention(nn.Module):
    """x (B, M, D) reads context (B, N, D), itself by default; bias (B, N) is added to the logits of its tokens."""

    def __init__(
        self, D: int, heads: int, *, qkv_bias: bool = False, attn_drop: float = 0.0, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.attn_drop = heads, attn_drop
        self.to_q = nn.Linear(D, D, bias=qkv_bias)
        self.to_k = nn.Linear(D, D, bias=qkv_bias)
        self.to_v = nn.Linear(D, D, bias=qkv_bias)
        self.proj = nn.Linear(D, D)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        mixed = self.mix(self.to_q(x), self.to_k(context), self.to_v(context), bias)
        return self.proj_drop(self.proj(mixed))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (rearrange(each, "b n (h d) -> b h n d", h=self.heads) for each in (q, k, v))
        added = None if bias is None else bias[:, None, None, :]
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=added, dropout_p=self.attn_drop if self.training else 0.0
        )
        return rearrange(mixed, "b h n d -> b n (h d)")


class ViewAttention(Attention):
    """x (B V, N, D): within each view, or where `grouped` in dilated groups of all views, plus IFS."""

    def __init__(self, config: LRGTConfig, *, grouped: bool) -> None:
        D, attn_drop, drop = config.embed_dim, config.attn_drop_rate, config.drop_rate
        super().__init__(D, config.num_heads, qkv_bias=config.qkv_bias, attn_drop=attn_drop, drop=drop)
        self.grouped, self.side, self.groups = grouped, config.grid, config.patch_group
        self.IFS = nn.Conv2d(D, D, 3, padding=1, groups=D)

    def over_views(self, x: Tensor, views: int) -> Tensor:
        if not self.grouped:
            return self(x)
        t, s = self.side // self.groups, self.groups  # row = t1 s + s1: the group is the fast index
        spread, grouped = "(b v) (t1 s1 t2 s2) d", "(b s1 s2) (t1 t2 v) d"
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        sizes = {"v": views, "t1": t, "t2": t, "s1": s, "s2": s}
        mixed = self.mix(*(rearrange(each, f"{spread} -> {grouped}", **sizes) for each in (q, k, v)))
        signature = self.IFS(rearrange(v, "n (h w) d -> n d h w", h=self.side)).flatten(2).transpose(1, 2)
        return self.proj_drop(self.proj(rearrange(mixed, f"{grouped} -> {spread}", **sizes) + signature))


class Mlp(nn.Module):
    def __init__(self, D: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, hidden)
        self.fc2 = nn.Linear(hidden, D)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class EncoderBlock(nn.Module):
    def __init__(self, config: LRGTConfig, *, grouped: bool, drop_path: float) -> None:
        super().__init__()
        D = config.embed_dim
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = ViewAttention(config, grouped=grouped)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = Mlp(D, int(D * config.mlp_ratio), config.drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, views: int) -> Tensor:
        x = x + self.drop_path(self.attn.over_views(self.norm1(x), views))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """pictures (n, 3, H, W) -> tokens (n, N, D)."""

    def __init__(self, config: LRGTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.proj(pictures).flatten(2).transpose(1, 2)


class ViewTransformer(nn.Module):
    """views (B, V, 3, H, W) -> features (B, V, N, D)."""

    def __init__(self, config: LRGTConfig) -> None:
        super().__init__()
        D = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))  # this and the next: in checkpoints, never used
        self.dist_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + config.grid**2, D))
        self.patch_embed = PatchEmbed(config)
        (rates,) = linear_rates(config.drop_path_rate, (config.depth,))
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.blocks = nn.ModuleList(
            EncoderBlock(config, grouped=number in config.lga_layer, drop_path=rate)
            for number, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(D, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, views: Tensor) -> Tensor:
        V = views.shape[1]
        x = self.pos_drop(self.patch_embed(views.flatten(0, 1)) + self.pos_embed[:, 2:])  # (B V, N, D)
        for block in self.blocks:
            x = block(x, V)
        return rearrange(self.norm(x), "(b v) n d -> b v n d", v=V)


class Encoder(nn.Module):
    def __init__(self, config: LRGTConfig) -> None:
        super().__init__()
        self.encoder = ViewTransformer(config)

    def forward(self, views: Tensor) -> Tensor:
        return self.encoder(views)


@torch.no_grad()
def cluster(x: Tensor, centres: int, neighbours: int, *, noise: float = 0.0) -> Tensor:
    """x (B, N, D) -> (B, N): the cluster of each token, by density peaks over `neighbours` nearest tokens."""
    distance = torch.cdist(x, x) / math.sqrt(x.shape[-1])
    nearest = distance.topk(neighbours, dim=-1, largest=False).values  # with the token itself
    density = (-nearest.square().mean(-1)).exp()
    density = density + noise * torch.rand_like(density) if noise else density
    mine, others = density[:, :, None], density[:, None, :]
    earlier = torch.ones_like(distance[0], dtype=torch.bool).tril(-1)  # of equals the first is the denser
    denser = (others > mine) | ((others == mine) & earlier)
    farthest = distance.amax((1, 2), keepdim=True)
    separation = torch.where(denser, distance, farthest).amin(-1)
    chosen = (density * separation).topk(centres, dim=-1).indices  # (B, centres)
    to_centres = distance.gather(1, chosen[:, :, None].expand(-1, -1, x.shape[1]))  # (B, centres, N)
    numbers = torch.arange(centres, device=x.device).expand_as(chosen)
    return to_centres.argmin(1).scatter(1, chosen, numbers)  # a centre is its own, also beside an equal one


class MergerBlock(nn.Module):
    """x (B, N, D) -> (B, M, D)."""

    def __init__(self, config: LRGTConfig, tokens: int) -> None:
        super().__init__()
        D = config.embed_dim
        self.tokens, self.neighbours, self.noise = tokens, config.merge_neighbours, config.density_noise
        self.norm1 = nn.LayerNorm(D)
        self.score_mlp = nn.Linear(D, 1)
        self.attention_layer = Attention(D, config.merge_heads)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = Mlp(D, 4 * D)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        if max(self.tokens, self.neighbours) > N:
            raise TersorError(
                f"lrgt merges {N} tokens to {self.tokens} with {self.neighbours} neighbours; "
                "merge_tokens and merge_neighbours are at most the number of tokens, so give more views"
            )
        x = self.norm1(x)
        score = self.score_mlp(x)  # (B, N, 1)
        clusters = cluster(x, self.tokens, self.neighbours, noise=self.noise if self.training else 0.0)
        weight = score.exp()
        total = weight.new_zeros(B, self.tokens, 1).scatter_add(1, clusters[..., None], weight) + 1e-6
        share = weight / total.gather(1, clusters[..., None])
        merged = x.new_zeros(B, self.tokens, D).scatter_add(1, clusters[..., None].expand(-1, -1, D), share * x)
        merged = merged + self.attention_layer(merged, x, score.squeeze(-1))
        return merged + self.mlp(self.norm2(merged))


class Merger(nn.Module):
    """features (B, V, N, D) -> merged (B, M, D)."""

    def __init__(self, config: LRGTConfig) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(MergerBlock(config, tokens) for tokens in config.merge_tokens))

    def forward(self, features: Tensor) -> Tensor:
        return self.blocks(features.flatten(1, 2))


class QueryBlock(nn.Module):
    def __init__(self, config: LRGTConfig) -> None:
        super().__init__()
        D, heads = config.embed_dim, config.decoder_heads
        attn_drop, drop = config.decoder_attn_drop, config.decoder_drop
        self.norm1 = nn.LayerNorm(D)
        self.attn1 = Attention(D, heads, attn_drop=attn_drop, drop=drop)
        self.norm2 = nn.LayerNorm(D)
        self.attn2 = Attention(D, heads, attn_drop=attn_drop, drop=drop)
        self.norm3 = nn.LayerNorm(D)
        self.mlp = Mlp(D, 4 * D, config.decoder_drop)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.mlp(self.norm3(x))


class Queries(nn.Module):
    """context (B, M, D) -> what 4^3 learned queries read in it (B, 64, D)."""

    def __init__(self, config: LRGTConfig) -> None:
        super().__init__()
        self.emb = nn.Embedding(QUERIES**3, config.embed_dim)
        self.blocks = nn.ModuleList([QueryBlock(config)])

    def forward(self, context: Tensor) -> Tensor:
        x = self.emb.weight.expand(context.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, context)
        return x


class VoxelBlock(nn.Module):
    def __init__(self, D: int, heads: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(D)
        self.attn = Attention(D, heads, drop=drop)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = Mlp(D, 4 * D, drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def doubling(d_in: int, d_out: int) -> nn.Sequential:
    """(B, d_in, n, n, n) -> (B, d_out, 2n, 2n, 2n)."""
    return nn.Sequential(
        nn.ConvTranspose3d(d_in, d_out, 4, stride=2, padding=1, bias=False), nn.BatchNorm3d(d_out), nn.ReLU()
    )


class VoxelTransformer(nn.Module):
    """tokens (B, 64, D) -> volume (B, 1, 32, 32, 32) in 0..1."""

    def __init__(self, config: LRGTConfig) -> None:
        super().__init__()
        a, b, c = config.decoder_channels

        def blocks(D: int) -> nn.Sequential:
            depth, heads, drop = config.decoder_depth // 4, config.decoder_heads, config.decoder_drop
            return nn.Sequential(*(VoxelBlock(D, heads, drop) for _ in range(depth)))

        self.blocks1, self.blocks2, self.blocks3, self.blocks4 = (blocks(width) for width in config.decoder_widths)
        self.upconv1 = doubling(config.embed_dim, a)
        self.upconv2 = doubling(a, b)
        self.upconv3 = doubling(b, c)
        self.upconv4 = nn.Sequential(nn.ConvTranspose3d(c, 1, 1, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.upconv1(_as_grid(self.blocks1(x), QUERIES))  # (B, a, 8, 8, 8)
        x = self.upconv2(_as_grid(self.blocks2(x.flatten(2).transpose(1, 2)), 2 * QUERIES))  # (B, b, 16, 16, 16)
        x = self.upconv3(x + _over_patches(self.blocks3, x, 2))  # (B, c, 32, 32, 32)
        return self.upconv4(x + _over_patches(self.blocks4, x, 4))


def _as_grid(tokens: Tensor, side: int) -> Tensor:
    return rearrange(tokens, "b (h w l) d -> b d h w l", h=side, w=side)


def _over_patches(blocks: nn.Module, x: Tensor, p: int) -> Tensor:
    """The blocks' result on patches of p^3 voxels as tokens, x (B, C, n, n, n) -> the same."""
    voxels, tokens = "b c (h i) (w j) (l k)", "b (h w l) (c i j k)"
    sizes = {"i": p, "j": p, "k": p, "h": x.shape[2] // p, "w": x.shape[3] // p}
    return rearrange(blocks(rearrange(x, f"{voxels} -> {tokens}", **sizes)), f"{tokens} -> {voxels}", **sizes)


class Decoder(nn.Module):
    """merged (B, M, D) -> volume (B, 1, 32, 32, 32)."""

    def __init__(self, config: LRGTConfig) -> None:
        super().__init__()
        self.prepare = Queries(config)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.transformer_decoder = VoxelTransformer(config)

    def forward(self, merged: Tensor) -> Tensor:
        return self.transformer_decoder(self.layer_norm(self.prepare(merged)))


@register(
    "lrgt",
    task="reconstruct-3d",
    input="views",
    paper="arXiv 2308.08724",
    variants={"lrgt": (129_863_651, {})},
    small={
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "lga_layer": (1,),
        "patch_group": 4,
        "merge_tokens": (48, 32),
        "merge_neighbours": 5,
        "merge_heads": 2,
        "decoder_depth": 4,
        "decoder_heads": 2,
        "decoder_channels": (16, 4, 1),
    },
)
class LRGT(nn.Module):
    """views (B, V, 3, H, W), any V -> volume (B, 1, 32, 32, 32): how likely each voxel is occupied."""

    def __init__(self, config: LRGTConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.merger = Merger(config)
        self.decoder = Decoder(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, views: Tensor) -> Tensor:
        """The encoder's tokens (B, V, N, D)."""
        c = self.config
        if views.dim() != 5 or tuple(views.shape[2:]) != (c.in_chans, c.img_size, c.img_size):
            raise TersorError(
                f"this lrgt takes views (batch, views, {c.in_chans}, {c.img_size}, {c.img_size}), not "
                f"{list(views.shape)}; for others create it with that img_size"
            )
        return self.encoder(views)

    def forward(self, views: Tensor) -> Tensor:
        return self.decoder(self.merger(self.features(views)))

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        c = self.config
        return {"views": torch.randn(batch_size, 2, c.in_chans, c.img_size, c.img_size)}

    def load_deit(self, state: dict[str, Tensor]) -> None:
        """Start the encoder from a distilled DeiT (timm's or the official file's tensors); IFS stays as it is."""
        state = key_maps.drop(state, r"^head(_dist)?\.")
        names = (r"\1.to_q.\2", r"\1.to_k.\2", r"\1.to_v.\2")
        state = key_maps.split(state, r"(.*)\.qkv\.(weight|bias)$", names)
        missing, left_over = self.encoder.encoder.load_state_dict(state, strict=False)
        absent = [key for key in missing if ".IFS." not in key]
        if absent or left_over:
            raise TersorError(f"this is no distilled DeiT of lrgt's size: {', '.join([*absent, *left_over][:4])}")
