"""MobileViT and MobileViTV2: inverted residuals with transformer blocks in between (Mehta and Rastegari, ICLR 2022,
arXiv 2110.02178, and TMLR 2023, arXiv 2206.02680).

What it is for: image classification, and a backbone, on phones; the baseline that later mobile transformers are measured
by. V1 attends among equally placed pixels of all patches; V2's "separable" attention is linear in the number of tokens
and has no product of two activations larger than a sum.

    model = tersor.models.load("mobilevitv2_100", "mobilevitv2_100.safetensors")   # timm's checkpoints
    logits = model(image)                                # image (B, 3, H, W), scaled to [0, 1] and not normalised
    maps = model.features(image)                         # five maps, strides 2, 4, 8, 16, 32

Five stages of inverted residuals, x [B, C, H, W], SiLU throughout; stages 3 to 5 end with the block of this paper:

    V1   y = W_D SiLU(BN(conv3x3 x))                     C -> D
         tokens [B 4, N, D]: the 2x2 patches are a sequence of N, for each of the 4 places in a patch separately
         L times  y += MHA(LN(y)),  y += W2 SiLU(W1 LN(y));  then LN, and back to a map
         out = SiLU(BN(conv3x3 [x, SiLU(BN(W_C y))]))    2C -> C
    V2   y = W_D SiLU(BN(DW3x3 x))                       C -> D = C/2
         L times  y += LSA(GN(y)),  y += W2 SiLU(W1 GN(y));  then GN, GN over all of (D, 4, N)
         out = BN(W_C y)                                 no activation, no residual
         LSA:  q, k, v = W y  (1, D, D channels);  Wo (ReLU(v) * sum_N k softmax_N(q))

Origin: the layout and the numbers are those of timm 1.0.31 (timm/models/mobilevit.py, byobnet.py, Apache-2.0), into
which the weights of apple/ml-cvnets were brought. A map with an odd side is resized to the next even one: V1 does it
after its convolutions, with align_corners=False, and back again; V2 does it before, with align_corners=True, and the
larger map stays, so that a 5 x 5 map leaves the block as 6 x 6.

Proven: the golden cases of timm (xxs and V2-0.5 at 160 pixels, where both resizing rules act), parameter counts.
Not proven: ImageNet accuracy (69.0, 74.8, 78.4 and 70.2 to 81.2 published); the count of semobilevit_s and of the V2
widths 1.25 and 1.75 is ours, not published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides
from tersor.layers.patch_embed import check_image
from tersor.models.registry import register

PATCH = 2  # pixels a side, of both papers
V1_DEPTHS = (1, 3, 1, 1, 1)  # inverted residuals a stage
V2_DEPTHS = (1, 2, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class MobileViTConfig:
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns pooled features
    stem_width: int = 16
    widths: tuple[int, ...] = (32, 64, 96, 128, 160)  # C of each stage
    dims: tuple[int, ...] = (144, 192, 240)  # D of the transformers of the last three
    depths: tuple[int, ...] = (2, 4, 3)  # their layers
    num_heads: int = 4
    bottle_ratio: float = 4.0  # hidden width of an inverted residual over its input's
    mlp_ratio: float = 2.0
    num_features: int = 640  # width of the last 1x1 convolution
    se_ratio: float = 0.0  # squeeze-excite in the inverted residuals; 0: none

    def __post_init__(self) -> None:
        _check_stages("mobilevit", self.widths, self.dims, self.depths)
        for d in self.dims:
            divides("mobilevit", "num_heads", self.num_heads, "dims", d)


@dataclass(frozen=True, kw_only=True)
class MobileViTV2Config:
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns pooled features
    multiplier: float = 1.0  # of all widths
    depths: tuple[int, ...] = (2, 4, 3)  # layers of the transformers of the last three stages
    bottle_ratio: float = 2.0  # hidden width of an inverted residual over its input's
    transformer_ratio: float = 0.5  # D over C
    mlp_ratio: float = 2.0

    def __post_init__(self) -> None:
        at_least("mobilevitv2", 0.125, multiplier=self.multiplier)
        _check_stages("mobilevitv2", self.widths, self.dims, self.depths)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(int(c * self.multiplier) for c in (64, 128, 256, 384, 512))

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(round8(c * self.transformer_ratio) for c in self.widths[2:])


def _check_stages(model: str, widths: tuple[int, ...], dims: tuple[int, ...], depths: tuple[int, ...]) -> None:
    for name, values, count in (("widths", widths, 5), ("dims", dims, 3), ("depths", depths, 3)):
        if len(values) != count or min(values) < 1:
            raise TersorError(f"{model} needs {count} positive {name}, not {values}")


def round8(width: float) -> int:
    """The nearest multiple of 8, at least 8, and the next one where that would lose over a tenth."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


class ConvNorm(nn.Module):
    """Bias-free convolution, BatchNorm, and SiLU unless `linear`."""

    def __init__(
        self, d_in: int, d_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(d_in, d_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(d_out)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if self.linear else F.silu(x)


class SqueezeExcite(nn.Module):
    def __init__(self, d: int, ratio: float) -> None:
        super().__init__()
        hidden = max(8, int(d * ratio + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(d, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class InvertedResidual(nn.Module):
    def __init__(self, d_in: int, d_out: int, *, stride: int, ratio: float, se_ratio: float = 0.0) -> None:
        super().__init__()
        hidden = round8(d_in * ratio)
        self.conv1_1x1 = ConvNorm(d_in, hidden)
        self.conv2_kxk = ConvNorm(hidden, hidden, 3, stride=stride, groups=hidden)
        self.attn = SqueezeExcite(hidden, se_ratio) if se_ratio else nn.Identity()
        self.conv3_1x1 = ConvNorm(hidden, d_out, linear=True)
        self.adds = stride == 1 and d_in == d_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3_1x1(self.attn(self.conv2_kxk(self.conv1_1x1(x))))
        return x + y if self.adds else y


class SelfAttention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """`linear` makes the two maps: over the last axis in V1, over the channels of a map in V2."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class PreNormLayer(nn.Module):
    """x += attn(norm1(x)), x += mlp(norm2(x))."""

    def __init__(self, norms: tuple[nn.Module, nn.Module], attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attn, self.mlp = attn, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MobileViTBlock(nn.Module):
    """V1's block of the module docstring."""

    def __init__(self, c: int, d: int, depth: int, config: MobileViTConfig) -> None:
        super().__init__()
        hidden = int(d * config.mlp_ratio)
        self.conv_kxk = ConvNorm(c, c, 3)
        self.conv_1x1 = nn.Conv2d(c, d, 1, bias=False)
        self.transformer = nn.Sequential(
            *(
                PreNormLayer(
                    (nn.LayerNorm(d), nn.LayerNorm(d)),
                    SelfAttention(d, config.num_heads),
                    Mlp(nn.Linear(d, hidden), nn.Linear(hidden, d)),
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(d)
        self.conv_proj = ConvNorm(d, c)
        self.conv_fusion = ConvNorm(2 * c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_1x1(self.conv_kxk(x))
        size = (y.shape[2], y.shape[3])
        y = resize(y, even(size), align_corners=False)
        batch, rows = y.shape[0], y.shape[2] // PATCH
        y = rearrange(y, "b d (h p) (w q) -> (b p q) (h w) d", p=PATCH, q=PATCH)
        y = self.norm(self.transformer(y))
        y = rearrange(y, "(b p q) (h w) d -> b d (h p) (w q)", b=batch, p=PATCH, h=rows)
        y = self.conv_proj(resize(y, size, align_corners=False))
        return self.conv_fusion(torch.cat((x, y), 1))


class SeparableAttention(nn.Module):
    """LSA of the module docstring: x [B, D, 4, N]; the softmax is over N, for each place in a patch."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.widths = (1, d, d)
        self.qkv_proj = nn.Conv2d(d, 1 + 2 * d, 1)
        self.out_proj = nn.Conv2d(d, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).split(self.widths, dim=1)
        context = (k * q.softmax(-1)).sum(-1, keepdim=True)  # [B, D, 4, 1]
        return self.out_proj(v.relu() * context)


class MobileViTV2Block(nn.Module):
    """V2's block of the module docstring."""

    def __init__(self, c: int, d: int, depth: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(d * mlp_ratio)
        self.conv_kxk = ConvNorm(c, c, 3, groups=c)
        self.conv_1x1 = nn.Conv2d(c, d, 1, bias=False)
        self.transformer = nn.Sequential(
            *(
                PreNormLayer(
                    (nn.GroupNorm(1, d), nn.GroupNorm(1, d)),
                    SeparableAttention(d),
                    Mlp(nn.Conv2d(d, hidden, 1), nn.Conv2d(hidden, d, 1)),
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.GroupNorm(1, d)
        self.conv_proj = ConvNorm(d, c, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        x = resize(x, even((x.shape[2], x.shape[3])), align_corners=True)  # and it stays so
        y = self.conv_1x1(self.conv_kxk(x))
        rows = y.shape[2] // PATCH
        y = rearrange(y, "b d (h p) (w q) -> b d (p q) (h w)", p=PATCH, q=PATCH)
        y = self.norm(self.transformer(y))
        return self.conv_proj(rearrange(y, "b d (p q) (h w) -> b d (h p) (w q)", p=PATCH, h=rows))


class Classifier(nn.Module):
    def __init__(self, d: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


@register(
    "mobilevit",
    task="classify",
    input="image",
    paper="arXiv 2110.02178",
    variants={
        "mobilevit_xxs": (
            1_272_024,
            {"widths": (16, 24, 48, 64, 80), "dims": (64, 80, 96), "bottle_ratio": 2.0, "num_features": 320},
        ),
        "mobilevit_xs": (
            2_317_848,
            {"widths": (32, 48, 64, 80, 96), "dims": (96, 120, 144), "num_features": 384},
        ),
        "mobilevit_s": (5_578_632, {}),
        "semobilevit_s": (5_737_392, {"se_ratio": 0.125}),
    },
    small={
        "num_classes": 10,
        "widths": (8, 8, 16, 16, 24),
        "dims": (16, 16, 24),
        "depths": (1, 2, 1),
        "bottle_ratio": 2.0,
        "num_features": 32,
        "se_ratio": 0.125,
    },
)
class MobileViT(nn.Module):
    """image (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: MobileViTConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvNorm(config.in_chans, config.stem_width, 3, stride=2)
        blocks = [
            MobileViTBlock(*sizes, config) for sizes in zip(config.widths[2:], config.dims, config.depths, strict=True)
        ]
        widths = (config.stem_width, *config.widths)
        self.stages = stages(widths, V1_DEPTHS, config.bottle_ratio, blocks, se_ratio=config.se_ratio)
        self.final_conv = ConvNorm(config.widths[-1], config.num_features)
        self.head = Classifier(config.num_features, config.num_classes)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.final_conv(self.features(image)[-1]))

    def features(self, image: Tensor) -> list[Tensor]:
        """The maps after the five stages: strides 2, 4, 8, 16, 32."""
        check_image("mobilevit", image, channels=self.config.in_chans)
        return run_stages(self.stages, self.stem(image))

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, 96, 96)}


@register(
    "mobilevitv2",
    task="classify",
    input="image",
    paper="arXiv 2206.02680",
    variants={
        "mobilevitv2_050": (1_370_593, {"multiplier": 0.5}),
        "mobilevitv2_075": (2_866_009, {"multiplier": 0.75}),
        "mobilevitv2_100": (4_901_841, {}),
        "mobilevitv2_125": (7_478_089, {"multiplier": 1.25}),
        "mobilevitv2_150": (10_594_753, {"multiplier": 1.5}),
        "mobilevitv2_175": (14_251_833, {"multiplier": 1.75}),
        "mobilevitv2_200": (18_449_329, {"multiplier": 2.0}),
    },
    small={"num_classes": 10, "multiplier": 0.125, "depths": (1, 2, 1)},
)
class MobileViTV2(nn.Module):
    """image (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: MobileViTV2Config) -> None:
        super().__init__()
        self.config = config
        stem = int(32 * config.multiplier)
        self.stem = ConvNorm(config.in_chans, stem, 3, stride=2)
        sizes = zip(config.widths[2:], config.dims, config.depths, strict=True)
        blocks = [MobileViTV2Block(*size, config.mlp_ratio) for size in sizes]
        self.stages = stages((stem, *config.widths), V2_DEPTHS, config.bottle_ratio, blocks)
        self.head = Classifier(config.widths[-1], config.num_classes)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image)[-1])

    def features(self, image: Tensor) -> list[Tensor]:
        """The maps after the five stages: strides 2, 4, 8, 16, 32, the last three with even sides."""
        check_image("mobilevitv2", image, channels=self.config.in_chans)
        return run_stages(self.stages, self.stem(image))

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, 96, 96)}


def stages(
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    ratio: float,
    blocks: Sequence[nn.Module],
    *,
    se_ratio: float = 0.0,
) -> nn.Sequential:
    """Five stages of inverted residuals, each but the first with stride 2; the last three end with a block."""
    made = nn.Sequential()
    for stage, depth in enumerate(depths):
        layers: list[nn.Module] = []
        for index in range(depth):
            d_in = widths[stage] if index == 0 else widths[stage + 1]
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(InvertedResidual(d_in, widths[stage + 1], stride=stride, ratio=ratio, se_ratio=se_ratio))
        made.append(nn.Sequential(*layers, *blocks[stage - 2 : stage - 1] if stage > 1 else ()))
    return made


def run_stages(sequence: nn.Sequential, x: Tensor) -> list[Tensor]:
    maps = []
    for stage in sequence:
        x = stage(x)
        maps.append(x)
    return maps


def even(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] + size[0] % PATCH, size[1] + size[1] % PATCH


def resize(x: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    if (x.shape[2], x.shape[3]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
