"""SHViT, the single-head vision transformer (Yun and Ro, CVPR 2024, arXiv 2401.16456).

What it is for: image classification, and a backbone, on phones, CPUs and GPUs where tokens are expensive. The stem
divides the image by 16, so even the first of three stages has few tokens, and attention has one head that sees only a
part of the channels.

    model = tersor.models.load("shvit_s1", "shvit_s1.pth")    # official or timm checkpoint
    logits = model(image)                                     # image (B, 3, H, W), ImageNet-normalised; any H, W
    fast = model.fuse()                                       # BatchNorms and depthwise residuals folded away

A block is three residual steps, x [B, d, H, W]:

    x = x + DW3x3(x)                                          linear
    x = x + SHSA(x)                                           type "s" only; type "i" has no mixer
    x = x + W2 ReLU(W1 x)                                     1x1 convolutions, hidden 2d

    SHSA:  x1, x2 = x[:p], x[p:];   q, k, v = Wqkv GN(x1);   y1 = v softmax(q^T k / sqrt(dk))^T
           output = Wo ReLU([y1, x2])                         the ReLU also hits the channels that passed by

Every convolution is bias-free and followed by BatchNorm. GN is one group over (p, H, W) together, not a norm per token.
The stages have strides 16, 32, 64: images below 64 pixels leave a single token in the last one.

Origin: ysj9909/SHViT at 6a729cc (model/shvit.py), MIT. Its key names are ours. timm's names are mapped, and 2-D weights
for 1x1 kernels, which some official files hold, are accepted.
With `distillation` there are two heads: training returns both logits, eval their mean.

Proven: the golden cases of the published code to 1e-6 (tiny ones and S1), parameter counts of S1 to S4, fused outputs equal
to 1e-5, all four variants equal to timm 1.0.31 with random weights in timm's layout. S4 beside MobileViTV2-1.0, published as
3.3 times as fast on a GPU: on an H200, both folded, for 256 pictures 2.3 times in float32, and channels last in a CUDA graph 3.6
times with TF32 and 4.2 times in float16; for 64 pictures 1.6, 3.1 and 3.3 times. For one picture 0.7 times, for there the GPU
waits for the launches of 385 kernels against 276, and 1.2 times at best (benchmarks/results/shvit_attempts.md). On two CPU
threads 1.9 times for one and 6 times for 64 (8.1 published; benchmarks/results/vision_latency.md). So on a GPU:
`fuse().half().to(memory_format=torch.channels_last)`, large batches, a graph. Not proven: ImageNet accuracy (72.8, 75.2, 77.4,
79.4 published).
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class SHViTConfig:
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns pooled features
    embed_dim: tuple[int, ...] = (128, 256, 384)  # d of each stage
    partial_dim: tuple[int, ...] = (32, 64, 96)  # p: channels that attention sees, about d / 4.67
    qk_dim: tuple[int, ...] = (16, 16, 16)
    depth: tuple[int, ...] = (1, 2, 3)
    types: tuple[str, ...] = ("s", "s", "s")  # "s": with attention, "i": without
    distillation: bool = False

    def __post_init__(self) -> None:
        for name in ("embed_dim", "partial_dim", "qk_dim", "depth", "types"):
            if len(getattr(self, name)) != 3:
                raise TersorError(f"shvit has three stages; {name} is {getattr(self, name)}")
        if unknown := set(self.types) - {"s", "i"}:
            raise TersorError(f"shvit block types are 's' and 'i', not {', '.join(sorted(unknown))}")


class ConvNorm(nn.Sequential):
    """Bias-free convolution, then BatchNorm; `scale` is the norm's initial weight (0 makes a residual an identity)."""

    def __init__(
        self, d_in: int, d_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(d_in, d_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(d_out)
        nn.init.constant_(self.bn.weight, scale)

    def fuse(self) -> nn.Conv2d:
        """One convolution: w' = w g / sqrt(var + eps), b' = beta - mean g / sqrt(var + eps)."""
        c, scale, shift = self.c, *_scale_and_shift(self.bn)
        fused = nn.Conv2d(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, groups=c.groups)  # type: ignore[arg-type]
        fused.weight = nn.Parameter(c.weight.detach() * rearrange(scale, "d -> d 1 1 1"))
        fused.bias = nn.Parameter(shift)
        return fused


class NormLinear(nn.Sequential):
    """BatchNorm1d, then the classifier."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(d_in)
        self.l = nn.Linear(d_in, d_out)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def fuse(self) -> nn.Linear:
        scale, shift = _scale_and_shift(self.bn)
        fused = nn.Linear(self.l.in_features, self.l.out_features)
        fused.weight = nn.Parameter(self.l.weight.detach() * scale)
        fused.bias = nn.Parameter(self.l.bias.detach() + self.l.weight.detach() @ shift)
        return fused


class Residual(nn.Module):
    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class FFN(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.pw1 = ConvNorm(d, 2 * d)
        self.pw2 = ConvNorm(2 * d, d, scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.pw1(x).relu())


class SHSA(nn.Module):
    """Single-head self-attention over the first p channels; the others join before the output projection."""

    def __init__(self, d: int, qk_dim: int, p: int) -> None:
        super().__init__()
        self.widths = (qk_dim, qk_dim, p)
        self.pre_norm = nn.GroupNorm(1, p)
        self.qkv = ConvNorm(p, sum(self.widths))
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(d, d, scale=0.0))

    def forward(self, x: Tensor) -> Tensor:
        qk_dim, _, p = self.widths
        x1, x2 = x[:, :p], x[:, p:]
        q, k, v = rearrange(self.qkv(self.pre_norm(x1)), "b c h w -> b c (h w)").split(self.widths, dim=1)
        attention = (q.transpose(1, 2) @ k * qk_dim**-0.5).softmax(-1)  # (b, queries, keys)
        y1 = (v @ attention.transpose(1, 2)).view_as(x1)
        return self.proj(torch.cat((y1, x2), 1))


class Block(nn.Module):
    def __init__(self, d: int, qk_dim: int, p: int, kind: str) -> None:
        super().__init__()
        self.conv = Residual(ConvNorm(d, d, 3, groups=d, scale=0.0))
        self.mixer = Residual(SHSA(d, qk_dim, p)) if kind == "s" else nn.Identity()
        self.ffn = Residual(FFN(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.mixer(self.conv(x)))


class SqueezeExcite(nn.Module):
    """A gate per channel from the global mean; hidden d/4 rounded to the nearest multiple of 8, at least 8."""

    def __init__(self, d: int) -> None:
        super().__init__()
        hidden = max(8, (d // 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(d, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class PatchMerging(nn.Module):
    """Halves height and width, d_in -> d_out, through 4 d_in channels."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        hidden = 4 * d_in
        self.conv1 = ConvNorm(d_in, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, stride=2, groups=hidden)
        self.se = SqueezeExcite(hidden)
        self.conv3 = ConvNorm(hidden, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(self.conv2(self.conv1(x).relu()).relu()))


def downsample(d_in: int, d_out: int) -> list[nn.Module]:
    """What stands at the head of stages 2 and 3."""

    def pair(d: int) -> nn.Sequential:
        return nn.Sequential(Residual(ConvNorm(d, d, 3, groups=d)), Residual(FFN(d)))

    return [pair(d_in), PatchMerging(d_in, d_out), pair(d_out)]


@register(
    "shvit",
    task="classify",
    input="image",
    paper="arXiv 2401.16456",
    variants={
        "shvit_s1": (
            6_330_808,
            {"embed_dim": (128, 224, 320), "depth": (2, 4, 5), "partial_dim": (32, 48, 68), "types": ("i", "s", "s")},
        ),
        "shvit_s2": (
            11_483_072,
            {"embed_dim": (128, 308, 448), "depth": (2, 4, 5), "partial_dim": (32, 66, 96), "types": ("i", "s", "s")},
        ),
        "shvit_s3": (
            14_245_273,
            {"embed_dim": (192, 352, 448), "depth": (3, 5, 5), "partial_dim": (48, 75, 96), "types": ("i", "s", "s")},
        ),
        "shvit_s4": (
            16_588_484,
            {"embed_dim": (224, 336, 448), "depth": (4, 7, 6), "partial_dim": (48, 72, 96), "types": ("i", "s", "s")},
        ),
    },
    small={"num_classes": 10, "embed_dim": (16, 24, 32), "partial_dim": (4, 5, 7), "types": ("i", "s", "s")},
)
class SHViT(nn.Module):
    """image (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: SHViTConfig) -> None:
        super().__init__()
        self.config = config
        d1, d2, d3 = config.embed_dim
        self.patch_embed = nn.Sequential(  # H -> ceil(H/2), four times; no ReLU after the last
            ConvNorm(config.in_chans, d1 // 8, 3, stride=2),
            nn.ReLU(),
            ConvNorm(d1 // 8, d1 // 4, 3, stride=2),
            nn.ReLU(),
            ConvNorm(d1 // 4, d1 // 2, 3, stride=2),
            nn.ReLU(),
            ConvNorm(d1 // 2, d1, 3, stride=2),
        )
        stages = zip(config.embed_dim, config.qk_dim, config.partial_dim, config.types, config.depth, strict=True)
        blocks = [[Block(d, qk, p, kind) for _ in range(depth)] for d, qk, p, kind, depth in stages]
        self.blocks1 = nn.Sequential(*blocks[0])
        self.blocks2 = nn.Sequential(*downsample(d1, d2), *blocks[1])
        self.blocks3 = nn.Sequential(*downsample(d2, d3), *blocks[2])
        self.head = NormLinear(d3, config.num_classes) if config.num_classes else nn.Identity()
        if config.distillation:
            self.head_dist = NormLinear(d3, config.num_classes) if config.num_classes else nn.Identity()

    def features(self, image: Tensor) -> list[Tensor]:
        """The stages' maps, strides 16, 32, 64."""
        x, maps = self.patch_embed(image), []
        for blocks in (self.blocks1, self.blocks2, self.blocks3):
            x = blocks(x)
            maps.append(x)
        return maps

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.features(image)[-1].mean((2, 3))
        if not self.config.distillation:
            return self.head(x)
        logits, distilled = self.head(x), self.head_dist(x)
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, 128, 128)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = self.state_dict()
        converted = {}
        for key, value in state.items():
            key = _published_name(key)
            if key in wanted and value.dim() == 2 and wanted[key].dim() == 4:
                value = value[:, :, None, None]
            converted[key] = value
        return converted

    @torch.no_grad()
    def fuse(self) -> SHViT:
        """A copy for inference: no BatchNorm, and each depthwise residual is one convolution."""
        fused = copy.deepcopy(self).eval()
        _fuse_children(fused)
        return fused


def _scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode as x * scale + shift."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale


def _fuse_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, Residual) and isinstance(child.m, ConvNorm):
            fused = child.m.fuse()
            fused.weight[:, :, 1, 1] += 1  # x + dw(x): the identity is the centre tap of a depthwise kernel
            setattr(module, name, fused)
        elif isinstance(child, (ConvNorm, NormLinear)):
            setattr(module, name, child.fuse())
        else:
            _fuse_children(child)


def _published_name(key: str) -> str:
    """timm's key -> the published one; any other key unchanged."""
    if match := re.fullmatch(r"stages\.0\.blocks\.(.+)", key):
        return f"blocks1.{match[1]}"
    if match := re.fullmatch(r"stages\.([12])\.blocks\.(\d+)\.(.+)", key):
        return f"blocks{int(match[1]) + 1}.{int(match[2]) + 3}.{match[3]}"
    if match := re.fullmatch(r"stages\.([12])\.downsample\.(\d)\.(.+)", key):
        place = ("0.0", "0.1", "1", "2.0", "2.1")[int(match[2])]  # pair, merge, pair
        return f"blocks{int(match[1]) + 1}.{place}.{match[3]}"
    return key
