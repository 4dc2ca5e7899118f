"""RGT, the Recursive Generalization Transformer for super-resolution (Chen et al., ICLR 2024, arXiv 2303.06373).

What it is for: a picture of 2, 3 or 4 times the size. Attention in windows alternates with attention of every pixel to a
handful of tokens that stand for the whole picture, so that the cost stays linear in its size.

    model = tersor.models.load("rgt_s_x4", "RGT_S_x4.pth")           # official checkpoint
    large = model(image)                                             # image (B, 3, H, W) in [0, 1], H and W at least 16

f0 = conv(image - mean); groups of blocks on tokens x [B, H W, C], each with a convolution and a skip around it; then
f0 + conv(LN x), and convolutions with pixel shuffles to the large picture. Block b:

    y = x + A(LN x);   y = y + W2 (h1 * DW3x3(LN h2)), [h1, h2] = GELU(W1 LN y);   output = y + gamma * x

    A, even b (L-SA):  half of the channels and heads in windows s0 x s1, half in s1 x s0, zero-padded behind to multiples
        of max(s0, s1); softmax(q k^T / sqrt(d) + bias(dy, dx)) v, the bias from a small MLP of the offset;
        + DW3x3(v), then Wo. Every second such block rolls its windows by half, masked as in Swin
    A, odd b (RG-SA):  R = GELU(LN(W' DW3x3(reduce^T(x)))), reduce a depthwise 4x4 of stride 4, the same T times
        softmax(q(x) k(R)^T / sqrt(C c_ratio / n)) (v(R) + DW3x3 v(R)), then Wo

Origin: zhengchen1999/RGT at 01b4379 (basicsr/archs/rgt_arch.py), Apache-2.0. Key names are theirs; stored masks and
offset tables are dropped, for they follow from the configuration. T depends on the size and on the mode: in eval mode
log4 of the longer side over 16, at least 2, in training log4 of it over 4. Rows and columns that do not fill a 4x4 patch
do not reach R. The class's defaults are not those of the published models.

Proven: the golden cases of the published code (shifts in both parities, padding, x3 with "3conv", RGT-S x4), parameter
counts. With `tersor predict`, RGT x4 enlarges a photo of 4000 x 3000 pixels in 276 s on an H200, with 2.6 GB of memory on the
host and 1.8 GB on the GPU (benchmarks/results/super_resolution_memory.md). Not proven: PSNR (Urban100 x4: 27.89 for S, 27.98
published); counts at x2 and x3 are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers import windows
from tersor.layers.checks import divides, one_of, same_length
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.patch_embed import check_image
from tersor.models import key_maps
from tersor.models.registry import register

MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's red, green and blue
UPSAMPLE_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class RGTConfig:
    upscale: int = 2  # a power of 2, or 3
    in_chans: int = 3
    embed_dim: int = 180  # C
    depth: tuple[int, ...] = (2, 2, 2, 2)  # blocks of each group
    num_heads: tuple[int, ...] = (2, 2, 2, 2)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None  # in place of 1 / sqrt(d)
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.1  # of the last block; earlier ones linearly less
    img_range: float = 1.0
    resi_connection: str = "1conv"  # or "3conv": a bottleneck at the end of each group
    split_size: tuple[int, int] = (8, 8)  # s0, s1
    c_ratio: float = 0.5  # width of R over C

    def __post_init__(self) -> None:
        same_length("rgt", depth=self.depth, num_heads=self.num_heads)
        one_of("rgt", "resi_connection", self.resi_connection, ("1conv", "3conv"))
        if self.upscale != 3 and (self.upscale < 1 or self.upscale & (self.upscale - 1)):
            raise TersorError(f"rgt's upscale is a power of 2, or 3, not {self.upscale}")
        if self.embed_dim < 32:
            raise TersorError(f"rgt's embed_dim is at least 32 (the offsets' MLP has 1/32 of it), not {self.embed_dim}")
        if len(self.split_size) != 2 or min(self.split_size) < 1 or max(self.split_size) % min(self.split_size):
            raise TersorError(f"rgt's split_size is two sides, one a multiple of the other, not {self.split_size}")
        for heads in self.num_heads:
            divides("rgt", "half of the heads, 2", 2, "num_heads", heads)
            divides("rgt", "num_heads", heads, "embed_dim", self.embed_dim)
            divides("rgt", "num_heads", heads, "c_ratio embed_dim", int(self.embed_dim * self.c_ratio))


class OffsetBias(nn.Module):
    """An MLP from the offset between query and key to a bias for each head: (heads, tokens, tokens) of a window."""

    offsets: Tensor
    index: Tensor

    def __init__(self, d: int, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        hidden = d // 4 // 4
        self.pos_proj = nn.Linear(2, hidden)
        self.pos1 = nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.pos2 = nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.pos3 = nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, heads))
        offsets, index = offset_table(window)
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Tensor:
        table = self.pos3(self.pos2(self.pos1(self.pos_proj(self.offsets.to(self.pos_proj.weight.dtype)))))
        return table[self.index].permute(2, 0, 1)


class WindowAttention(nn.Module):
    """One half of the channels: q, k, v (B, H, W, C/2), sides multiples of the window's -> the same shape."""

    def __init__(self, d: int, heads: int, window: tuple[int, int], config: RGTConfig) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.scale = config.qk_scale or (d // heads) ** -0.5
        self.pos = OffsetBias(d, heads, window)
        self.drop = config.attn_drop_rate

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, shifted: bool) -> Tensor:
        batch, grid = q.shape[0], q.shape[1:3]
        shift = [side // 2 if shifted else 0 for side in self.window]
        q, k, v = (self._cut(each, shift) for each in (q, k, v))  # (B windows, heads, tokens, d)
        bias = self.pos()[None]  # (1, heads, tokens, tokens)
        if shifted:
            mask = windows.shift_mask(grid, self.window, shift, device=q.device).to(bias)  # (windows, tokens, tokens)
            bias = (bias + mask[:, None]).expand(batch, -1, -1, -1, -1).flatten(0, 1)  # no copy of one picture's
        drop = self.drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=self.scale)
        y = rearrange(y, "w h n d -> w n (h d)")
        return torch.roll(windows.merge(y, self.window, grid), shift, (1, 2))

    def _cut(self, x: Tensor, shift: list[int]) -> Tensor:
        x = windows.partition(torch.roll(x, [-each for each in shift], (1, 2)), self.window)
        return rearrange(x, "w n (h d) -> w h n d", h=self.heads)


class LocalAttention(nn.Module):
    """L-SA of the module docstring, x (B, H, W, C)."""

    def __init__(self, heads: int, config: RGTConfig, *, shifted: bool) -> None:
        super().__init__()
        d, (s0, s1) = config.embed_dim, config.split_size
        self.shifted, self.multiple = shifted, max(s0, s1)
        self.qkv = nn.Linear(d, 3 * d, bias=config.qkv_bias)
        self.proj = nn.Linear(d, d)
        self.drop = nn.Dropout(config.drop_rate)
        halves = ((s0, s1), (s1, s0))
        self.attns = nn.ModuleList(WindowAttention(d // 2, heads // 2, window, config) for window in halves)
        self.get_v = nn.Conv2d(d, d, 3, padding=1, groups=d)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        qkv = self.qkv(x)
        padded = windows.pad_to(qkv, (self.multiple, self.multiple))
        halves = zip(*(each.chunk(2, -1) for each in padded.chunk(3, -1)), strict=True)
        parts = [attn(*half, shifted=self.shifted) for attn, half in zip(self.attns, halves, strict=True)]
        y = torch.cat(parts, -1)[:, :height, :width]
        y = y + on_map(self.get_v, qkv.chunk(3, -1)[2])
        return self.drop(self.proj(y))


class GlobalAttention(nn.Module):
    """RG-SA of the module docstring, x (B, H, W, C)."""

    def __init__(self, heads: int, config: RGTConfig) -> None:
        super().__init__()
        d, reduced = config.embed_dim, int(config.embed_dim * config.c_ratio)
        self.heads = heads
        self.scale = config.qk_scale or (d // heads * config.c_ratio) ** -0.5
        self.reduction1 = nn.Conv2d(d, d, 4, 4, groups=d)
        self.dwconv = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.conv = nn.Conv2d(d, reduced, 1)
        self.norm_act = nn.Sequential(nn.LayerNorm(reduced), nn.GELU())
        self.q = nn.Linear(d, reduced, bias=config.qkv_bias)
        self.k = nn.Linear(reduced, reduced, bias=config.qkv_bias)
        self.v = nn.Linear(reduced, d, bias=config.qkv_bias)
        self.cpe = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.proj = nn.Linear(d, d)
        self.attn_drop, self.drop = nn.Dropout(config.attn_drop_rate), nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        r = x.permute(0, 3, 1, 2)
        for _ in range(recursions(height, width, training=self.training)):
            r = self.reduction1(r)
        r = self.norm_act(self.conv(self.dwconv(r)).permute(0, 2, 3, 1))  # (B, H / 4^T, W / 4^T, c')
        v = self.v(r)
        v = v + on_map(self.cpe, v)
        q, k, v = (rearrange(each, "b y x (h d) -> b h (y x) d", h=self.heads) for each in (self.q(x), self.k(r), v))
        weights = self.attn_drop((q * self.scale @ k.transpose(-1, -2)).softmax(-1))
        return self.drop(self.proj(rearrange(weights @ v, "b h (y x) d -> b y x (h d)", y=height)))


class SpatialGate(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.conv = nn.Conv2d(d, d, 3, padding=1, groups=d)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        return x1 * on_map(self.conv, self.norm(x2))


class Mlp(nn.Module):
    def __init__(self, d: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.sg = SpatialGate(hidden // 2)
        self.fc2 = nn.Linear(hidden // 2, d)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.gelu(self.fc1(x)))
        return self.drop(self.fc2(self.drop(self.sg(x))))


class Block(nn.Module):
    def __init__(self, group: int, index: int, config: RGTConfig, drop_path: float) -> None:
        super().__init__()
        d, heads = config.embed_dim, config.num_heads[group]
        shifted = index % 4 == (2 if group % 2 == 0 else 0)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        local = index % 2 == 0
        self.attn = LocalAttention(heads, config, shifted=shifted) if local else GlobalAttention(heads, config)
        self.mlp = Mlp(d, int(d * config.mlp_ratio), config.drop_rate)
        self.gamma = nn.Parameter(torch.full((d,), 1e-4))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.drop_path(self.attn(self.norm1(x)))
        y = y + self.drop_path(self.mlp(self.norm2(y)))
        return y + self.gamma * x


class Group(nn.Module):
    def __init__(self, index: int, config: RGTConfig, rates: list[float]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(index, b, config, rate) for b, rate in enumerate(rates)))
        self.conv = residual_conv(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + on_map(self.conv, self.blocks(x))


@register(
    "rgt",
    task="restore",
    input="image",
    paper="arXiv 2303.06373",
    variants={
        "rgt_s_x2": (
            10_051_055,
            {
                "upscale": 2,
                "depth": (6, 6, 6, 6, 6, 6),
                "num_heads": (6, 6, 6, 6, 6, 6),
                "mlp_ratio": 2.0,
                "split_size": (8, 32),
            },
        ),
        "rgt_s_x3": (
            10_235_695,
            {
                "upscale": 3,
                "depth": (6, 6, 6, 6, 6, 6),
                "num_heads": (6, 6, 6, 6, 6, 6),
                "mlp_ratio": 2.0,
                "split_size": (8, 32),
            },
        ),
        "rgt_s_x4": (
            10_198_767,
            {
                "upscale": 4,
                "depth": (6, 6, 6, 6, 6, 6),
                "num_heads": (6, 6, 6, 6, 6, 6),
                "mlp_ratio": 2.0,
                "split_size": (8, 32),
            },
        ),
        "rgt_x2": (
            13_217_831,
            {
                "upscale": 2,
                "depth": (6, 6, 6, 6, 6, 6, 6, 6),
                "num_heads": (6, 6, 6, 6, 6, 6, 6, 6),
                "mlp_ratio": 2.0,
                "split_size": (8, 32),
            },
        ),
        "rgt_x3": (
            13_402_471,
            {
                "upscale": 3,
                "depth": (6, 6, 6, 6, 6, 6, 6, 6),
                "num_heads": (6, 6, 6, 6, 6, 6, 6, 6),
                "mlp_ratio": 2.0,
                "split_size": (8, 32),
            },
        ),
        "rgt_x4": (
            13_365_543,
            {
                "upscale": 4,
                "depth": (6, 6, 6, 6, 6, 6, 6, 6),
                "num_heads": (6, 6, 6, 6, 6, 6, 6, 6),
                "mlp_ratio": 2.0,
                "split_size": (8, 32),
            },
        ),
    },
    small={"embed_dim": 32, "depth": (1, 2), "num_heads": (2, 2), "mlp_ratio": 2.0, "split_size": (4, 8)},
)
class RGT(nn.Module):
    """image (B, C, H, W) -> (B, C, upscale H, upscale W)."""

    mean: Tensor

    def __init__(self, config: RGTConfig) -> None:
        super().__init__()
        self.config = config
        d = config.embed_dim
        mean = torch.tensor(MEAN if config.in_chans == 3 else (0.0,) * config.in_chans, device="cpu")
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.conv_first = nn.Conv2d(config.in_chans, d, 3, padding=1)
        self.before_RG = nn.Sequential(ToLast(), nn.LayerNorm(d))
        rates = linear_rates(config.drop_path_rate, config.depth)
        self.layers = nn.Sequential(*(Group(index, config, each) for index, each in enumerate(rates)))
        self.norm = nn.LayerNorm(d)
        self.conv_after_body = residual_conv(config)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(d, UPSAMPLE_WIDTH, 3, padding=1), nn.LeakyReLU())
        self.upsample = upsample(config.upscale)
        self.conv_last = nn.Conv2d(UPSAMPLE_WIDTH, config.in_chans, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        f0 = self._shallow(image)
        f = self.conv_before_upsample(self.conv_after_body(self._deep(f0)) + f0)
        return self.conv_last(self.upsample(f)) / self.config.img_range + self.mean

    def features(self, image: Tensor) -> list[Tensor]:
        """One map (B, C, H, W): what the groups make of the picture, before the skip and the reconstruction."""
        return [self._deep(self._shallow(image))]

    def _shallow(self, image: Tensor) -> Tensor:
        check_image("rgt", image, channels=self.config.in_chans, at_least=16)
        height, width = image.shape[2:]
        least = 4 ** recursions(height, width, training=self.training)
        if min(height, width) < least:
            raise TersorError(
                f"rgt reduces a picture of {height} x {width} by {least}, so its shorter side is at least that: cut it up"
            )
        return self.conv_first((image - self.mean) * self.config.img_range)

    def _deep(self, f0: Tensor) -> Tensor:
        return self.norm(self.layers(self.before_RG(f0))).permute(0, 3, 1, 2)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.rand(batch_size, self.config.in_chans, 20, 24)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return key_maps.drop(state, r"\.attn_mask_[01]$", r"\.rpe_biases$", r"\.relative_position_index$")


class ToLast(nn.Module):
    """(B, C, H, W) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def offset_table(window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Every offset between two pixels of a window, the column fastest, and which of them each pair has. On the CPU."""
    with torch.device("cpu"):
        rows, columns = (torch.arange(1 - side, side) for side in window)
        return torch.cartesian_prod(rows, columns).float(), windows.relative_index(window)


def on_map(conv: nn.Module, x: Tensor) -> Tensor:
    """A module for (B, C, H, W), of x (B, H, W, C)."""
    y: Tensor = conv(x.permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1)


def recursions(height: int, width: int, *, training: bool) -> int:
    """T of the module docstring."""
    base = 4 if training else 16
    times = max(int(math.log(side // base, 4)) for side in (height, width))  # this log, with its rounding, as published
    return times if training else max(times, 2)


def residual_conv(config: RGTConfig) -> nn.Module:
    d = config.embed_dim
    if config.resi_connection == "1conv":
        return nn.Conv2d(d, d, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(d, d // 4, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(d // 4, d // 4, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(d // 4, d, 3, padding=1),
    )


def upsample(scale: int) -> nn.Sequential:
    steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    layers: list[nn.Module] = []
    for step in steps:
        layers += [nn.Conv2d(UPSAMPLE_WIDTH, UPSAMPLE_WIDTH * step**2, 3, padding=1), nn.PixelShuffle(step)]
    return nn.Sequential(*layers)
