"""EfficientFormerV2, a search over size and latency together (Li et al., ICCV 2023, arXiv 2212.08059).

What it is for: image classification, and a backbone for detection and segmentation, with the size and latency of
MobileNetV2 and about four points more accuracy.

    model = tersor.models.load("efficientformerv2_s0", "eformer_s0_450.pth")          # official or timm checkpoint
    logits = model(image)                                   # image (B, 3, 224, 224), ImageNet-normalised
    tersor.models.load("efficientformerv2_s0", path, resolution=256)                  # bias tables are interpolated
    tersor.models.load("efficientformerv2_s0", path, fork_feat=True)(image)           # four maps, strides 4 to 32

Everything stays a map x [B, d, H, W]. All blocks have M, the last vit_num of stages 3 and 4 also A:

    x = x + g1 * A(x)
    x = x + g2 * M(x)          M = BN(W2 GELU(BN(DW3x3 GELU(BN(W1 x))))), hidden int(e d), e by block (`e_ratios`)

    A: 8 heads, keys 32 and values 128 wide; in stage 3 on a grid of half the side (strided depthwise convolution
       first, bilinear upsampling last). T1, T2 mix the heads ("talking heads"), L is a depthwise 3x3 ("local branch"):
       y = T2 softmax(T1(q k^T / sqrt(32) + b[|dy|, |dx|])) v + L(v);    A = BN(W GELU(upsample(y)))

g1, g2 [d, 1, 1] are layer scales. Between stages a strided convolution halves the map; between stages 3 and 4 the same
attention without talking heads, with keys 16 and values 64 wide and queries at every second pixel, is added to it.
The head is BN, mean over space, and (by default) two linear classifiers: training returns both logits, eval their mean.
With `fork_feat` there is no head: each stage's map goes through a norm of its own; those norms are not part of the
classification checkpoints and stay fresh where a checkpoint lacks them.

Origin: snap-research/EfficientFormer at d01da42 (models/efficientformer_v2.py). Its key names are ours; timm's are
mapped. The biases of k and of T1 cancel in the softmax but are kept, for the checkpoints have them. The published code
keeps the gathered attention biases from the last eval() and so may use old ones after loading; here they are current.

Proven: the golden cases of the published code to 1e-6 (a tiny one at 128 pixels and S0), parameter counts of S0 to L,
all four equal to timm 1.0.31 with random weights in timm's layout. Not proven: ImageNet accuracy (75.7, 79.0, 81.6,
83.3 published), interpolated resolutions' accuracy, phone latencies.
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

HEADS = 8


@dataclass(frozen=True, kw_only=True)
class EfficientFormerV2Config:
    layers: tuple[int, ...] = (5, 5, 15, 10)  # blocks of each stage
    embed_dims: tuple[int, ...] = (40, 80, 192, 384)
    e_ratios: tuple[tuple[float, ...], ...] = (  # hidden width of M over d: stage, block
        (4,) * 5,
        (4,) * 5,
        (4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4),
        (4, 4, 4, 3, 3, 3, 3, 4, 4, 4),
    )
    vit_num: int = 0  # blocks with attention at the end of stages 3 and 4
    downsamples: tuple[bool, ...] = (True, True, True, True)  # after each stage; the last is not used
    in_chans: int = 3
    num_classes: int = 1000  # 0: no classifier, forward returns pooled features
    distillation: bool = True  # a second classifier, taught by a teacher
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0  # of the last block; earlier ones linearly less
    use_layer_scale: bool = True
    layer_scale_init_value: float = 1e-5
    resolution: int = 224  # of the square image: sets the size of the bias tables
    fork_feat: bool = False  # return the four stages' maps in place of logits

    def __post_init__(self) -> None:
        if len(self.layers) != 4 or len(self.embed_dims) != 4:
            raise TersorError(f"efficientformerv2 has four stages; layers {self.layers}, embed_dims {self.embed_dims}")
        if any(len(ratios) < depth for ratios, depth in zip(self.e_ratios, self.layers, strict=True)):
            raise TersorError(f"e_ratios {self.e_ratios} does not give a ratio to each of the blocks {self.layers}")
        if self.vit_num and math.ceil(self.resolution / 16) % 2:
            raise TersorError(
                f"resolution {self.resolution} leaves an odd grid of {math.ceil(self.resolution / 16)} in stage 3, "
                "which halving and doubling does not restore; take a multiple of 32"
            )


def conv_and_norm(
    d_in: int, d_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(d_in, d_out, kernel, stride, kernel // 2, groups=groups), nn.BatchNorm2d(d_out)


def conv_norm(d_in: int, d_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(*conv_and_norm(d_in, d_out, kernel, stride=stride, groups=groups))


def heads(x: Tensor) -> Tensor:
    """Channels are head-major: (b, h d, y, x) -> (b, h, y x, d)."""
    return rearrange(x, "b (h d) y x -> b h (y x) d", h=HEADS)


class Attention(nn.Module):
    """A(x) of the module docstring. side: of the map that comes in."""

    KEY_DIM, VALUE_DIM = 32, 128
    offsets: Tensor

    def __init__(self, d: int, side: int, *, strided: bool) -> None:
        super().__init__()
        keys, values = HEADS * self.KEY_DIM, HEADS * self.VALUE_DIM
        self.side = math.ceil(side / 2) if strided else side
        self.stride_conv = conv_norm(d, d, 3, stride=2, groups=d) if strided else None
        self.q = conv_norm(d, keys)
        self.k = conv_norm(d, keys)
        self.v = conv_norm(d, values)
        self.v_local = conv_norm(values, values, 3, groups=values)
        self.talking_head1 = nn.Conv2d(HEADS, HEADS, 1)
        self.talking_head2 = nn.Conv2d(HEADS, HEADS, 1)
        self.proj = nn.Sequential(nn.GELU(), *conv_and_norm(values, d))
        self.attention_biases = nn.Parameter(torch.zeros(HEADS, self.side**2))
        self.register_buffer("offsets", offset_index(self.side), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        q, k, v = heads(self.q(x)), heads(self.k(x)), self.v(x)
        scores = q @ k.transpose(-1, -2) * self.KEY_DIM**-0.5 + self.attention_biases[:, self.offsets]  # (b, h, n, n)
        weights = self.talking_head2(self.talking_head1(scores).softmax(-1))
        y = rearrange(weights @ heads(v), "b h (y x) d -> b (h d) y x", y=self.side) + self.v_local(v)
        if self.stride_conv is not None:
            y = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.proj(y)


class StridedQuery(nn.Module):
    """Every second pixel, plus a strided depthwise convolution around it."""

    def __init__(self, d: int, d_out: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv2d(d, d, 3, 2, 1, groups=d))
        self.proj = conv_norm(d, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.local(x) + x[:, :, ::2, ::2])


class AttentionDownsample(nn.Module):
    """Attention from every second pixel to all: half the height and width, d_in -> d_out."""

    KEY_DIM, VALUE_DIM = 16, 64
    offsets: Tensor

    def __init__(self, d_in: int, d_out: int, side: int) -> None:
        super().__init__()
        keys, values = HEADS * self.KEY_DIM, HEADS * self.VALUE_DIM
        self.side = side
        self.q = StridedQuery(d_in, keys)
        self.k = conv_norm(d_in, keys)
        self.v = conv_norm(d_in, values)
        self.v_local = conv_norm(values, values, 3, stride=2, groups=values)
        self.proj = nn.Sequential(nn.GELU(), *conv_and_norm(values, d_out))
        self.attention_biases = nn.Parameter(torch.zeros(HEADS, side**2))
        self.register_buffer("offsets", offset_index(side, stride=2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x)
        bias = self.attention_biases[:, self.offsets]  # (h, queries, keys)
        y = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(x)), heads(v), attn_mask=bias)
        y = rearrange(y, "b h (y x) d -> b (h d) y x", y=math.ceil(self.side / 2)) + self.v_local(v)
        return self.proj(y)


class ConvEmbedding(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.proj, self.norm = conv_and_norm(d_in, d_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class AttentionEmbedding(nn.Module):
    def __init__(self, d_in: int, d_out: int, side: int) -> None:
        super().__init__()
        self.attn = AttentionDownsample(d_in, d_out, side)
        self.conv, self.bn = conv_and_norm(d_in, d_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x) + self.bn(self.conv(x))


class Mlp(nn.Module):
    """M(x) of the module docstring."""

    def __init__(self, d: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1, self.norm1 = conv_and_norm(d, hidden)
        self.mid, self.mid_norm = conv_and_norm(hidden, hidden, 3, groups=hidden)
        self.fc2, self.norm2 = conv_and_norm(hidden, d)
        self.drop = nn.Dropout(drop)
        for conv in (self.fc1, self.fc2):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.fc1(x)))
        x = self.drop(F.gelu(self.mid_norm(self.mid(x))))
        return self.drop(self.norm2(self.fc2(x)))


class Block(nn.Module):
    """mixer: A(x), or None for a block that is M(x) alone."""

    def __init__(
        self, d: int, ratio: float, config: EfficientFormerV2Config, drop_path: float, mixer: Attention | None
    ) -> None:
        super().__init__()
        scales = [nn.Parameter(torch.full((d, 1, 1), config.layer_scale_init_value)) for _ in range(2)]
        self.layer_scale_1 = scales[0] if config.use_layer_scale and mixer else None
        self.layer_scale_2 = scales[1] if config.use_layer_scale else None
        self.token_mixer = mixer
        self.mlp = Mlp(d, int(d * ratio), config.drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        g1, g2 = (1 if g is None else g for g in (self.layer_scale_1, self.layer_scale_2))
        if self.token_mixer is not None:
            x = x + self.drop_path(g1 * self.token_mixer(x))
        return x + self.drop_path(g2 * self.mlp(x))


def stem(in_chans: int, d: int) -> nn.Sequential:
    """image (B, in_chans, H, W) -> (B, d, H/4, W/4), with an activation also at the end."""
    return nn.Sequential(
        *conv_and_norm(in_chans, d // 2, 3, stride=2), nn.GELU(), *conv_and_norm(d // 2, d, 3, stride=2), nn.GELU()
    )


@register(
    "efficientformerv2",
    task="classify",
    input="image",
    paper="arXiv 2212.08059",
    variants={
        "efficientformerv2_s0": (
            3_600_256,
            {
                "embed_dims": (32, 48, 96, 176),
                "layers": (2, 2, 6, 4),
                "e_ratios": ((4, 4), (4, 4), (4, 3, 3, 3, 4, 4), (4, 3, 3, 4)),
                "vit_num": 2,
            },
        ),
        "efficientformerv2_s1": (
            6_185_560,
            {
                "embed_dims": (32, 48, 120, 224),
                "layers": (3, 3, 9, 6),
                "e_ratios": ((4, 4, 4), (4, 4, 4), (4, 4, 3, 3, 3, 3, 4, 4, 4), (4, 4, 3, 3, 4, 4)),
                "vit_num": 2,
            },
        ),
        "efficientformerv2_s2": (
            12_710_112,
            {
                "embed_dims": (32, 64, 144, 288),
                "layers": (4, 4, 12, 8),
                "e_ratios": (
                    (4, 4, 4, 4),
                    (4, 4, 4, 4),
                    (4, 4, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4),
                    (4, 4, 3, 3, 3, 3, 4, 4),
                ),
                "vit_num": 4,
                "drop_path_rate": 0.02,
            },
        ),
        "efficientformerv2_l": (26_322_288, {"vit_num": 6, "drop_path_rate": 0.1}),
    },
    small={
        "embed_dims": (16, 16, 16, 24),
        "layers": (1, 1, 2, 2),
        "e_ratios": ((2,), (2,), (2, 3), (3, 2)),
        "vit_num": 1,
        "num_classes": 10,
        "resolution": 64,
    },
)
class EfficientFormerV2(nn.Module):
    """image (B, C, R, R) -> logits (B, num_classes), or with fork_feat the maps [(B, d, R/4, R/4), ..., R/32]."""

    def __init__(self, config: EfficientFormerV2Config) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = stem(config.in_chans, config.embed_dims[0])
        self.network = nn.ModuleList()
        side = math.ceil(config.resolution / 4)
        rates = linear_rates(config.drop_path_rate, config.layers)
        for stage, (d, depth) in enumerate(zip(config.embed_dims, config.layers, strict=True)):
            blocks = nn.Sequential()
            for index in range(depth):
                attends = stage >= 2 and index >= depth - config.vit_num
                mixer = Attention(d, side, strided=stage == 2) if attends else None
                blocks.append(Block(d, config.e_ratios[stage][index], config, rates[stage][index], mixer))
            self.network.append(blocks)
            if stage < 3 and (config.downsamples[stage] or d != config.embed_dims[stage + 1]):
                d_out = config.embed_dims[stage + 1]
                self.network.append(AttentionEmbedding(d, d_out, side) if stage == 2 else ConvEmbedding(d, d_out))
                side = math.ceil(side / 2)

        if config.fork_feat:
            self.norm0, self.norm2, self.norm4, self.norm6 = (nn.BatchNorm2d(d) for d in config.embed_dims)
        else:
            d = config.embed_dims[3]
            self.norm = nn.BatchNorm2d(d)
            self.head = nn.Linear(d, config.num_classes) if config.num_classes else nn.Identity()
            if config.distillation:
                self.dist_head = nn.Linear(d, config.num_classes) if config.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def features(self, image: Tensor) -> list[Tensor]:
        """The stages' maps, strides 4, 8, 16, 32; normed with fork_feat."""
        wanted = self.config.resolution
        if any(-(-side // 16) != -(-wanted // 16) for side in image.shape[-2:]):
            found = " x ".join(map(str, image.shape[-2:]))
            raise TersorError(
                f"the model takes images of {wanted} x {wanted} pixels, not {found}; resolution sets another size"
            )
        x, maps = self.patch_embed(image), []
        for stage in self.network:
            x = stage(x)
            if isinstance(stage, nn.Sequential):  # a stage, not what stands between two
                maps.append(x)
        if self.config.fork_feat:
            norms = (self.norm0, self.norm2, self.norm4, self.norm6)
            return [norm(features) for norm, features in zip(norms, maps, strict=True)]
        return maps

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor] | list[Tensor]:
        maps = self.features(image)
        if self.config.fork_feat:
            return maps
        x = self.norm(maps[-1]).mean((2, 3))
        if not self.config.distillation:
            return self.head(x)
        logits, distilled = self.head(x), self.dist_head(x)
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, self.config.resolution, self.config.resolution)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = self.state_dict()
        converted = {}
        for key, value in state.items():
            key = _published_name(key)
            if key.endswith("attention_bias_idxs"):
                continue
            if self.config.fork_feat and key.startswith(("norm.", "head.", "dist_head.")):
                continue
            if key.endswith("attention_biases") and key in wanted:
                value = resize_table(value, round(wanted[key].shape[1] ** 0.5))
            if key.endswith(("layer_scale_1", "layer_scale_2")):
                value = value.reshape(-1, 1, 1)  # timm's are flat
            converted[key] = value
        if self.config.fork_feat:
            fresh = {key: value for key, value in wanted.items() if key.startswith("norm")}
            converted = {**fresh, **converted}
        return converted


def _published_name(key: str) -> str:
    """timm's key -> the published one; any other key unchanged. timm writes each pair of layers as .conv and .bn."""

    def pair(prefix: str, conv: str, norm: str) -> None:
        nonlocal key
        key = re.sub(rf"{prefix}\.conv\.", f"{conv}.", key)
        key = re.sub(rf"{prefix}\.bn\.", f"{norm}.", key)

    pair(r"^stem\.conv1", "patch_embed.0", "patch_embed.1")
    pair(r"^stem\.conv2", "patch_embed.3", "patch_embed.4")
    pair(r"^stages\.1\.downsample\.conv", "network.1.proj", "network.1.norm")
    pair(r"^stages\.2\.downsample\.conv", "network.3.proj", "network.3.norm")
    pair(r"^stages\.3\.downsample\.conv", "network.5.conv", "network.5.bn")
    pair(r"\.mlp\.fc1", ".mlp.fc1", ".mlp.norm1")
    pair(r"\.mlp\.mid", ".mlp.mid", ".mlp.mid_norm")
    pair(r"\.mlp\.fc2", ".mlp.fc2", ".mlp.norm2")
    pair(r"\.q\.proj", ".q.proj.0", ".q.proj.1")
    pair(r"\.proj", ".proj.1", ".proj.2")
    for name in ("q", "k", "v", "v_local", "stride_conv"):
        pair(rf"\.{name}", f".{name}.0", f".{name}.1")
    key = re.sub(r"^stages\.3\.downsample\.attn\.", "network.5.attn.", key)
    key = re.sub(r"\.q\.local\.(weight|bias)$", r".q.local.0.\1", key)
    key = re.sub(r"^stages\.(\d)\.blocks\.", lambda match: f"network.{2 * int(match[1])}.", key)
    key = re.sub(r"\.ls([12])\.gamma$", r".layer_scale_\1", key)
    return re.sub(r"^head_dist\.", "dist_head.", key)
