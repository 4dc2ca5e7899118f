"""FMViT, a build of the multiple-frequency mixing vision transformer from its description (Tan, Geng and Xie,
arXiv 2311.05707).

What it is for: image classification that is deployed as plain convolutions, matrix products and ReLUs. In training each
layer is a sum of branches with BatchNorms; `deploy` merges every sum and every norm into one layer.

    model = tersor.models.create("fmvit", num_classes=10)     # training form
    logits = model(image)                                     # image (B, 3, H, W), any sides from 32 pixels
    small = model.deploy()                                    # same outputs, no BatchNorm, one layer in place of each sum

**FMViT's code, weights and tables of sizes were never published.** The abstract names its parts; how they are joined
follows its nearest relatives, Next-ViT (arXiv 2207.05501) and MobileOne (2206.04040). Ours are: every size of the one
variant (Next-ViT-S's layout), the branches of each layer, how the input's own features enter the frequency mixing, and
that every norm is a BatchNorm. No accuracy or speed of the paper is claimed.

Maps x [B, C, H, W]; stages at strides 4, 8, 16, 32 behind a stem of four convolutions. `stages` spells each one's blocks:

    "c", convolutional fusion block:  x = E(x);   x = x + W Rep3x3(x);   x = x + gMLP(BN(x))
    "m", multi-frequency block:       u = E(x) [r C];   low = u + RLMHSA(BN(u))
                                      h = P(low) + P'(x) [(1 - r) C];   high = h + W ReLU(Rep3x3(h))
                                      y = [low, high];   y = y + gMLP(BN(y))
    E: mean of 2x2 (first block of stages 2 to 4), 1x1 convolution and BN where the width changes;  P, P': 1x1 and BN

In "c" too, a ReLU stands between Rep3x3 and W. P', the input's own features, is there with `keep_input`.

    Rep3x3:  `conv_branches` grouped 3x3 convolutions, one 1x1 convolution, and the input, each with a BN, summed
    gMLP:    two 1x1 layers, ReLU between; each a sum of convolutions of `mlp_groups` groups, each with a BN
    RLMHSA:  q, k, v, output: each a sum of `linear_branches` matrices and the input, each with a BN; heads of
             `head_dim`; k and v see the means of s^2 tokens in a row (s = `sr_ratios`), with another BN

Merging: w' = w g / sqrt(var + eps), b' = beta - mean g / sqrt(var + eps) for a convolution and the BN behind it; a 1x1
kernel is the centre of a 3x3 one, the input a kernel of one 1; a convolution of more groups is one of fewer with zeros;
a BN in front of a 1x1 layer scales its columns and adds W (beta - mean g / sqrt(var + eps)) to its bias.
The two forms have different keys (branch lists against `reparam`); the deployed one is created by `deployed=True`.

Origin: none for FMViT (tany0699/FMViT at 40b6bbf holds a licence, Apache-2.0). With one branch a layer and without
`keep_input`, a "m" block is Next-ViT's transformer block.

Proven: that block and the merging against golden cases of timm 1.0.31 (NextTransformerBlock, MobileOneBlock) to 5e-6;
deployed outputs equal to 1e-5 with random BatchNorm statistics. On an H200 it takes about ResNet-101's time, as the paper
says of TensorRT (benchmarks/results/vision_latency.md). Not proven: that this is FMViT; any accuracy.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers import checks
from tersor.layers.conv_norm import scale_and_shift
from tersor.layers.drop_path import DropPath
from tersor.layers.patch_embed import check_image
from tersor.models.registry import register

Affine = tuple[Tensor, Tensor]  # scale and shift of channels


@dataclass(frozen=True, kw_only=True)
class FMViTConfig:
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head and no last norm, forward returns pooled features
    stem_dims: tuple[int, ...] = (
        64,
        32,
        64,
    )  # of three convolutions; a fourth keeps the width
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)  # C of each stage
    stages: tuple[str, ...] = ("ccc", "cccm", "ccccmccccm", "ccm")
    head_dim: int = 32  # also the channels of a group in the 3x3 convolutions
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)  # s
    mix_ratio: float = 0.75  # r
    conv_mlp_ratio: float = 3.0  # of "c" blocks
    mix_mlp_ratio: float = 2.0  # of "m" blocks
    conv_branches: int = 2
    conv_extras: bool = True  # the 1x1 convolution and the input beside the 3x3 convolutions
    linear_branches: int = 2  # 0: plain q, k, v
    mlp_groups: tuple[int, ...] = (1, 2, 4)  # of each branch; (): plain
    keep_input: bool = True
    drop_path_rate: float = 0.0
    deployed: bool = False  # the merged form

    def __post_init__(self) -> None:
        checks.at_least("fmvit", 0, num_classes=self.num_classes, linear_branches=self.linear_branches)
        checks.at_least("fmvit", 1, in_chans=self.in_chans, head_dim=self.head_dim, conv_branches=self.conv_branches)
        checks.same_length("fmvit", embed_dims=self.embed_dims, stages=self.stages, sr_ratios=self.sr_ratios)
        if len(self.stem_dims) != 3:
            raise TersorError(f"fmvit's stem has three convolutions before its last; stem_dims is {self.stem_dims}")
        for blocks in self.stages:
            if not blocks or set(blocks) - {"c", "m"}:
                raise TersorError(f"fmvit's stages are strings of 'c' and 'm', one letter a block, not {blocks!r}")
        for C, s, blocks in zip(self.embed_dims, self.sr_ratios, self.stages, strict=True):
            checks.divides("fmvit", "head_dim", self.head_dim, "embed_dims", C)
            checks.at_least("fmvit", 1, sr_ratios=s)
            for groups in self.mlp_groups:
                checks.divides("fmvit", "mlp_groups", groups, "embed_dims", C)
                for ratio in (self.conv_mlp_ratio, self.mix_mlp_ratio):
                    checks.divides("fmvit", "mlp_groups", groups, "MLP width", int(C * ratio))
            if "m" in blocks and not 0 < self.attention_dim(C) < C:
                raise TersorError(f"fmvit's mix_ratio {self.mix_ratio} leaves one part of {C} channels empty")

    @property
    def smallest_side(self) -> int:
        """Of an image: every mixing block needs s^2 tokens."""
        sides = [s * (4 << i) for i, s in enumerate(self.sr_ratios) if "m" in self.stages[i]]
        return max(32, *sides) if sides else 32

    def attention_dim(self, C: int) -> int:
        """r C to the nearest multiple of head_dim, and at least one head."""
        return max(self.head_dim, int(self.mix_ratio * C / self.head_dim + 0.5) * self.head_dim)


class ConvNorm(nn.Sequential):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels)


class RepConv(nn.Module):
    """A sum of convolutions, each with a BatchNorm: of k x k with `groups` groups, and one of 1x1 (`scale`) and the input
    (`identity`) where they are asked for and go.

    With groups=() it is one convolution with a bias, of `merged_groups` groups: the form that `merged` computes.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        kernel: int = 1,
        *,
        groups: tuple[int, ...] = (1,),
        stride: int = 1,
        scale: bool = False,
        identity: bool = False,
        merged_groups: int = 0,
    ) -> None:
        super().__init__()
        self.d_in, self.d_out, self.kernel = d_in, d_out, kernel
        self.groups = merged_groups or math.gcd(*groups) or 1
        self.reparam = self.conv_scale = self.identity = None

        def conv(kernel: int, groups: int, bias: bool = False) -> nn.Conv2d:
            return nn.Conv2d(d_in, d_out, kernel, stride, kernel // 2, groups=groups, bias=bias)

        if not groups:
            self.reparam = conv(kernel, self.groups, bias=True)
            return
        self.conv_kxk = nn.ModuleList(ConvNorm(conv(kernel, each)) for each in groups)
        if scale and kernel > 1:
            self.conv_scale = ConvNorm(conv(1, self.groups))
        if identity and d_in == d_out and stride == 1:
            self.identity = nn.BatchNorm2d(d_in)

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam is not None:
            return self.reparam(x)
        y = sum(branch(x) for branch in self.conv_kxk)
        if self.conv_scale is not None:
            y = y + self.conv_scale(x)
        if self.identity is not None:
            y = y + self.identity(x)
        assert isinstance(y, Tensor)
        return y

    def merged(self, before: Affine | None = None) -> dict[str, Tensor]:
        """The state of the merged form. before: an affine map of the input that is merged too, for 1x1 kernels."""
        if self.reparam is not None:
            assert self.reparam.bias is not None
            weight, bias = self.reparam.weight, self.reparam.bias
        else:
            branches = [*self.conv_kxk, *([self.conv_scale] if self.conv_scale is not None else [])]
            parts = [self._part(branch) for branch in branches]
            if self.identity is not None:
                scale, shift = scale_and_shift(self.identity)
                one = torch.zeros_like(parts[0][0])
                o, centre = torch.arange(self.d_out), self.kernel // 2
                one[o, o % one.shape[1], centre, centre] = scale
                parts.append((one, shift))
            weight, bias = (torch.stack(tensors).sum(0) for tensors in zip(*parts, strict=True))
        if before is not None:
            weight, bias = self._behind(before, weight, bias)
        return {"reparam.weight": weight, "reparam.bias": bias}

    def _part(self, branch: nn.Module) -> Affine:
        assert isinstance(branch, ConvNorm)
        conv, (scale, shift) = branch.conv, scale_and_shift(branch.bn)
        weight = conv.weight * scale[:, None, None, None]
        edge = (self.kernel - conv.kernel_size[0]) // 2
        return F.pad(regrouped(weight, conv.groups, self.groups), [edge] * 4), shift

    def _behind(self, before: Affine, weight: Tensor, bias: Tensor) -> Affine:
        """w (scale x + shift) + b, with the channels that each output's group sees."""
        scale, shift = (each.reshape(self.groups, -1) for each in before)
        rows = weight[:, :, 0, 0].reshape(self.groups, -1, self.d_in // self.groups)  # (groups, out, in)
        bias = bias + torch.einsum("goi,gi->go", rows, shift).reshape(-1)
        return (rows * scale[:, None]).reshape(weight.shape), bias


def regrouped(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """(out, in / groups, k, k) -> (out, in / fewer, k, k): zeros where an output did not see an input."""
    if groups == fewer:
        return weight
    d_out, seen, times = len(weight), weight.shape[1], groups // fewer
    wide = weight.new_zeros(d_out, seen * times, *weight.shape[2:])
    for group, rows in enumerate(torch.arange(d_out, device=weight.device).chunk(groups)):
        start = group % times * seen
        wide[rows, start : start + seen] = weight[rows]
    return wide


class RepLinear(nn.Module):
    """A sum of matrices, and of the input where the width stays, each with a BatchNorm; branches=0: one, with a bias."""

    def __init__(self, d_in: int, d_out: int, branches: int) -> None:
        super().__init__()
        self.reparam = self.identity = None
        if branches == 0:
            self.reparam = nn.Linear(d_in, d_out)
            return
        self.linears = nn.ModuleList(nn.Linear(d_in, d_out, bias=False) for _ in range(branches))
        self.norms = nn.ModuleList(nn.BatchNorm1d(d_out) for _ in range(branches))
        if d_in == d_out:
            self.identity = nn.BatchNorm1d(d_in)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, d_in)."""
        if self.reparam is not None:
            return self.reparam(x)
        rows = x.flatten(0, 1)
        y = sum(norm(linear(rows)) for linear, norm in zip(self.linears, self.norms, strict=True))
        if self.identity is not None:
            y = y + self.identity(rows)
        assert isinstance(y, Tensor)
        return y.reshape(*x.shape[:2], -1)

    def merged(self, before: Affine | None = None) -> dict[str, Tensor]:
        weight: Tensor
        bias: Tensor
        if self.reparam is not None:
            weight, bias = self.reparam.weight, self.reparam.bias
        else:
            parts = []
            for linear, norm in zip(self.linears, self.norms, strict=True):
                assert isinstance(linear, nn.Linear)
                assert isinstance(norm, nn.BatchNorm1d)
                scale, shift = scale_and_shift(norm)
                parts.append((linear.weight * scale[:, None], shift))
            if self.identity is not None:
                scale, shift = scale_and_shift(self.identity)
                parts.append((scale.diag(), shift))
            weight, bias = (torch.stack(tensors).sum(0) for tensors in zip(*parts, strict=True))
        if before is not None:
            scale, shift = before
            weight, bias = weight * scale, bias + weight @ shift
        return {"reparam.weight": weight, "reparam.bias": bias}


class GroupedMLP(nn.Module):
    """gMLP: 1x1 layers of several groupings at once."""

    def __init__(self, C: int, ratio: float, config: FMViTConfig) -> None:
        super().__init__()
        groups, least = ((), math.gcd(*config.mlp_groups) or 1) if config.deployed else (config.mlp_groups, 0)
        self.fc1 = RepConv(C, int(C * ratio), groups=groups, merged_groups=least)
        self.fc2 = RepConv(int(C * ratio), C, groups=groups, merged_groups=least)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())

    def merged(self, before: Affine) -> dict[str, Tensor]:
        return _named(fc1=self.fc1.merged(before), fc2=self.fc2.merged())


class ConvAttention(nn.Module):
    """W ReLU(Rep3x3(x)), groups of head_dim channels."""

    def __init__(self, C: int, config: FMViTConfig) -> None:
        super().__init__()
        count = C // config.head_dim
        groups = () if config.deployed else (count,) * config.conv_branches
        extras = config.conv_extras
        self.group_conv3x3 = RepConv(C, C, 3, groups=groups, merged_groups=count, scale=extras, identity=extras)
        self.projection = nn.Conv2d(C, C, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.group_conv3x3(x).relu())

    def merged(self) -> dict[str, Tensor]:
        return _named(group_conv3x3=self.group_conv3x3.merged(), projection={"weight": self.projection.weight})


class RLMHSA(nn.Module):
    """Attention over tokens (B, N, C); keys and values are means of s^2 tokens in a row, what is left over is not seen."""

    def __init__(self, C: int, s: int, config: FMViTConfig) -> None:
        super().__init__()
        self.heads, self.s = C // config.head_dim, s
        branches = 0 if config.deployed else config.linear_branches
        self.q, self.k, self.v = (RepLinear(C, C, branches) for _ in range(3))
        self.proj = RepLinear(C, C, branches)
        self.norm = nn.BatchNorm1d(C) if s > 1 and not config.deployed else None

    def forward(self, x: Tensor) -> Tensor:
        context = x
        if self.s > 1:
            context = F.avg_pool1d(x.transpose(1, 2), self.s**2)  # (B, C, N / s^2)
            context = (context if self.norm is None else self.norm(context)).transpose(1, 2)
        parts = (self.q(x), self.k(context), self.v(context))
        q, k, v = (part.reshape(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in parts)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def merged(self, before: Affine) -> dict[str, Tensor]:
        of_context = before
        if self.norm is not None:  # the mean of an affine map is the affine map of the mean
            scale, shift = scale_and_shift(self.norm)
            of_context = (before[0] * scale, before[1] * scale + shift)
        return _named(
            q=self.q.merged(before),
            k=self.k.merged(of_context),
            v=self.v.merged(of_context),
            proj=self.proj.merged(),
        )


class PatchEmbed(nn.Module):
    """Halves height and width with stride 2 and changes the width where it differs."""

    def __init__(self, d_in: int, d_out: int, stride: int, config: FMViTConfig) -> None:
        super().__init__()
        self.stride = stride
        plain = d_in == d_out and stride == 1
        self.proj = None if plain else RepConv(d_in, d_out, groups=() if config.deployed else (1,))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return x if self.proj is None else self.proj(x)

    def merged(self) -> dict[str, Tensor]:
        return {} if self.proj is None else _named(proj=self.proj.merged())


class FusionBlock(nn.Module):
    """ "c": the convolutional fusion block."""

    def __init__(self, d_in: int, C: int, stride: int, config: FMViTConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(d_in, C, stride, config)
        self.conv = ConvAttention(C, config)
        self.norm = _norm(C, config)
        self.mlp = GroupedMLP(C, config.conv_mlp_ratio, config)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.drop_path(self.conv(x))
        return x + self.drop_path(self.mlp(self.norm(x)))

    def merged(self) -> dict[str, Tensor]:
        return _named(
            patch_embed=self.patch_embed.merged(),
            conv=self.conv.merged(),
            mlp=self.mlp.merged(_affine(self.norm)),
        )


class MixingBlock(nn.Module):
    """ "m": the multi-frequency block. low_dim: r C; s: see RLMHSA."""

    def __init__(
        self, d_in: int, C: int, low_dim: int, stride: int, s: int, config: FMViTConfig, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        high_dim, one = C - low_dim, () if config.deployed else (1,)
        self.patch_embed = PatchEmbed(d_in, low_dim, stride, config)
        self.norm1 = _norm(low_dim, config)
        self.attention = RLMHSA(low_dim, s, config)
        self.projection = RepConv(low_dim, high_dim, groups=one)
        self.own = PatchEmbed(d_in, high_dim, stride, config) if config.keep_input else None
        self.conv = ConvAttention(high_dim, config)
        self.norm2 = _norm(C, config)
        self.mlp = GroupedMLP(C, config.mix_mlp_ratio, config)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        low = self.patch_embed(x)
        attended = self.attention(self.norm1(low).flatten(2).transpose(1, 2))  # (B, H W, r C)
        low = low + self.drop_path(attended.transpose(1, 2).reshape(low.shape))
        high = self.projection(low)
        if self.own is not None:
            high = high + self.own(x)
        high = high + self.drop_path(self.conv(high))
        y = torch.cat((low, high), 1)
        return y + self.drop_path(self.mlp(self.norm2(y)))

    def merged(self) -> dict[str, Tensor]:
        return _named(
            patch_embed=self.patch_embed.merged(),
            attention=self.attention.merged(_affine(self.norm1)),
            projection=self.projection.merged(),
            own={} if self.own is None else self.own.merged(),
            conv=self.conv.merged(),
            mlp=self.mlp.merged(_affine(self.norm2)),
        )


@register(
    "fmvit",
    task="classify",
    input="image",
    paper="arXiv 2311.05707",
    variants={"fmvit": (45_594_152, {})},
    small={
        "num_classes": 10,
        "stem_dims": (8, 8, 8),
        "embed_dims": (16, 16, 32, 32),
        "stages": ("c", "m", "c", "m"),
        "head_dim": 4,
        "sr_ratios": (4, 2, 2, 1),
        "mlp_groups": (1, 2),
    },
)
class FMViT(nn.Module):
    """image (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: FMViTConfig) -> None:
        super().__init__()
        self.config = config
        one = () if config.deployed else (1,)
        widths = (config.in_chans, *config.stem_dims, config.stem_dims[-1])
        strides = (2, 1, 1, 2)
        self.stem = nn.ModuleList(
            RepConv(widths[i], widths[i + 1], 3, stride=strides[i], groups=one) for i in range(len(strides))
        )
        total, d_in, number = len("".join(config.stages)), widths[-1], 0
        self.stages = nn.ModuleList()
        for stage, letters in enumerate(config.stages):
            C, blocks = config.embed_dims[stage], nn.ModuleList()
            for place, letter in enumerate(letters):
                stride = 2 if stage and place == 0 else 1
                rate = config.drop_path_rate * number / max(total - 1, 1)
                if letter == "c":
                    blocks.append(FusionBlock(d_in, C, stride, config, rate))
                else:
                    s, low_dim = config.sr_ratios[stage], config.attention_dim(C)
                    blocks.append(MixingBlock(d_in, C, low_dim, stride, s, config, rate))
                d_in, number = C, number + 1
            self.stages.append(blocks)
        self.norm = _norm(d_in, config) if config.num_classes else nn.Identity()
        self.head = nn.Linear(d_in, config.num_classes) if config.num_classes else nn.Identity()

    def features(self, image: Tensor) -> list[Tensor]:
        """The stages' maps, strides 4, 8, 16, 32."""
        check_image("fmvit", image, channels=self.config.in_chans, at_least=self.config.smallest_side)
        x, maps = image, []
        for conv in self.stem:
            x = conv(x).relu()
        for blocks in self.stages:
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x)
            maps.append(x)
        return maps

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.features(image)[-1]).mean((2, 3)))

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, 64, 64)}

    @torch.no_grad()
    def deploy(self) -> FMViT:
        """A copy for inference, every sum of branches and every BatchNorm merged into one layer."""
        if self.config.deployed:
            return copy.deepcopy(self).eval()
        state: dict[str, Tensor] = {}
        for number, conv in enumerate(self.stem):
            assert isinstance(conv, RepConv)
            state |= _named(**{f"stem.{number}": conv.merged()})
        for stage, blocks in enumerate(self.stages):
            assert isinstance(blocks, nn.ModuleList)
            for number, block in enumerate(blocks):
                assert isinstance(block, FusionBlock | MixingBlock)
                state |= _named(**{f"stages.{stage}.{number}": block.merged()})
        if isinstance(self.head, nn.Linear):
            scale, shift = _affine(self.norm)
            state["head.weight"] = self.head.weight * scale
            state["head.bias"] = self.head.bias + self.head.weight @ shift
        deployed = FMViT(replace(self.config, deployed=True))
        deployed.load_state_dict(state)
        return deployed.to(next(self.parameters())).eval()


def _norm(C: int, config: FMViTConfig) -> nn.Module:
    return nn.Identity() if config.deployed else nn.BatchNorm2d(C)


def _affine(norm: nn.Module) -> Affine:
    assert isinstance(norm, nn.BatchNorm2d)
    return scale_and_shift(norm)


def _named(**parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts' tensors in one dictionary, each with its part's name in front."""
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
