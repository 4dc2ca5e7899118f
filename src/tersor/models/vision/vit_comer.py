"""ViT-CoMer: a plain ViT and a convolutional pyramid that talk (Xia et al., CVPR 2024, arXiv 2403.07392).

What it is for: a backbone for detection and segmentation that takes a plain ViT as somebody pre-trained it, without
pre-training of its own.

    model = tersor.models.load("vit_comer_s", "upernet_vit_comer_small.pth")     # official checkpoint, or a plain ViT's
    maps = model(image)                                  # image (B, 3, H, W), ImageNet-normalised, multiples of 32
    # four maps (B, D, H/4, W/4), ..., (B, D, H/32, W/32)

Two branches, h = H/16, w = W/16: tokens x [B, h w, D] of the ViT, and c [B, 4hw + hw + hw/4, D], the maps c2, c3, c4 of
strides 8, 16, 32 one behind the other, from a convolutional stem that also gives c1 (stride 4). The ViT's blocks are in
groups; at each of them

    c = MRFP(c)                         W2 GELU(GELU(BN(DW3x3 | DW5x5)))(W1 c), half of the channels each, map by map
    c3 = c3 + x;   a = MSDA(LN c, LN c);   a = a + FFN(LN a)            towards the ViT
    x = x + gamma * (a of each map, resized to h x w, summed)           gamma 0 at first
    x = the group's blocks(x)           x += g1 attention(LN x),  x += g2 W2 GELU(W1 LN x)
    c3 = c3 + x;   c = E(LN c, LN c)    towards the pyramid; E(q, f): q += MSDA(LN q, LN f), q += FFN(LN q)

FFN has a depthwise 3x3 over each map between its two linear maps. MSDA is tersor.kernels.ms_deformable_attention over
the three maps: offsets and weights (softmax over maps and points) are linear in the query. After the last group come
`extra_num` further steps like the last line, with an FFN before E. Then c1 += ConvTranspose(c2), each map gets ViT
features, resized, and a BatchNorm.

Origin: Traffic-X/ViT-CoMer at b57f386 (segmentation/ and detection/, two versions of one class), Apache-2.0. Key names
are theirs. `version` chooses: "segmentation" adds to map i the ViT's features after interaction i, so it has four;
"detection" adds the last ones to all, has MRFP only where it is used, and of half the width. The result towards the
pyramid is built on LN c, as published. Attention is full or in windows of `window_size`, per block; padded keys of a
window are zero vectors and take part in the softmax. The published large model needs a class that was not published.
Its option `residual_indices` (convolutions after some blocks of the detection version, off in all configurations) is not
here. A plain ViT's checkpoint fills the ViT branch and leaves the rest fresh.

Proven: the golden cases of the published code (operator, both versions, T at 224 pixels), parameter counts of T, S, B
and detection S (that of its position embedding for 592 pixels, for DINOv2's weights, is counted here); the kernel's
gradients on CPU and GPU. Not proven: mIoU 43.5, 46.5, 48.8 with UperNet on ADE20K and the detection results as published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.kernels.ms_deformable_attention import ms_deformable_attention
from tersor.layers import windows
from tersor.layers.checks import divides, one_of
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.patch_embed import check_image
from tersor.layers.positions import resize_grid
from tersor.models import key_maps
from tersor.models.registry import register

PATCH = 16  # pixels a side; the strides of the pyramid count on it
Sizes = list[tuple[int, int]]  # height and width of c2, c3, c4


@dataclass(frozen=True, kw_only=True)
class ViTCoMerConfig:
    version: str = "segmentation"  # or "detection"
    img_size: int = 224  # sets the size of the position embedding
    pretrain_size: int = 224  # its grid is of so many pixels
    in_chans: int = 3
    embed_dim: int = 768  # D
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0  # of the ViT's last block, earlier ones linearly less; of all FFNs of the interactions
    layer_scale: bool = True  # g1, g2
    window_attn: tuple[bool, ...] | bool = False  # of all blocks, or of each
    window_size: tuple[int | None, ...] | int | None = 14
    conv_inplane: int = 64  # width of the convolutional stem
    n_points: int = 4  # of MSDA, a head and map
    deform_num_heads: int = 6
    deform_ratio: float = 1.0  # width inside MSDA over D
    init_values: float = 0.0  # of gamma
    interaction_indexes: tuple[tuple[int, int], ...] = (
        (0, 2),
        (3, 5),
        (6, 8),
        (9, 11),
    )  # first and last block of a group
    with_cffn: bool = True  # FFNs behind the attention towards the pyramid
    cffn_ratio: float = 0.25
    add_vit_feature: bool = True
    use_extra_CTI: bool = True  # noqa: N815  published names, here and below
    extra_num: int = 4
    use_CTI_toV: tuple[bool, ...] | bool = True  # noqa: N815  the step towards the ViT, in all groups or each
    use_CTI_toC: tuple[bool, ...] | bool = True  # noqa: N815  the step towards the pyramid
    cnn_feature_interaction: tuple[bool, ...] | bool = True  # False: that step only adds x
    dim_ratio: float = 6.0  # width inside MRFP over D; 0.5 in the detection version

    def __post_init__(self) -> None:
        name = "vit_comer"
        one_of(name, "version", self.version, ("segmentation", "detection"))
        divides(name, "num_heads", self.num_heads, "embed_dim", self.embed_dim)
        divides(name, "deform_num_heads", self.deform_num_heads, "deform_ratio embed_dim", self.deform_dim)
        if self.img_size // PATCH != self.pretrain_size // PATCH:
            raise TersorError(
                f"{name}'s position embedding is of img_size {self.img_size} and read as pretrain_size "
                f"{self.pretrain_size}: give both the same grid of {PATCH} pixels"
            )
        groups = len(self.interaction_indexes)
        if not groups or any(not 0 <= first <= last < self.depth for first, last in self.interaction_indexes):
            raise TersorError(f"{name}'s interaction_indexes {self.interaction_indexes} are not in 0..{self.depth - 1}")
        if self.version == "segmentation" and self.add_vit_feature and groups != 4:
            raise TersorError(f"{name} adds the ViT's features of four interactions, here are {groups}")
        for option in ("use_CTI_toV", "use_CTI_toC", "cnn_feature_interaction"):
            self._each(option, groups)
        for block, size in enumerate(self.window_sizes):
            if size is not None and size < 1:
                raise TersorError(f"{name}'s window_size of block {block} is {size}")

    @property
    def deform_dim(self) -> int:
        return int(self.embed_dim * self.deform_ratio)

    @property
    def window_sizes(self) -> list[int | None]:
        """Of each block; None: attention over the whole image."""
        sizes = self._each("window_size", self.depth)
        used = self._each("window_attn", self.depth)
        for size, is_used in zip(sizes, used, strict=True):
            if is_used and size is None:
                raise TersorError(f"vit_comer's window_attn {self.window_attn} needs a window_size, not None")
        return [size if is_used else None for size, is_used in zip(sizes, used, strict=True)]

    def _each(self, option: str, count: int) -> list[int | None]:
        value = getattr(self, option)
        values = list(value) if isinstance(value, tuple) else [value] * count
        if len(values) != count:
            raise TersorError(f"vit_comer's {option} has {len(values)} entries for {count}")
        return values


def to_maps(c: Tensor, sizes: Sizes) -> list[Tensor]:
    """Tokens (B, N, D) -> the maps (B, D, height, width) of the three levels."""
    parts = torch.split(c, [height * width for height, width in sizes], 1)
    return [part.transpose(1, 2).reshape(*c.shape[::2], *size) for part, size in zip(parts, sizes, strict=True)]


def to_tokens(maps: list[Tensor]) -> Tensor:
    return torch.cat([each.flatten(2) for each in maps], 2).transpose(1, 2)


def add_to_middle(c: Tensor, x: Tensor, sizes: Sizes) -> Tensor:
    """x added to the tokens of stride 16."""
    c2, c3, c4 = torch.split(c, [height * width for height, width in sizes], 1)
    return torch.cat((c2, c3 + x, c4), 1)


def reference_points(sizes: Sizes, like: Tensor) -> Tensor:
    """(N, 2): x and y of each token's centre, 0 to 1 from edge to edge."""
    points = []
    for height, width in sizes:
        y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
        points.append(torch.stack((x.expand(height, width), y[:, None].expand(height, width)), -1).flatten(0, 1))
    return torch.cat(points)


class DeformableAttention(nn.Module):
    """MSDA of a pyramid on itself: query and feat (B, N, D), N the tokens of all levels."""

    def __init__(self, config: ViTCoMerConfig) -> None:
        super().__init__()
        d, inner, self.heads = config.embed_dim, config.deform_dim, config.deform_num_heads
        self.samples = (self.heads, 3, config.n_points)
        count = math.prod(self.samples)
        self.sampling_offsets = nn.Linear(d, 2 * count)
        self.attention_weights = nn.Linear(d, count)
        self.value_proj = nn.Linear(d, inner)
        self.output_proj = nn.Linear(inner, d)

    def reset(self) -> None:
        """Each head looks in a direction of its own, each point one pixel further, with equal weights."""
        heads, n_levels, points = self.samples
        angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().max(-1, keepdim=True).values
        steps = torch.arange(1.0, points + 1)[:, None]
        bias = directions[:, None, None] * steps  # (heads, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(heads, n_levels, points, 2).reshape(-1))
        for zero in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(zero)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, feat: Tensor, sizes: Sizes) -> Tensor:
        value = self.value_proj(feat).unflatten(-1, (self.heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.samples, 2))  # (B, N, M, L, P, 2)
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, self.samples[1:])
        pixels = torch.tensor([(width, height) for height, width in sizes], dtype=query.dtype, device=query.device)
        points = reference_points(sizes, query)[:, None, None, None]
        y = ms_deformable_attention(value, sizes, points + offsets / pixels[:, None], weights)
        return self.output_proj(y.flatten(2))


class DepthwiseConv(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(d, d, 3, padding=1, groups=d)

    def forward(self, c: Tensor, sizes: Sizes) -> Tensor:
        return to_tokens([self.dwconv(each) for each in to_maps(c, sizes)])


class ConvFFN(nn.Module):
    def __init__(self, d: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, d)
        self.drop = nn.Dropout(drop)

    def forward(self, c: Tensor, sizes: Sizes) -> Tensor:
        c = self.drop(F.gelu(self.dwconv(self.fc1(c), sizes)))
        return self.drop(self.fc2(c))


class MultiReceptiveConv(nn.Module):
    """On each map: depthwise 3x3 of the first half of the channels, 5x5 of the second, BatchNorm, GELU."""

    def __init__(self, d: int) -> None:
        super().__init__()
        half = d // 2
        for level in range(3):
            self.add_module(f"dwconv{2 * level + 1}", nn.Conv2d(half, half, 3, padding=1, groups=half))
            self.add_module(f"dwconv{2 * level + 2}", nn.Conv2d(half, half, 5, padding=2, groups=half))
            self.add_module(f"bn{level + 1}", nn.BatchNorm2d(2 * half))

    def forward(self, c: Tensor, sizes: Sizes) -> Tensor:
        maps = []
        for level, each in enumerate(to_maps(c, sizes)):
            names = (f"dwconv{2 * level + 1}", f"dwconv{2 * level + 2}")
            parts = [getattr(self, name)(part) for name, part in zip(names, each.chunk(2, 1), strict=True)]
            maps.append(F.gelu(getattr(self, f"bn{level + 1}")(torch.cat(parts, 1))))
        return to_tokens(maps)


class MRFP(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.dwconv = MultiReceptiveConv(hidden)
        self.fc2 = nn.Linear(hidden, d)

    def forward(self, c: Tensor, sizes: Sizes) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(c), sizes)))  # the second GELU is as published


def layer_norm(config: ViTCoMerConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.embed_dim, eps=1e-6)


def conv_ffn(config: ViTCoMerConfig) -> ConvFFN:
    return ConvFFN(config.embed_dim, int(config.embed_dim * config.cffn_ratio), 0.0)


class ToViT(nn.Module):
    """What the pyramid c, after its step, adds to x (B, h w, D)."""

    def __init__(self, config: ViTCoMerConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.embed_dim,), config.init_values))
        self.query_norm, self.feat_norm = layer_norm(config), layer_norm(config)
        self.attn = DeformableAttention(config)
        self.ffn, self.ffn_norm = conv_ffn(config), layer_norm(config)
        self.drop_path = DropPath(config.drop_path_rate)

    def forward(self, x: Tensor, c: Tensor, sizes: Sizes) -> Tensor:
        a = self.attn(self.query_norm(c), self.feat_norm(c), sizes)  # without c: no residual here
        a = a + self.drop_path(self.ffn(self.ffn_norm(a), sizes))
        a2, a3, a4 = to_maps(a, sizes)
        a2 = F.interpolate(a2, size=sizes[1], mode="bilinear", align_corners=False)
        a4 = F.interpolate(a4, size=sizes[1], mode="bilinear", align_corners=False)
        return x + self.gamma * to_tokens([a2 + a3 + a4])


class Extractor(nn.Module):
    """E(q, f) of the module docstring."""

    def __init__(self, config: ViTCoMerConfig) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = layer_norm(config), layer_norm(config)
        self.attn = DeformableAttention(config)
        self.ffn = conv_ffn(config) if config.with_cffn else None
        self.ffn_norm = layer_norm(config) if config.with_cffn else None
        self.drop_path = DropPath(config.drop_path_rate)

    def forward(self, query: Tensor, feat: Tensor, sizes: Sizes) -> Tensor:
        query = query + self.attn(self.query_norm(query), self.feat_norm(feat), sizes)
        if self.ffn is not None and self.ffn_norm is not None:
            query = query + self.drop_path(self.ffn(self.ffn_norm(query), sizes))
        return query


class ToPyramid(nn.Module):
    """What x gives to the pyramid. extra: with an FFN first, as in the steps after the last group."""

    def __init__(self, config: ViTCoMerConfig, *, interacts: bool, extra: bool = False) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = layer_norm(config), layer_norm(config)  # stored even where not used
        self.ffn = conv_ffn(config) if extra and config.with_cffn else None
        self.ffn_norm = layer_norm(config) if extra and config.with_cffn else None
        self.cfinter = Extractor(config) if interacts else None
        self.drop_path = DropPath(config.drop_path_rate)

    def forward(self, c: Tensor, x: Tensor, sizes: Sizes) -> Tensor:
        c = add_to_middle(c, x, sizes)
        if self.ffn is not None and self.ffn_norm is not None:
            c = c + self.drop_path(self.ffn(self.ffn_norm(c), sizes))
        if self.cfinter is not None:
            c = self.cfinter(self.query_norm(c), self.feat_norm(c), sizes)
        return c


class Interaction(nn.Module):
    def __init__(self, config: ViTCoMerConfig, index: int) -> None:
        super().__init__()

        def at(option: tuple[bool, ...] | bool) -> bool:
            return option[index] if isinstance(option, tuple) else option

        to_vit, to_pyramid = at(config.use_CTI_toV), at(config.use_CTI_toC)
        interacts, segments = at(config.cnn_feature_interaction), config.version == "segmentation"
        is_last = index == len(config.interaction_indexes) - 1
        extra_num = (4 if segments else config.extra_num) if is_last and config.use_extra_CTI else 0
        extras = [ToPyramid(config, interacts=interacts, extra=True) for _ in range(extra_num)]
        mrfp_dim = int(config.embed_dim * (config.dim_ratio if segments else 0.5))
        self.cti_tov = ToViT(config) if to_vit else None
        self.cti_toc = ToPyramid(config, interacts=interacts) if to_pyramid else None
        self.extra_CTIs = nn.ModuleList(extras) if extras else None
        self.mrfp = MRFP(config.embed_dim, mrfp_dim) if to_vit or segments else None

    def forward(self, x: Tensor, c: Tensor, blocks: nn.ModuleList, sizes: Sizes) -> tuple[Tensor, Tensor]:
        if self.cti_tov is not None and self.mrfp is not None:
            c = add_to_middle(self.mrfp(c, sizes), x, sizes)
            x = self.cti_tov(x, c, sizes)
        for block in blocks:
            x = block(x, sizes[1])
        for step in (self.cti_toc, *(self.extra_CTIs or ())):
            if step is not None:
                c = step(c, x, sizes)
        return x, c


class Attention(nn.Module):
    """window: of how many tokens a side; None: all see all."""

    def __init__(self, config: ViTCoMerConfig, window: int | None) -> None:
        super().__init__()
        d = config.embed_dim
        self.heads, self.window, self.attn_drop = config.num_heads, window, config.attn_drop_rate
        self.qkv = nn.Linear(d, 3 * d, bias=config.qkv_bias)
        self.proj = nn.Linear(d, d)
        self.drop = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        qkv = self.qkv(x)
        if self.window is None:
            return self.drop(self.proj(self._attend(qkv)))
        window = (self.window, self.window)
        padded = windows.pad_to(qkv.unflatten(1, size), window)  # zero keys, not masked: as published
        y = windows.merge(self._attend(windows.partition(padded, window)), window, padded.shape[1:3])
        return self.drop(self.proj(y[:, : size[0], : size[1]].flatten(1, 2)))

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = rearrange(qkv, "b n (three h p) -> three b h n p", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return rearrange(y, "b h n p -> b n (h p)")


class Mlp(nn.Module):
    def __init__(self, d: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, d)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, config: ViTCoMerConfig, window: int | None, drop_path: float) -> None:
        super().__init__()
        d = config.embed_dim
        self.gamma1 = nn.Parameter(torch.ones(d)) if config.layer_scale else None
        self.gamma2 = nn.Parameter(torch.ones(d)) if config.layer_scale else None
        self.norm1, self.norm2 = layer_norm(config), layer_norm(config)
        self.attn = Attention(config, window)
        self.mlp = Mlp(d, int(d * config.mlp_ratio), config.drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        g1, g2 = (1 if g is None else g for g in (self.gamma1, self.gamma2))
        x = x + self.drop_path(g1 * self.attn(self.norm1(x), size))
        return x + self.drop_path(g2 * self.mlp(self.norm2(x)))


def conv_norm_relu(d_in: int, d_out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False), nn.BatchNorm2d(d_out), nn.ReLU()]


class ConvPyramid(nn.Module):
    """image -> c1, c2, c3, c4, maps of D channels and strides 4, 8, 16, 32."""

    def __init__(self, d_in: int, width: int, d: int) -> None:
        super().__init__()
        stem = [*conv_norm_relu(d_in, width, 2), *conv_norm_relu(width, width, 1), *conv_norm_relu(width, width, 1)]
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        self.conv2 = nn.Sequential(*conv_norm_relu(width, 2 * width, 2))
        self.conv3 = nn.Sequential(*conv_norm_relu(2 * width, 4 * width, 2))
        self.conv4 = nn.Sequential(*conv_norm_relu(4 * width, 4 * width, 2))
        self.fc1, self.fc2 = nn.Conv2d(width, d, 1), nn.Conv2d(2 * width, d, 1)
        self.fc3, self.fc4 = nn.Conv2d(4 * width, d, 1), nn.Conv2d(4 * width, d, 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        c1 = self.stem(image)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return [self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)]


class PatchEmbed(nn.Module):
    def __init__(self, d_in: int, d: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(d_in, d, PATCH, PATCH)

    def forward(self, image: Tensor) -> Tensor:
        return to_tokens([self.proj(image)])


@register(
    "vit_comer",
    task="detect-features",
    input="image",
    paper="arXiv 2403.07392",
    variants={
        "vit_comer_t": (10_619_360, {"embed_dim": 192, "num_heads": 3, "drop_path_rate": 0.1}),
        "vit_comer_s": (31_280_480, {"embed_dim": 384, "num_heads": 6, "dim_ratio": 1.5, "drop_path_rate": 0.2}),
        "vit_comer_b": (
            110_603_648,
            {"deform_num_heads": 12, "deform_ratio": 0.5, "dim_ratio": 1.0, "drop_path_rate": 0.3},
        ),
        "vit_comer_s_detection": (
            30_007_136,
            {
                "version": "detection",
                "embed_dim": 384,
                "num_heads": 6,
                "drop_path_rate": 0.2,
                "window_attn": (True, True, False, True, True, False, True, True, False, True, True, False),
            },
        ),
        "vit_comer_s_detection_592": (
            30_457_568,
            {
                "version": "detection",
                "img_size": 592,
                "pretrain_size": 592,
                "embed_dim": 384,
                "num_heads": 6,
                "drop_path_rate": 0.2,
                "window_attn": (True, True, False, True, True, False, True, True, False, True, True, False),
            },
        ),
    },
    small={
        "version": "detection",
        "img_size": 64,
        "pretrain_size": 64,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "window_attn": (True, False),
        "window_size": 3,
        "conv_inplane": 8,
        "n_points": 2,
        "deform_num_heads": 2,
        "interaction_indexes": ((0, 0), (1, 1)),
        "use_CTI_toV": (True, False),
        "extra_num": 1,
    },
)
class ViTCoMer(nn.Module):
    """image (B, C, H, W) -> four maps (B, D, H/4, W/4), (.. H/8 ..), (.. H/16 ..), (.. H/32 ..)."""

    def __init__(self, config: ViTCoMerConfig) -> None:
        super().__init__()
        self.config = config
        d = config.embed_dim
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (config.img_size // PATCH) ** 2, d).normal_(std=0.02))
        self.level_embed = nn.Parameter(torch.empty(3, d).normal_())
        self.patch_embed = PatchEmbed(config.in_chans, d)
        self.pos_drop = nn.Dropout(config.drop_rate)
        (rates,) = linear_rates(config.drop_path_rate, (config.depth,))
        blocks = zip(config.window_sizes, rates, strict=True)
        self.blocks = nn.ModuleList(Block(config, window, rate) for window, rate in blocks)
        self.spm = ConvPyramid(config.in_chans, config.conv_inplane, d)
        self.interactions = nn.ModuleList(Interaction(config, i) for i in range(len(config.interaction_indexes)))
        self.up = nn.ConvTranspose2d(d, d, 2, 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.BatchNorm2d(d) for _ in range(4))
        _initialise(self)

    def forward(self, image: Tensor) -> list[Tensor]:
        check_image("vit_comer", image, channels=self.config.in_chans, multiple=32)
        h, w = image.shape[2] // PATCH, image.shape[3] // PATCH
        sizes = [(2 * h, 2 * w), (h, w), (h // 2, w // 2)]
        c1, *maps = self.spm(image)
        c = to_tokens([each + level[:, None, None] for each, level in zip(maps, self.level_embed, strict=True)])
        grid = self.config.pretrain_size // PATCH
        positions = resize_grid(self.pos_embed[:, 1:], (grid, grid), (h, w))  # the class token's slot is not used
        x = self.pos_drop(self.patch_embed(image) + positions)

        seen = []
        for interaction, (first, last) in zip(self.interactions, self.config.interaction_indexes, strict=True):
            x, c = interaction(x, c, self.blocks[first : last + 1], sizes)
            seen.append(x.transpose(1, 2).unflatten(2, (h, w)))

        c2, c3, c4 = to_maps(c, sizes)
        outputs = [self.up(c2) + c1, c2, c3, c4]
        if self.config.add_vit_feature:
            features = seen if self.config.version == "segmentation" else [seen[-1]] * 4
            for level, (feature, scale) in enumerate(zip(features, (4.0, 2.0, 1.0, 0.5), strict=True)):
                if scale != 1:
                    feature = F.interpolate(feature, scale_factor=scale, mode="bilinear", align_corners=False)
                outputs[level] = outputs[level] + feature
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        return [norm(each) for norm, each in zip(norms, outputs, strict=True)]

    def features(self, image: Tensor) -> list[Tensor]:
        return self(image)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, 64, 96)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The backbone of a whole detector's or segmenter's checkpoint; or a plain ViT, the rest then stays fresh."""
        if any(key.startswith("backbone.") for key in state):
            state = {
                key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")
            }
        if any(key.startswith("interactions.") for key in state):
            return state
        state = key_maps.drop(state, r"^(cls_token|dist_token|mask_token)$", r"^(norm|head|head_dist|fc_norm)\.")
        state = key_maps.rename(state, (r"\.ls([12])\.gamma$", r".gamma\1"))
        if "pos_embed" in state and state["pos_embed"].dim() == 3:
            grid, old = self.config.pretrain_size // PATCH, math.isqrt(state["pos_embed"].shape[1])
            extra = state["pos_embed"].shape[1] - old * old  # class and distillation tokens
            table = resize_grid(state["pos_embed"], (old, old), (grid, grid), extra=extra)
            state["pos_embed"] = torch.cat((table[:, :1], table[:, extra:]), 1) if extra else table
        vit = ("pos_embed", "patch_embed.", "blocks.")
        fresh = {
            key: value
            for key, value in self.state_dict().items()
            if not key.startswith(vit) or key.endswith(("gamma1", "gamma2"))
        }
        return fresh | state


def _initialise(model: ViTCoMer) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, DeformableAttention):
            module.reset()
