"""STViT, the vision transformer with super token sampling (Huang et al., CVPR 2023, arXiv 2211.11167; "SViT" there).

What it is for: image classification and dense tasks, at any image size, with attention over the whole image in every
stage. Early stages have too many pixels for that, so pixels are grouped softly into super tokens, the super tokens
attend, and their result goes back to the pixels.

    model = tersor.models.load("stvit_s", "STViT-S.pth")      # official file
    logits = model(image)                                     # image (B, 3, H, W), ImageNet-normalised; any H, W
    maps = model.features(image)                              # four maps at strides 4, 8, 16, 32

A block works on maps x [B, C, H, W]; g are 1, or learned with `layerscale`:

    x = x + DW3x3(x);   x = x + g1 STA(LN(x));   x = x + g2 W2 (u + DW3x3(u)),  u = GELU(W1 BN(x))

STA: cut the map into cells of h x w = `stoken_size` pixels, P [B, cells, h w, C] (zeros behind the right and lower edge
where they do not divide). S [B, C, cells] starts as the mean of each cell. n = `n_iter` times:

    Q = softmax over the 9 neighbours of a cell of (P S_neighbour / sqrt(C))       [B, cells, h w, 9]
    S_s = sum of Q_pk P_p over all pixels p and places k that point to s, over the sum of these Q_pk

then S = attention(S) over all super tokens, and a pixel becomes sum_k Q_pk S_neighbour(k). A cell's 9 neighbours are
itself and those around it. Neighbours outside the grid are zeros that are not masked: with a logit of 0 they take a part
of the softmax; what points to them is lost. No gradient goes through Q, nor through the sum of Q. Where `stoken_size` is
1, STA is plain attention over the pixels.

`features` are the stages' maps before they are halved for the next stage.

Origin: hhb072/STViT at c9ed9a4 (models/stvit.py); its header says MIT, a licence file is missing. Its key names are
ours; its fixed one-hot kernels (`unfold.weights`, `fold.weights`), which its own parameter counts include, are not
needed. Its arguments freeze_bn and use_checkpoint do not change results and are left out, as is a form without attention
between the super tokens that its constructor cannot reach.

Proven: the golden cases of the published code (STViT-S, a tiny one, one with padding and several iterations) to 5e-6, also
inside. A small one trained by us on 20,000 pictures of CIFAR-10 is ahead of a plain ViT
(benchmarks/results/vision_training.md). Not proven: ImageNet accuracy (S 83.6, B 84.8, L 85.3 at 224 published), detection
and segmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers import checks
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.patch_embed import check_image
from tersor.models import key_maps
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class STViTConfig:
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns pooled features
    embed_dim: tuple[int, ...] = (64, 128, 320, 512)  # C of each stage
    depths: tuple[int, ...] = (3, 5, 9, 3)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    n_iter: tuple[int, ...] = (1, 1, 1, 1)
    stoken_size: tuple[int, ...] = (8, 4, 1, 1)  # pixels on a side of a cell
    projection: int = 1024  # width before the head
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None  # None: 1 / sqrt(channels of a head)
    layerscale: tuple[bool, ...] = (False, False, False, False)
    init_values: float = 1e-6  # of the layer scales
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        checks.at_least("stvit", 0, num_classes=self.num_classes)
        checks.at_least("stvit", 1, in_chans=self.in_chans, projection=self.projection)
        checks.same_length(
            "stvit",
            embed_dim=self.embed_dim,
            depths=self.depths,
            num_heads=self.num_heads,
            n_iter=self.n_iter,
            stoken_size=self.stoken_size,
            layerscale=self.layerscale,
        )
        for C, heads, n, side in zip(self.embed_dim, self.num_heads, self.n_iter, self.stoken_size, strict=True):
            checks.divides("stvit", "num_heads", heads, "embed_dim", C)
            checks.at_least("stvit", 1, n_iter=n, stoken_size=side)
        if self.embed_dim[0] % 2:
            raise TersorError(f"stvit halves its first width in the stem; embed_dim {self.embed_dim[0]} is odd")


class Attention(nn.Module):
    """map (B, C, H, W) -> the same shape. In the packed projection each head has its own q, k and v side by side."""

    def __init__(self, config: STViTConfig, stage: int) -> None:
        super().__init__()
        C, self.heads = config.embed_dim[stage], config.num_heads[stage]
        self.scale, self.drop = config.qk_scale, config.attn_drop_rate
        self.qkv = nn.Conv2d(C, 3 * C, 1, bias=config.qkv_bias)
        self.proj = nn.Conv2d(C, C, 1)
        self.proj_drop = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(x).reshape(x.shape[0], self.heads, -1, x.shape[-2] * x.shape[-1]).transpose(2, 3).chunk(3, -1)
        )
        dropout = self.drop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)  # (B, h, N, C/h)
        return self.proj_drop(self.proj(mixed.transpose(2, 3).reshape(x.shape)))


class SuperTokenAttention(nn.Module):
    def __init__(self, config: STViTConfig, stage: int) -> None:
        super().__init__()
        self.side, self.n_iter = config.stoken_size[stage], config.n_iter[stage]
        self.stoken_refine = Attention(config, stage)

    def forward(self, x: Tensor) -> Tensor:
        if self.side == 1:
            return self.stoken_refine(x)
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % self.side, 0, -H % self.side))
        P = to_cells(x, self.side)
        grid = (x.shape[-2] // self.side, x.shape[-1] // self.side)
        with torch.no_grad():
            Q = self.associate(P, F.avg_pool2d(x, self.side))
        S = self.stoken_refine(super_tokens(P, Q, grid))
        out = from_cells(Q @ neighbours(S), self.side, grid)
        return out[:, :, :H, :W]

    def associate(self, P: Tensor, S: Tensor) -> Tensor:
        """P (B, cells, pixels, C), first super tokens S (B, C, *grid) -> Q (B, cells, pixels, 9), rows sum to 1."""
        scale = P.shape[-1] ** -0.5
        Q = (P @ neighbours(S).transpose(2, 3) * scale).softmax(-1)
        for _ in range(self.n_iter - 1):
            S = super_tokens(P, Q, (S.shape[2], S.shape[3]))
            Q = (P @ neighbours(S).transpose(2, 3) * scale).softmax(-1)
        return Q


def to_cells(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, cells, side^2, C), cells and the pixels in them row by row."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // side, side, W // side, side)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, side * side, C)


def from_cells(cells: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """The inverse, for a grid of cells."""
    B, C = cells.shape[0], cells.shape[-1]
    x = cells.reshape(B, *grid, side, side, C).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, C, grid[0] * side, grid[1] * side)


def neighbours(S: Tensor) -> Tensor:
    """(B, C, *grid) -> (B, cells, 9, C): the 3x3 places around each cell row by row, zeros outside the grid."""
    B, C = S.shape[:2]
    return F.unfold(S, 3, padding=1).reshape(B, C, 9, -1).permute(0, 3, 2, 1)


def to_grid(parts: Tensor, grid: tuple[int, int]) -> Tensor:
    """The adjoint of `neighbours`: (B, cells, 9, C) -> (B, C, *grid), each part added to the super token it points to."""
    B, cells, _, C = parts.shape
    return F.fold(parts.permute(0, 3, 2, 1).reshape(B, C * 9, cells), grid, 3, padding=1)


def super_tokens(P: Tensor, Q: Tensor, grid: tuple[int, int]) -> Tensor:
    """P (B, cells, pixels, C), Q (B, cells, pixels, 9) -> means of the pixels (B, C, *grid), weighted by Q."""
    weight = to_grid(Q.sum(2)[..., None], grid)  # (B, 1, *grid)
    return to_grid(Q.transpose(2, 3) @ P, grid) / (weight + 1e-12)


class LayerNorm2d(nn.Module):
    """Over the channels of each pixel."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class DepthwiseResidual(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, groups=C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Mlp(nn.Module):
    def __init__(self, C: int, ratio: float, drop: float) -> None:
        super().__init__()
        hidden = int(C * ratio)
        self.fc1 = nn.Conv2d(C, hidden, 1)
        self.conv = DepthwiseResidual(hidden)
        self.fc2 = nn.Conv2d(hidden, C, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        u = self.drop(F.gelu(self.fc1(x)))
        return self.drop(self.fc2(self.conv(u)))


class Block(nn.Module):
    gamma_1: nn.Parameter | float
    gamma_2: nn.Parameter | float

    def __init__(self, config: STViTConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        C = config.embed_dim[stage]
        self.pos_embed = DepthwiseResidual(C)
        self.norm1 = LayerNorm2d(C)
        self.attn = SuperTokenAttention(config, stage)
        self.norm2 = nn.BatchNorm2d(C)
        self.mlp2 = Mlp(C, config.mlp_ratio, config.drop_rate)
        self.drop_path = DropPath(drop_path)
        self.gamma_1 = self.gamma_2 = 1.0
        if config.layerscale[stage]:
            self.gamma_1 = nn.Parameter(torch.full((1, C, 1, 1), config.init_values))
            self.gamma_2 = nn.Parameter(torch.full((1, C, 1, 1), config.init_values))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp2(self.norm2(x)))


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(d_in, d_out, 3, stride=2, padding=1), nn.BatchNorm2d(d_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Stage(nn.Module):
    def __init__(self, config: STViTConfig, stage: int, rates: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, stage, rate) for rate in rates)
        if stage + 1 < len(config.embed_dim):
            self.downsample: nn.Module = Downsample(config.embed_dim[stage], config.embed_dim[stage + 1])
        else:
            self.downsample = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.run_blocks(x))

    def run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Stem(nn.Module):
    """image (B, 3, H, W) -> map (B, C, H/4, W/4): convolution, GELU, then BatchNorm, four times."""

    def __init__(self, in_chans: int, C: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for d_in, d_out, stride in ((in_chans, C // 2, 2), (C // 2, C // 2, 1), (C // 2, C, 2), (C, C, 1)):
            layers += [nn.Conv2d(d_in, d_out, 3, stride=stride, padding=1), nn.GELU(), nn.BatchNorm2d(d_out)]
        self.proj = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


@register(
    "stvit",
    task="classify",
    input="image",
    paper="arXiv 2211.11167",
    variants={
        "stvit_s": (25_495_624, {"drop_path_rate": 0.1}),
        "stvit_b": (
            51_691_288,
            {
                "embed_dim": (96, 192, 384, 512),
                "depths": (4, 6, 14, 6),
                "num_heads": (2, 3, 6, 8),
                "layerscale": (False, False, True, True),
                "drop_path_rate": 0.4,
            },
        ),
        "stvit_l": (
            94_971_096,
            {
                "embed_dim": (96, 192, 448, 640),
                "depths": (4, 7, 19, 8),
                "num_heads": (2, 3, 7, 10),
                "layerscale": (False, False, True, True),
                "drop_path_rate": 0.6,
            },
        ),
    },
    small={
        "num_classes": 10,
        "embed_dim": (16, 24, 32, 48),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 4, 4),
        "n_iter": (2, 1, 1, 1),
        "projection": 48,
        "mlp_ratio": 2.0,
        "layerscale": (False, False, True, True),
        "init_values": 0.1,
    },
)
class STViT(nn.Module):
    """image (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: STViTConfig) -> None:
        super().__init__()
        self.config = config
        rates = linear_rates(config.drop_path_rate, config.depths)
        self.patch_embed = Stem(config.in_chans, config.embed_dim[0])
        self.layers = nn.ModuleList(Stage(config, stage, each) for stage, each in enumerate(rates))
        self.proj = nn.Conv2d(config.embed_dim[-1], config.projection, 1)
        self.norm = nn.BatchNorm2d(config.projection)
        self.head = nn.Linear(config.projection, config.num_classes) if config.num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def features(self, image: Tensor) -> list[Tensor]:
        """The stages' maps, strides 4, 8, 16, 32."""
        check_image("stvit", image, channels=self.config.in_chans)
        x, maps = self.patch_embed(image), []
        for layer in self.layers:
            assert isinstance(layer, Stage)
            maps.append(layer.run_blocks(x))
            x = layer.downsample(maps[-1])
        return maps

    def forward(self, image: Tensor) -> Tensor:
        check_image("stvit", image, channels=self.config.in_chans)
        x = self.patch_embed(image)
        for layer in self.layers:
            x = layer(x)
        return self.head(F.silu(self.norm(self.proj(x))).mean((2, 3)))

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, 72, 64)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return key_maps.drop(state, r"\.(un)?fold\.weights$")
