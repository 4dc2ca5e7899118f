"""EfficientFormer, vision transformers at MobileNet speed (Li et al., NeurIPS 2022, arXiv 2206.01191).

What it is for: image classification on phones and other small devices. The network is dimension-consistent: pooling
blocks on feature maps first, attention blocks on tokens last, and one reshape in between.

    model = tersor.models.load("efficientformer_l1", "efficientformer_l1_300d.pth")   # official or timm checkpoint
    logits = model(image)                                   # image (B, 3, 224, 224), ImageNet-normalised
    tersor.models.load("efficientformer_l1", path, resolution=256)                    # bias tables are interpolated

    map block (stages 1 to 3 and the first of stage 4), x [B, d, H, W], no norm before the mixer:
        x = x + g1 * (avgpool3x3(x) - x)                    padding is not counted
        x = x + g2 * BN(W2 GELU(BN(W1 x)))                  1x1 convolutions, hidden 4d
    token block (the last vit_num of stage 4), x [B, N, d]:
        x = x + g1 * Attention(LN(x));   x = x + g2 * W2 GELU(W1 LN(x))
        Attention: 8 heads, keys 32 and values 128 wide whatever d is;  softmax(q k^T / sqrt(32) + b[|dy|, |dx|]) v

g1, g2 are layer scales [d]. Stages have strides 4, 8, 16, 32. The head is LN, mean over tokens, and (by default) two
linear classifiers: training returns both logits, eval their mean.

Origin: snap-research/EfficientFormer at d01da42 (models/efficientformer.py). Its key names are ours; timm's are mapped.
Published quirks: the flattening counts as a member of stage 4, so token blocks are numbered one higher. The published
code fixes 224 pixels; `resolution` (ours) sets another square size. It also keeps the gathered biases from the last
eval() and so may use old ones after loading; here they are always current. Its feature-map mode (`fork_feat`) applies
LayerNorm to channels-first maps and is not offered; EfficientFormerV2 has one that works.

Proven: the golden cases of the published code to 1e-6 (a tiny one and L1), parameter counts of L1, L3, L7, all three
equal to timm 1.0.31 with random weights in timm's layout. Not proven: ImageNet accuracy (79.2, 82.4, 83.3 published),
interpolated resolutions' accuracy, phone latencies.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.offset_bias import offset_index, resize_table
from tersor.models.registry import register

HEADS, KEY_DIM, VALUE_DIM = 8, 32, 128


@dataclass(frozen=True, kw_only=True)
class EfficientFormerConfig:
    layers: tuple[int, ...] = (3, 2, 6, 4)  # blocks of each stage
    embed_dims: tuple[int, ...] = (48, 96, 224, 448)
    vit_num: int = 0  # token blocks at the end of the last stage
    downsamples: tuple[bool, ...] = (True, True, True, True)  # after each stage; the last is not used
    mlp_ratios: float = 4
    pool_size: int = 3
    in_chans: int = 3
    num_classes: int = 1000  # 0: no classifier, forward returns pooled features
    distillation: bool = True  # a second classifier, taught by a teacher
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0  # of the last block; earlier ones linearly less
    use_layer_scale: bool = True
    layer_scale_init_value: float = 1e-5
    resolution: int = 224  # of the square image: sets the size of the bias tables

    def __post_init__(self) -> None:
        if len(self.layers) != 4 or len(self.embed_dims) != 4:
            raise TersorError(f"efficientformer has four stages; layers {self.layers}, embed_dims {self.embed_dims}")
        if not 0 <= self.vit_num <= self.layers[-1]:
            raise TersorError(f"vit_num is {self.vit_num}, of {self.layers[-1]} blocks in the last stage")


class Attention(nn.Module):
    offsets: Tensor

    def __init__(self, d: int, side: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(d, HEADS * (2 * KEY_DIM + VALUE_DIM))  # head-major; q, k, v inside each head
        self.proj = nn.Linear(HEADS * VALUE_DIM, d)
        self.attention_biases = nn.Parameter(torch.zeros(HEADS, side * side))
        self.register_buffer("offsets", offset_index(side), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = rearrange(self.qkv(x), "b n (h d) -> b h n d", h=HEADS)
        q, k, v = qkv.split((KEY_DIM, KEY_DIM, VALUE_DIM), dim=-1)
        bias = self.attention_biases[:, self.offsets]  # (h, n, n)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class TokenMlp(nn.Module):
    def __init__(self, d: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, d)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class MapMlp(nn.Module):
    def __init__(self, d: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(d, hidden, 1)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, d, 1)
        self.norm2 = nn.BatchNorm2d(d)
        self.drop = nn.Dropout(drop)
        for conv in (self.fc1, self.fc2):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.gelu(self.norm1(self.fc1(x))))
        return self.drop(self.norm2(self.fc2(x)))


class Scaled(nn.Module):
    """What the residual steps x + drop_path(g * branch) of both blocks share; g is per channel, or absent."""

    layer_scale_1: nn.Parameter | None
    layer_scale_2: nn.Parameter | None

    def __init__(self, d: int, config: EfficientFormerConfig, drop_path: float) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path)
        if config.use_layer_scale:
            self.layer_scale_1 = nn.Parameter(torch.full((d,), config.layer_scale_init_value))
            self.layer_scale_2 = nn.Parameter(torch.full((d,), config.layer_scale_init_value))
        else:
            self.layer_scale_1 = self.layer_scale_2 = None


class MapBlock(Scaled):
    def __init__(self, d: int, config: EfficientFormerConfig, drop_path: float) -> None:
        super().__init__(d, config, drop_path)
        self.pool = nn.AvgPool2d(config.pool_size, 1, config.pool_size // 2, count_include_pad=False)
        self.mlp = MapMlp(d, int(d * config.mlp_ratios), config.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        g1, g2 = (1 if g is None else g[:, None, None] for g in (self.layer_scale_1, self.layer_scale_2))
        x = x + self.drop_path(g1 * (self.pool(x) - x))
        return x + self.drop_path(g2 * self.mlp(x))


class TokenBlock(Scaled):
    def __init__(self, d: int, config: EfficientFormerConfig, drop_path: float, side: int) -> None:
        super().__init__(d, config, drop_path)
        self.norm1 = nn.LayerNorm(d)
        self.token_mixer = Attention(d, side)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = TokenMlp(d, int(d * config.mlp_ratios), config.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        g1, g2 = (1 if g is None else g for g in (self.layer_scale_1, self.layer_scale_2))
        x = x + self.drop_path(g1 * self.token_mixer(self.norm1(x)))
        return x + self.drop_path(g2 * self.mlp(self.norm2(x)))


class Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x, "b d h w -> b (h w) d")


class Embedding(nn.Module):
    """Between stages: half the height and width, d_in -> d_out, no activation."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(d_in, d_out, 3, 2, 1)
        self.norm = nn.BatchNorm2d(d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


def stem(in_chans: int, d: int) -> nn.Sequential:
    """image (B, in_chans, H, W) -> (B, d, H/4, W/4), with an activation also at the end."""
    return nn.Sequential(
        nn.Conv2d(in_chans, d // 2, 3, 2, 1),
        nn.BatchNorm2d(d // 2),
        nn.ReLU(),
        nn.Conv2d(d // 2, d, 3, 2, 1),
        nn.BatchNorm2d(d),
        nn.ReLU(),
    )


@register(
    "efficientformer",
    task="classify",
    input="image",
    paper="arXiv 2206.01191",
    variants={
        "efficientformer_l1": (
            12_289_928,
            {"embed_dims": (48, 96, 224, 448), "layers": (3, 2, 6, 4), "vit_num": 1},
        ),
        "efficientformer_l3": (
            31_406_000,
            {"embed_dims": (64, 128, 320, 512), "layers": (4, 4, 12, 6), "vit_num": 4},
        ),
        "efficientformer_l7": (
            82_229_328,
            {"embed_dims": (96, 192, 384, 768), "layers": (6, 6, 18, 8), "vit_num": 8},
        ),
    },
    small={
        "embed_dims": (16, 16, 24, 32),
        "layers": (1, 1, 1, 2),
        "vit_num": 1,
        "num_classes": 10,
        "resolution": 64,
    },
)
class EfficientFormer(nn.Module):
    """image (B, C, R, R) -> logits (B, num_classes)."""

    def __init__(self, config: EfficientFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = stem(config.in_chans, config.embed_dims[0])
        self.network = nn.ModuleList()
        self.side = math.ceil(config.resolution / 4)  # of the map in the stage being built; at last of the token grid
        rates = linear_rates(config.drop_path_rate, config.layers)
        for stage, d in enumerate(config.embed_dims[:3]):
            self.network.append(nn.Sequential(*[MapBlock(d, config, rate) for rate in rates[stage]]))
            if config.downsamples[stage] or d != config.embed_dims[stage + 1]:
                self.network.append(Embedding(d, config.embed_dims[stage + 1]))
                self.side = math.ceil(self.side / 2)
        d, first_token_block = config.embed_dims[3], config.layers[3] - config.vit_num
        maps = [MapBlock(d, config, rate) for rate in rates[3][:first_token_block]]
        tokens = [TokenBlock(d, config, rate, self.side) for rate in rates[3][first_token_block:]]
        self.network.append(nn.Sequential(*maps, Flatten(), *tokens))

        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.num_classes) if config.num_classes else nn.Identity()
        if config.distillation:
            self.dist_head = nn.Linear(d, config.num_classes) if config.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def features(self, image: Tensor) -> list[Tensor]:
        """The stages' maps, strides 4, 8, 16, 32."""
        *maps, tokens = self._stages(image)
        return [*maps, tokens.transpose(1, 2).reshape(tokens.shape[0], -1, self.side, self.side)]

    def _stages(self, image: Tensor) -> list[Tensor]:
        """The first three stages' maps, and the last one's tokens (B, N, d)."""
        wanted = self.config.resolution
        if any(-(-side // 32) != -(-wanted // 32) for side in image.shape[-2:]):
            found = " x ".join(map(str, image.shape[-2:]))
            raise TersorError(
                f"the model takes images of {wanted} x {wanted} pixels, not {found}; resolution sets another size"
            )
        x, ends = self.patch_embed(image), []
        for stage in self.network:
            x = stage(x)
            if isinstance(stage, nn.Sequential):  # a stage, not what stands between two
                ends.append(x)
        return ends

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(self._stages(image)[-1]).mean(1)  # (B, N, d) -> (B, d)
        if not self.config.distillation:
            return self.head(x)
        logits, distilled = self.head(x), self.dist_head(x)
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, self.config.resolution, self.config.resolution)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        converted = {_published_name(key): value for key, value in state.items()}
        for key in list(converted):
            if key.endswith("attention_bias_idxs"):
                del converted[key]
            elif key.endswith("attention_biases"):
                converted[key] = resize_table(converted[key], self.side)
        return converted


def _published_name(key: str) -> str:
    """timm's key -> the published one; any other key unchanged."""
    for theirs, published in (
        (r"stem\.conv1", "patch_embed.0"),
        (r"stem\.norm1", "patch_embed.1"),
        (r"stem\.conv2", "patch_embed.3"),
        (r"stem\.norm2", "patch_embed.4"),
        (r"head_dist", "dist_head"),
    ):
        key = re.sub(rf"^{theirs}\.", f"{published}.", key)
    key = re.sub(r"^stages\.(\d)\.blocks\.", lambda match: f"network.{2 * int(match[1])}.", key)
    key = re.sub(r"^stages\.(\d)\.downsample\.conv\.", lambda match: f"network.{2 * int(match[1]) - 1}.proj.", key)
    key = re.sub(r"^stages\.(\d)\.downsample\.norm\.", lambda match: f"network.{2 * int(match[1]) - 1}.norm.", key)
    return re.sub(r"\.ls([12])\.gamma$", r".layer_scale_\1", key)
