"""PP-MobileSeg: semantic segmentation for phones (Tang et al., arXiv 2304.05152).

What it is for: a class for every pixel, at a cost that a phone's CPU pays.

    model = tersor.models.load("pp_mobileseg_tiny", "model.pdparams")           # PaddleSeg's checkpoint
    logits = model(image)                      # image (B, 3, H, W), ImageNet-normalised -> (B, classes, H, W)
    labels = tersor.models.load("pp_mobileseg_tiny", path, upsample="vim")(image)      # (B, H, W), the class alone

StrideFormer, the backbone: four stages of MobileNetV3 units (1x1, depthwise, squeeze-excite, 1x1), strides 4 to 32. The
last two end with blocks x = x + SEA(x), x = x + MLP(x); F8, F16, F32 are the maps of stages 2 to 4.

    SEA, squeeze-axial attention, n heads:  x = BN(DW3x3, stride 2)(x)          only with stride_attention
        q, k, v = BN(W x)                       n kd, n kd, 2 n kd channels
        e = BN(W ReLU6(BN(DW3x3 [q, k, v])))    detail
        rows:    means of q, k, v over the width, q and k plus a learned position (linearly interpolated from 16);
                 r = BN(W ReLU6(softmax(q^T k / sqrt(kd)) v))      [2 n kd, H, 1];   columns: the same over the height
        output = hsigmoid(BN(W ReLU6(v + r + c))) * e,  brought back to the size that came in

The maps are fused in `out_channels`, a_i = sigmoid(BN(W F)), f_i = BN(W F), all at one size:

    AAM (stride 16)     a8 a16 a32 (f8 + f16) + f32;      AAMSx8 (stride 8)     a16 a32 f8 + f32

then a depthwise 1x1 with BN and ReLU, a 1x1 to the classes, and bilinear interpolation to the image's size. With
`upsample="vim"`, in eval mode and from 30 classes on, only the classes that win somewhere at low resolution (anywhere in
the batch) are interpolated, and their numbers returned, int32; a class that would win only between low-resolution pixels
is missed, the others are exact.

Origin: PaddlePaddle/PaddleSeg at d7975e7 (paddleseg/models/pp_mobileseg.py, backbones/strideformer.py), Apache-2.0. Key
names are theirs; `_mean` and `_variance` become PyTorch's. Two hard sigmoids, both as published: slope 1/5 in
squeeze-excite, 1/6 in SEA. Their "origin" fusion cannot be built there and is not here.

Proven: the golden cases of the published code under PaddlePaddle 3.3.1 (both fusions, with and without strides, the class
map, Tiny at 224), parameter counts without BatchNorm's statistics. A Tiny trained from scratch for 400 s on an H200 reaches a
mean IoU of 44 % on drawings of 96 x 96 pixels, and of 66 % where it sees them at 192; a plain U-Net of equal size, three times as
many steps in that time, reaches 88 % (benchmarks/results/vision_training.md). Its logits have an eighth of the sides, at which
even the truth has 83 and 94 %; its loss still fell when the time was over, after two thirds of the steps. So give it large
pictures and long training, or the published weights. Not proven: ADE20K mIoU (41.57 and 36.70 published), Cityscapes 77.83,
latencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.activations import Activate
from tersor.layers.checks import at_least, one_of
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.patch_embed import check_image
from tersor.models import key_maps
from tersor.models.registry import register

VIM_CLASSES = 30  # below, interpolating all classes is as cheap
POSITIONS = 16  # of the learned axial embeddings
Unit = tuple[int, int, int, bool, str, int]  # kernel, inner width, outer width, squeeze-excite, activation, stride


@dataclass(frozen=True, kw_only=True)
class PPMobileSegConfig:
    in_chans: int = 3
    num_classes: int = 150
    upsample: str = "interpolate"  # or "vim"
    cfgs: tuple[tuple[Unit, ...], ...] = (  # the units of each stage; the defaults are those of Base
        ((3, 16, 16, True, "relu", 1), (3, 64, 32, False, "relu", 2), (3, 96, 32, False, "relu", 1)),
        ((5, 128, 64, True, "hardswish", 2), (5, 240, 64, True, "hardswish", 1)),
        ((5, 384, 128, True, "hardswish", 2), (5, 384, 128, True, "hardswish", 1)),
        ((5, 768, 192, True, "hardswish", 2), (5, 768, 192, True, "hardswish", 1)),
    )
    channels: tuple[int, ...] = (16, 32, 64, 128)  # what each stage takes
    embed_dims: tuple[int, ...] = (128, 192)  # of the last two stages, which attend
    key_dims: tuple[int, ...] = (16, 24)  # kd
    depths: tuple[int, ...] = (3, 3)  # blocks with attention
    num_heads: int = 8
    mlp_ratios: tuple[float, ...] = (2, 4)
    drop_path_rate: float = 0.1  # of the last block of each stage, earlier ones linearly less
    inj_type: str = "AAMSx8"  # or "AAM"
    out_feat_chs: tuple[int, ...] = (64, 128, 192)  # of F8, F16, F32
    out_channels: int = 256
    stride_attention: bool = True
    head_use_dw: bool = True  # the head's first 1x1 convolution is depthwise
    align_corners: bool = False  # of the last interpolation
    dropout_ratio: float = 0.1  # before the classifier

    def __post_init__(self) -> None:
        name = "pp_mobileseg"
        one_of(name, "upsample", self.upsample, ("interpolate", "vim"))
        one_of(name, "inj_type", self.inj_type, ("AAM", "AAMSx8"))
        at_least(
            name,
            1,
            in_chans=self.in_chans,
            num_classes=self.num_classes,
            num_heads=self.num_heads,
            out_channels=self.out_channels,
        )
        for option, count in (
            ("cfgs", 4), ("channels", 4), ("embed_dims", 2), ("key_dims", 2), ("depths", 2), ("mlp_ratios", 2),
            ("out_feat_chs", 3),
        ):  # fmt: skip
            if len(getattr(self, option)) != count:
                raise TersorError(f"{name} needs {count} entries of {option}, not {getattr(self, option)}")
        widths = [round8(stage[-1][2]) for stage in self.cfgs]
        if (*widths[1:],) != tuple(self.out_feat_chs) or (*widths[2:],) != tuple(self.embed_dims):
            raise TersorError(
                f"{name}'s stages end with {widths} channels, so out_feat_chs is the last three of these, not "
                f"{self.out_feat_chs}, and embed_dims the last two, not {self.embed_dims}"
            )


def round8(width: float) -> int:
    """The nearest multiple of 8, at least 8, and the next one where that would lose over a tenth."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


class ConvNorm(nn.Module):
    """Bias-free convolution and BatchNorm. conv: the published name of the convolution, "c" or "conv"."""

    def __init__(
        self, d_in: int, d_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, act: str = "identity",
        conv: str = "c", scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name = conv
        self.add_module(conv, nn.Conv2d(d_in, d_out, kernel, stride, kernel // 2, groups=groups, bias=False))
        self.bn = nn.BatchNorm2d(d_out)
        nn.init.constant_(self.bn.weight, scale)
        self.act = Activate(act, of="pp_mobileseg")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(getattr(self, self.name)(x)))


class SqueezeExcite(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(d, d // 4, 1)
        self.conv2 = nn.Conv2d(d // 4, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv2(self.conv1(x.mean((2, 3), keepdim=True)).relu())
        return x * (0.2 * gate + 0.5).clamp(0, 1)


class MobileUnit(nn.Module):
    def __init__(self, d_in: int, unit: Unit) -> None:
        super().__init__()
        kernel, inner, outer, has_se, act, stride = unit
        m, d_out = round8(inner), round8(outer)
        self.expand_conv = ConvNorm(d_in, m, act=act)
        self.bottleneck_conv = ConvNorm(m, m, kernel, stride=stride, groups=m, act=act)
        self.mid_se = SqueezeExcite(m) if has_se else nn.Identity()
        self.linear_conv = ConvNorm(m, d_out)
        self.adds = stride == 1 and d_in == d_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear_conv(self.mid_se(self.bottleneck_conv(self.expand_conv(x))))
        return x + y if self.adds else y


class MobileStage(nn.Module):
    def __init__(self, d_in: int, units: tuple[Unit, ...], *, in_chans: int = 0) -> None:
        """in_chans: of the image, for the first stage."""
        super().__init__()
        d = round8(d_in)
        self.conv = ConvNorm(in_chans, d, 3, stride=2, act="hardswish") if in_chans else nn.Identity()
        self.blocks = nn.Sequential()
        for unit in units:
            self.blocks.append(MobileUnit(d, unit))
            d = round8(unit[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.conv(x))


class AxialPosition(nn.Module):
    """x (B, d, n) plus a learned table, interpolated to n."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, d, POSITIONS).normal_())

    def forward(self, x: Tensor) -> Tensor:
        return x + F.interpolate(self.pos_embed, size=x.shape[-1], mode="linear", align_corners=False)


class SqueezeAxialAttention(nn.Module):
    """SEA of the module docstring, x (B, C, H, W)."""

    def __init__(self, d: int, key_dim: int, heads: int, *, strided: bool) -> None:
        super().__init__()
        self.heads, self.scale = heads, key_dim**-0.5
        d_qk, d_v = heads * key_dim, 2 * heads * key_dim
        self.to_q = ConvNorm(d, d_qk)
        self.to_k = ConvNorm(d, d_qk)
        self.to_v = ConvNorm(d, d_v)
        self.stride_conv = None
        if strided:
            self.stride_conv = nn.Sequential(nn.Conv2d(d, d, 3, 2, 1, groups=d), nn.BatchNorm2d(d))
        self.proj = nn.Sequential(nn.ReLU6(), ConvNorm(d_v, d, scale=0.0))
        self.proj_encode_row = nn.Sequential(nn.ReLU6(), ConvNorm(d_v, d_v, scale=0.0))
        self.pos_emb_rowq, self.pos_emb_rowk = AxialPosition(d_qk), AxialPosition(d_qk)
        self.proj_encode_column = nn.Sequential(nn.ReLU6(), ConvNorm(d_v, d_v, scale=0.0))
        self.pos_emb_columnq, self.pos_emb_columnk = AxialPosition(d_qk), AxialPosition(d_qk)
        self.dwconv = ConvNorm(2 * d_v, 2 * d_v, 3, groups=2 * d_v, act="relu6")
        self.pwconv = ConvNorm(2 * d_v, d)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        detail = self.pwconv(self.dwconv(torch.cat((q, k, v), 1)))
        rows = self._attend(self.pos_emb_rowq(q.mean(3)), self.pos_emb_rowk(k.mean(3)), v.mean(3))
        columns = self._attend(self.pos_emb_columnq(q.mean(2)), self.pos_emb_columnk(k.mean(2)), v.mean(2))
        seen = v + self.proj_encode_row(rows[..., None]) + self.proj_encode_column(columns[..., None, :])
        y = F.hardsigmoid(self.proj(seen)) * detail
        if self.stride_conv is not None:
            y = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
        return y

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Along one axis, (B, heads x channels, n) -> (B, 2 n kd, n)."""
        batch, _, n = q.shape
        q, k, v = (each.reshape(batch, self.heads, -1, n) for each in (q, k, v))
        weights = (q.transpose(2, 3) @ k * self.scale).softmax(-1)  # (B, heads, queries, keys)
        return (v @ weights.transpose(2, 3)).reshape(batch, -1, n)


class Mlp(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = ConvNorm(d, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = ConvNorm(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu6(self.dwconv(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, config: PPMobileSegConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        d = config.embed_dims[stage]
        strided = config.stride_attention
        self.attn = SqueezeAxialAttention(d, config.key_dims[stage], config.num_heads, strided=strided)
        self.mlp = Mlp(d, int(d * config.mlp_ratios[stage]))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


class Transformer(nn.Module):
    def __init__(self, config: PPMobileSegConfig, stage: int) -> None:
        super().__init__()
        (rates,) = linear_rates(config.drop_path_rate, (config.depths[stage],))
        self.transformer_blocks = nn.Sequential(*(Block(config, stage, rate) for rate in rates))

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer_blocks(x)


class Fusion(nn.Module):
    """AAM and AAMSx8 of the module docstring: F8, F16, F32 -> one map."""

    def __init__(self, config: PPMobileSegConfig) -> None:
        super().__init__()
        self.kind, d = config.inj_type, config.out_channels
        c8, c16, c32 = config.out_feat_chs
        plain, gates = ((c8, c16, c32), (c8, c16, c32)) if self.kind == "AAM" else ((c8, c32), (c16, c32))
        self.embedding_list = nn.ModuleList(ConvNorm(c, d, conv="conv") for c in plain)
        self.act_embedding_list = nn.ModuleList(ConvNorm(c, d, conv="conv", act="sigmoid") for c in gates)

    def forward(self, maps: list[Tensor]) -> Tensor:
        f8, f16, f32 = maps
        if self.kind == "AAM":
            f8 = F.interpolate(f8, scale_factor=0.5, mode="bilinear", align_corners=False)
        size = (f8.shape[2], f8.shape[3])
        f16 = resize(f16, size)
        gate = resize(self.act_embedding_list[-1](f32), size)
        top = resize(self.embedding_list[-1](f32), size)
        low = self.embedding_list[0](f8)
        if self.kind == "AAM":
            low = low + self.embedding_list[1](f16)
            gate = gate * self.act_embedding_list[0](f8) * self.act_embedding_list[1](f16)
        else:
            gate = gate * self.act_embedding_list[0](f16)
        return gate * low + top


class StrideFormer(nn.Module):
    """image -> the fused map."""

    def __init__(self, config: PPMobileSegConfig) -> None:
        super().__init__()
        self.smb1, self.smb2, self.smb3, self.smb4 = (
            MobileStage(width, units, in_chans=0 if stage else config.in_chans)
            for stage, (width, units) in enumerate(zip(config.channels, config.cfgs, strict=True))
        )
        self.trans1, self.trans2 = Transformer(config, 0), Transformer(config, 1)
        self.inj_module = Fusion(config)

    def forward(self, image: Tensor) -> Tensor:
        return self.inj_module(self.maps(image))

    def maps(self, image: Tensor) -> list[Tensor]:
        """F8, F16, F32."""
        f8 = self.smb2(self.smb1(image))
        f16 = self.trans1(self.smb3(f8))
        return [f8, f16, self.trans2(self.smb4(f16))]


class Head(nn.Module):
    def __init__(self, config: PPMobileSegConfig) -> None:
        super().__init__()
        d = config.out_channels
        groups = d if config.head_use_dw else 1
        self.linear_fuse = ConvNorm(d, d, groups=groups, conv="conv", act="relu")
        self.dropout = nn.Dropout2d(config.dropout_ratio)
        self.conv_seg = nn.Conv2d(d, config.num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.linear_fuse(x)))


@register(
    "pp_mobileseg",
    task="segment",
    input="image",
    paper="arXiv 2304.05152",
    variants={
        "pp_mobileseg_base": (5_943_878, {}),
        "pp_mobileseg_base_cityscapes": (5_910_211, {"num_classes": 19}),
        "pp_mobileseg_tiny": (
            1_492_298,
            {
                "cfgs": (
                    ((3, 16, 16, True, "relu", 1), (3, 64, 32, False, "relu", 2), (3, 48, 24, False, "relu", 1)),
                    ((5, 96, 32, True, "hardswish", 2), (5, 96, 32, True, "hardswish", 1)),
                    ((5, 160, 64, True, "hardswish", 2), (5, 160, 64, True, "hardswish", 1)),
                    ((3, 384, 128, True, "hardswish", 2), (3, 384, 128, True, "hardswish", 1)),
                ),
                "channels": (16, 24, 32, 64),
                "embed_dims": (64, 128),
                "depths": (2, 2),
                "num_heads": 4,
                "inj_type": "AAM",
                "out_feat_chs": (32, 64, 128),
            },
        ),
    },
    small={
        "num_classes": 40,
        "cfgs": (
            ((3, 16, 8, True, "relu", 1), (3, 16, 16, False, "relu", 2)),
            ((5, 32, 16, True, "hardswish", 2),),
            ((5, 32, 16, True, "hardswish", 2),),
            ((3, 48, 24, True, "hardswish", 2),),
        ),
        "channels": (16, 16, 16, 16),
        "embed_dims": (16, 24),
        "key_dims": (4, 4),
        "depths": (1, 1),
        "num_heads": 2,
        "out_feat_chs": (16, 16, 24),
        "out_channels": 16,
    },
)
class PPMobileSeg(nn.Module):
    """image (B, C, H, W) -> logits (B, num_classes, H, W), or with upsample="vim" classes (B, H, W) in eval mode."""

    def __init__(self, config: PPMobileSegConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = StrideFormer(config)
        self.decode_head = Head(config)

    def forward(self, image: Tensor) -> Tensor:
        check_image("pp_mobileseg", image, channels=self.config.in_chans, at_least=16)
        logits, size = self.decode_head(self.backbone(image)), (image.shape[2], image.shape[3])
        if self.config.upsample == "vim" and not self.training and self.config.num_classes >= VIM_CLASSES:
            return valid_classes(logits, size, align_corners=self.config.align_corners)
        return resize(logits, size, align_corners=self.config.align_corners)

    def features(self, image: Tensor) -> list[Tensor]:
        """F8, F16, F32 of the module docstring."""
        check_image("pp_mobileseg", image, channels=self.config.in_chans, at_least=16)
        return self.backbone.maps(image)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, 64, 96)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Paddle's names of BatchNorm's statistics to PyTorch's; the kernels lie the same way."""
        return key_maps.rename(state, (r"\._mean$", ".running_mean"), (r"\._variance$", ".running_var"))


def resize(x: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def valid_classes(logits: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """The valid interpolate module: logits (B, classes, h, w) -> the winning class of each pixel (B, H, W), int32."""
    present: Tensor = torch.unique(logits.argmax(1))
    winners = resize(logits[:, present], size, align_corners=align_corners).argmax(1)
    return present[winners].int()
