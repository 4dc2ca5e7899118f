"""SMT, the scale-aware modulation transformer (Lin et al., ICCV 2023, arXiv 2307.08579).

What it is for: image classification, and a backbone for detection and segmentation at any image size. Early stages
modulate by depthwise convolutions of four kernel sizes and have no softmax; the last one attends; the third alternates,
so that the net passes step by step from local to global.

    model = tersor.models.load("smt_t", "smt_tiny.pth")       # official file
    logits = model(image)                                     # image (B, 3, H, W), ImageNet-normalised; any H, W
    maps = model.features(image)                              # four normed maps at strides 4, 8, 16, 32

A block works on tokens x [B, H W, C]; g are 1, or learned vectors with `use_layerscale`:

    x = x + g1 * Mixer(LN(x));   x = x + g2 * W2 GELU(u + DW3x3(u)),   u = W1 LN(x)

    modulation:  v = Wv x,  s = Ws x;   head i = 1..n of s (C/n channels) passes a depthwise convolution of kernel 2i + 1
                 then channel j of all heads side by side, j = 0..C/n - 1: a group each of
                 M = W3 GELU(BN(W2 [..]))       W2: 1x1, C/n groups, C -> e C;  W3: 1x1, e C -> C
                 output = Wo (M * v)
    attention:   output = Wo (softmax(q k^T / sqrt(d)) v + DW3x3(v))

`ca_attentions` says which stages modulate; odd blocks of the third stage attend whatever it says. Every stage ends with
a LayerNorm, and the classifier takes the mean of the last stage's tokens.

Origin: AFeng-x/SMT at 11e954d (models/smt.py), MIT. Its key names are ours. The epsilon is 1e-6 in the LayerNorms of
blocks and stages, 1e-5 in those of the embeddings. The published S is said to have 21M parameters, its configuration
counts 22.6M. `smt_l_22k` is L with layer scales, as it was trained on ImageNet-22k and tuned from there. Its argument
img_size has no effect and is left out.

Proven: the golden cases of the published code (a tiny one and SMT-T) to 5e-6, also inside (stages, a modulation, an
attention). A small one trained by us on 20,000 pictures of CIFAR-10 is ahead of a plain ViT
(benchmarks/results/vision_training.md). Not proven: ImageNet accuracy (T 82.2, S 83.7, B 84.3; L 87.1 from ImageNet-22k,
published), detection and segmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.layers import checks
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.patch_embed import check_image
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class SMTConfig:
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns pooled features
    embed_dims: tuple[int, ...] = (64, 128, 256, 512)  # C of each stage
    depths: tuple[int, ...] = (2, 2, 8, 1)
    ca_attentions: tuple[int, ...] = (1, 1, 1, 0)  # 1: modulation; 0: attention
    ca_num_heads: tuple[int, ...] = (4, 4, 4, -1)  # kernel sizes of the modulation
    sa_num_heads: tuple[int, ...] = (-1, -1, 8, 16)  # heads of the attention
    mlp_ratios: tuple[float, ...] = (8.0, 6.0, 4.0, 2.0)
    qkv_bias: bool = False
    qk_scale: float | None = None  # None: 1 / sqrt(channels of a head)
    expand_ratio: int = 2  # e, of the modulation's hidden width
    head_conv: int = 3  # kernel of the first convolution: 3 or 7
    use_layerscale: bool = False
    layerscale_value: float = 1e-4
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        checks.at_least("smt", 0, num_classes=self.num_classes)
        checks.at_least("smt", 1, in_chans=self.in_chans, expand_ratio=self.expand_ratio)
        checks.one_of("smt", "head_conv", self.head_conv, (3, 7))
        checks.same_length(
            "smt",
            embed_dims=self.embed_dims,
            depths=self.depths,
            ca_attentions=self.ca_attentions,
            ca_num_heads=self.ca_num_heads,
            sa_num_heads=self.sa_num_heads,
            mlp_ratios=self.mlp_ratios,
        )
        for stage, C in enumerate(self.embed_dims):
            checks.at_least("smt", 1, depths=self.depths[stage])
            for modulates in {self.modulates(stage, block) for block in range(self.depths[stage])}:
                name = "ca_num_heads" if modulates else "sa_num_heads"
                checks.divides("smt", name, getattr(self, name)[stage], f"embed_dims of stage {stage + 1}", C)

    def modulates(self, stage: int, block: int) -> bool:
        return bool(self.ca_attentions[stage]) and not (stage == 2 and block % 2)


class Modulation(nn.Module):
    """tokens (B, H W, C) -> the same shape."""

    def __init__(self, config: SMTConfig, stage: int) -> None:
        super().__init__()
        C, self.heads = config.embed_dims[stage], config.ca_num_heads[stage]
        G, hidden = C // self.heads, C * config.expand_ratio
        self.v = nn.Linear(C, C, bias=config.qkv_bias)
        self.s = nn.Linear(C, C, bias=config.qkv_bias)
        for i in range(1, self.heads + 1):
            self.add_module(f"local_conv_{i}", nn.Conv2d(G, G, 2 * i + 1, padding=i, groups=G))
        self.proj0 = nn.Conv2d(C, hidden, 1, groups=G)
        self.bn = nn.BatchNorm2d(hidden)
        self.proj1 = nn.Conv2d(hidden, C, 1)
        self.proj = nn.Linear(C, C)
        self.drop = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        heads = to_map(self.s(x), H, W).chunk(self.heads, 1)
        scales = [self.get_submodule(f"local_conv_{i}")(head) for i, head in enumerate(heads, 1)]
        mixed = torch.stack(scales, 2).flatten(1, 2)  # (B, C, H, W): channel j of every head, then j + 1
        M = to_tokens(self.proj1(F.gelu(self.bn(self.proj0(mixed)))))
        return self.drop(self.proj(M * self.v(x)))


class Attention(nn.Module):
    """tokens (B, H W, C) -> the same shape; the values also pass a depthwise convolution."""

    def __init__(self, config: SMTConfig, stage: int) -> None:
        super().__init__()
        C, self.heads = config.embed_dims[stage], config.sa_num_heads[stage]
        self.scale, self.drop = config.qk_scale, config.attn_drop_rate
        self.q = nn.Linear(C, C, bias=config.qkv_bias)
        self.kv = nn.Linear(C, 2 * C, bias=config.qkv_bias)
        self.local_conv = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.proj = nn.Linear(C, C)
        self.proj_drop = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        keys, values = self.kv(x).chunk(2, -1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q(x), keys, values))
        dropout = self.drop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)  # (B, h, N, C/h)
        mixed = mixed.transpose(1, 2).flatten(2) + to_tokens(self.local_conv(to_map(values, H, W)))
        return self.proj_drop(self.proj(mixed))


class DepthwiseConv(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(C, C, 3, padding=1, groups=C)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return to_tokens(self.dwconv(to_map(x, H, W)))


class Mlp(nn.Module):
    def __init__(self, C: int, ratio: float, drop: float) -> None:
        super().__init__()
        hidden = int(C * ratio)
        self.fc1 = nn.Linear(C, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, C)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        u = self.fc1(x)
        u = F.gelu(u + self.dwconv(u, H, W))
        return self.drop(self.fc2(self.drop(u)))


class Block(nn.Module):
    gamma_1: nn.Parameter | float
    gamma_2: nn.Parameter | float

    def __init__(self, config: SMTConfig, stage: int, block: int, drop_path: float) -> None:
        super().__init__()
        C = config.embed_dims[stage]
        mixer = Modulation if config.modulates(stage, block) else Attention
        self.norm1 = nn.LayerNorm(C, eps=1e-6)
        self.attn = mixer(config, stage)
        self.norm2 = nn.LayerNorm(C, eps=1e-6)
        self.mlp = Mlp(C, config.mlp_ratios[stage], config.drop_rate)
        self.drop_path = DropPath(drop_path)
        self.gamma_1 = self.gamma_2 = 1.0
        if config.use_layerscale:
            self.gamma_1 = nn.Parameter(torch.full((C,), config.layerscale_value))
            self.gamma_2 = nn.Parameter(torch.full((C,), config.layerscale_value))

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), H, W))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x), H, W))


class Stem(nn.Module):
    """image (B, 3, H, W) -> normed map (B, C, H/4, W/4)."""

    def __init__(self, in_chans: int, C: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_chans, C, kernel, stride=2, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(C),
            nn.ReLU(),
            nn.Conv2d(C, C, 2, stride=2),
        )
        self.norm = nn.LayerNorm(C)

    def forward(self, image: Tensor) -> Tensor:
        return norm_channels(self.norm, self.conv(image))


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, d_in: int, C: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(d_in, C, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        return norm_channels(self.norm, self.proj(x))


@register(
    "smt",
    task="classify",
    input="image",
    paper="arXiv 2307.08579",
    variants={
        "smt_t": (11_506_536, {"mlp_ratios": (4.0, 4.0, 4.0, 2.0), "qkv_bias": True, "drop_path_rate": 0.1}),
        "smt_s": (
            22_550_952,
            {
                "depths": (3, 4, 18, 2),
                "mlp_ratios": (4.0, 4.0, 4.0, 2.0),
                "qkv_bias": True,
                "drop_path_rate": 0.2,
            },
        ),
        "smt_b": (
            32_037_352,
            {"depths": (4, 6, 28, 2), "qkv_bias": True, "head_conv": 7, "drop_path_rate": 0.3},
        ),
        "smt_l": (
            80_589_544,
            {
                "embed_dims": (96, 192, 384, 768),
                "depths": (4, 6, 28, 4),
                "qkv_bias": True,
                "head_conv": 7,
                "drop_path_rate": 0.4,
            },
        ),
        "smt_l_22k": (
            80_620_264,
            {
                "embed_dims": (96, 192, 384, 768),
                "depths": (4, 6, 28, 4),
                "qkv_bias": True,
                "head_conv": 7,
                "use_layerscale": True,
                "drop_path_rate": 0.1,
            },
        ),
    },
    small={
        "num_classes": 10,
        "embed_dims": (8, 16, 24, 32),
        "depths": (1, 1, 2, 1),
        "sa_num_heads": (-1, -1, 2, 4),
        "mlp_ratios": (2.0, 2.0, 2.0, 2.0),
        "qkv_bias": True,
    },
)
class SMT(nn.Module):
    """image (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: SMTConfig) -> None:
        super().__init__()
        self.config = config
        rates = linear_rates(config.drop_path_rate, config.depths)
        for stage, C in enumerate(config.embed_dims):
            embed = Downsample(config.embed_dims[stage - 1], C) if stage else Stem(config.in_chans, C, config.head_conv)
            blocks = (Block(config, stage, block, rate) for block, rate in enumerate(rates[stage]))
            self.add_module(f"patch_embed{stage + 1}", embed)
            self.add_module(f"block{stage + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(C, eps=1e-6))
        self.head = nn.Linear(config.embed_dims[-1], config.num_classes) if config.num_classes else nn.Identity()
        self.apply(init_weights)

    def features(self, image: Tensor) -> list[Tensor]:
        """The stages' maps after their norms, strides 4, 8, 16, 32."""
        check_image("smt", image, channels=self.config.in_chans, at_least=3)
        x, maps = image, []
        for stage in range(1, len(self.config.embed_dims) + 1):
            x = self.get_submodule(f"patch_embed{stage}")(x)
            H, W = x.shape[-2:]
            tokens = to_tokens(x)
            for block in self.get_submodule(f"block{stage}").children():
                tokens = block(tokens, H, W)
            x = to_map(self.get_submodule(f"norm{stage}")(tokens), H, W)
            maps.append(x)
        return maps

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image)[-1].mean((2, 3)))

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, 64, 64)}


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, H: int, W: int) -> Tensor:
    """(B, H W, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, H, W)


def norm_channels(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A LayerNorm over the channels of a map (B, C, H, W)."""
    return norm(x.movedim(1, -1)).movedim(-1, 1)


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
