"""EfficientVMamba: selective scans over dilated quarters of the image (Pei, Huang and Xu, arXiv 2403.09977).

What it is for: image classification, and a backbone for detection and segmentation, below 35 million parameters. Where
VMamba scans the whole image four times, here each of four scans sees every second row and column, so that each pixel is
read once.

    model = tersor.models.load("efficientvmamba_t", "efficient_vmamba_tiny.ckpt")      # official checkpoint
    logits = model(image)                                            # image (B, 3, H, W), ImageNet-normalised; any size
    maps = tersor.models.load("efficientvmamba_t", path, out_indices=(0, 1, 2, 3))(image)    # strides 4, 8, 16, 32

Four stages, x [B, H, W, C]. Stages 1 and 2 are EVSS blocks, 3 and 4 MobileNet's inverted residuals with squeeze-excite:

    u = LN(x);   x = x + g(SS2D(u)) + g(W GELU(BN(DW3x3 u)))        g: a gate per channel from mean LN, shared by both
    x = x + W2 GELU(W1 LN(x))                                        only with mlp_ratio; published models have none

    SS2D, E = 2C:  s, z = W u;   s = SiLU(DW3x3 s), padded with zeros to even sides
        quarter k of s [L = H W / 4, E]:  0 (even rows, even columns)   1 (odd, even), by columns
                                          2 (even, odd)                3 (odd, odd), by columns
        dt, B, C = W_k s_k;   dt = softplus(V_k dt + b_k);   A_k = -exp(A_logs_k)
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t s_t,   y_t = C_t h_t + D s_t         tersor.kernels.selective_scan
        output = Wo (LN(y) * SiLU(z)),  y back in place and cut to H x W

Origin: TerryPei/EfficientVMamba at 0bc5ee2 (classification/models/vmamba_efficient.py), without a licence file; written
from the paper and its mathematics. Key names are the published ones; its older names and its `module.module.` are
understood. d_state, dt_rank, ssm_ratio and the dropouts of the published constructor change nothing there (16, C/16, 2,
none) and are no options here; its step between pixels works as 2 only, for a larger one leaves pixels unset. The
published file for S has first width 96 in its configuration; 64 is what the paper's count and the checkpoint have.

Proven: the golden cases of the published code (scan, merge, kernel, a tiny model, odd sizes with MLP and the other
downsampling, T at 224), parameter counts. Not proven: ImageNet accuracy (76.5, 78.7, 81.8 published) and speed.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.kernels.selective_scan import selective_scan
from tersor.layers.checks import at_least, one_of
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.patch_embed import check_image
from tersor.models import key_maps
from tersor.models.registry import register

STATES = 16  # numbers in the state of a channel
QUARTERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # (row, column) where each scan starts; those in odd rows go by columns


@dataclass(frozen=True, kw_only=True)
class EfficientVMambaConfig:
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns pooled features
    depths: tuple[int, ...] = (2, 2, 9, 2)
    dims: tuple[int, ...] | int = (96, 192, 384, 768)  # C of each stage; a number: it and its doubles
    drop_path_rate: float = 0.1  # of the last block; earlier ones linearly less
    mlp_ratio: float = 4.0  # 0: no MLP in the EVSS blocks
    patch_norm: bool = True
    downsample_version: str = "v2"  # "v1": patch merging, as in all published models; "v2": a 2x2 convolution
    out_indices: tuple[int, ...] = ()  # stages whose normalised maps are returned in place of logits

    def __post_init__(self) -> None:
        if len(self.depths) != 4 or len(self.widths) != 4 or min(self.depths) < 1:
            raise TersorError(f"efficientvmamba has four stages; depths {self.depths}, dims {self.dims}")
        at_least("efficientvmamba", 8, dims=min(self.widths))
        at_least("efficientvmamba", 0, mlp_ratio=self.mlp_ratio)
        one_of("efficientvmamba", "downsample_version", self.downsample_version, ("v1", "v2"))
        for index in self.out_indices:
            one_of("efficientvmamba", "out_indices", index, range(4))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.dims * 2**stage for stage in range(4)) if isinstance(self.dims, int) else tuple(self.dims)


def atrous_scan(x: Tensor) -> Tensor:
    """x (B, H, W, C) -> (B, 4, L, C), L = ceil(H/2) ceil(W/2): the four quarters in the order of the module docstring."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    quarters = [x[:, row::2, column::2] for row, column in QUARTERS]  # each (B, ceil(H/2), ceil(W/2), C)
    sequences = [
        (each.transpose(1, 2) if row else each).flatten(1, 2)
        for (row, _), each in zip(QUARTERS, quarters, strict=True)
    ]  # fmt: skip
    return torch.stack(sequences, 1)


def atrous_merge(y: Tensor, height: int, width: int) -> Tensor:
    """The inverse: (B, 4, L, C) -> (B, H, W, C)."""
    rows, columns = (height + 1) // 2, (width + 1) // 2
    even_even, odd_even, even_odd, odd_odd = y.unbind(1)
    odd_even, odd_odd = (rearrange(each, "b (x y) c -> b y x c", y=rows) for each in (odd_even, odd_odd))
    even_even, even_odd = (rearrange(each, "b (y x) c -> b y x c", y=rows) for each in (even_even, even_odd))
    even, odd = torch.stack((even_even, even_odd), 3), torch.stack((odd_even, odd_odd), 3)  # (B, rows, columns, 2, C)
    merged = torch.stack((even, odd), 2).reshape(y.shape[0], 2 * rows, 2 * columns, y.shape[-1])
    return merged[:, :height, :width]


class SS2D(nn.Module):
    """x (B, H, W, C) -> the same shape."""

    def __init__(self, d: int) -> None:
        super().__init__()
        inner, rank = 2 * d, math.ceil(d / 16)
        self.widths = [rank, STATES, STATES]
        self.x_proj_weight = nn.Parameter(torch.empty(4, sum(self.widths), inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        dt = torch.empty(4, inner).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        self.dt_projs_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt back
        self.A_logs = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(4 * inner, 1))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.in_proj = nn.Linear(d, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, d, bias=False)
        for k in range(4):
            nn.init.kaiming_uniform_(self.x_proj_weight[k], a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        s, z = self.in_proj(x).chunk(2, -1)
        s = F.silu(self.conv2d(s.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        height, width = s.shape[1:3]
        s = atrous_scan(s)  # (B, 4, L, E)
        dt, B, C = torch.split(torch.einsum("bkle,kre->bklr", s, self.x_proj_weight), self.widths, -1)
        dt = torch.einsum("bklr,ker->bkle", dt, self.dt_projs_weight)
        A, D = -self.A_logs.exp().reshape(4, -1, STATES), self.Ds.reshape(4, -1)
        ys = [
            selective_scan(
                s[:, k], dt[:, k], A[k], B[:, k], C[:, k], D=D[k], dt_bias=self.dt_projs_bias[k], dt_softplus=True
            )[0]
            for k in range(4)
        ]
        y = atrous_merge(torch.stack(ys, 1), height, width)
        return self.out_proj(self.out_norm(y) * F.silu(z))


class ChannelGate(nn.Module):
    """x times sigmoid(W2 GELU(W1 mean LN(x))): the mean is over the map, and LN is for the gate only."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.global_reduce = nn.Linear(d, d // 8)
        self.channel_select = nn.Linear(d // 8, d)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.norm(x).mean((1, 2), keepdim=True)
        return x * self.channel_select(F.gelu(self.global_reduce(mean))).sigmoid()


class Mlp(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class EVSSBlock(nn.Module):
    """x (B, H, W, C); the block of the module docstring."""

    def __init__(self, d: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.op = SS2D(d)
        self.conv_branch = nn.Sequential(
            nn.Conv2d(d, d, 3, padding=1, groups=d), nn.BatchNorm2d(d), nn.GELU(), nn.Conv2d(d, d, 1)
        )
        self.se = ChannelGate(d)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(d) if mlp_ratio > 0 else None
        self.mlp = Mlp(d, int(d * mlp_ratio)) if mlp_ratio > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        convolved = self.conv_branch(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.se(self.op(u)) + self.se(convolved))
        if self.norm2 is not None and self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class SqueezeExcite(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(d, hidden, 1)
        self.conv_expand = nn.Conv2d(hidden, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_expand(self.conv_reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class InvertedResidual(nn.Module):
    """x (B, C, H, W), 4C inside."""

    def __init__(self, d: int, drop_path: float) -> None:
        super().__init__()
        m = 4 * d
        self.conv_pw = nn.Sequential(nn.Conv2d(d, m, 1, bias=False), nn.BatchNorm2d(m), nn.ReLU())
        self.conv_dw = nn.Sequential(nn.Conv2d(m, m, 3, padding=1, groups=m, bias=False), nn.BatchNorm2d(m), nn.ReLU())
        self.se = SqueezeExcite(m, m // 8)
        self.conv_pw2 = nn.Sequential(nn.Conv2d(m, d, 1, bias=False), nn.BatchNorm2d(d))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.conv_pw2(self.se(self.conv_dw(self.conv_pw(x)))))


class Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class PatchMerging(nn.Module):
    """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), d_out): the four pixels of a patch side by side, zeros behind odd sides."""

    def __init__(self, d: int, d_out: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * d, d_out, bias=False)
        self.norm = nn.LayerNorm(4 * d)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, row::2, column::2] for row, column in QUARTERS], -1)
        return self.reduction(self.norm(x))


def downsample(d: int, d_out: int, version: str) -> nn.Module:
    if version == "v1":
        return PatchMerging(d, d_out)
    return nn.Sequential(
        Permute(0, 3, 1, 2), nn.Conv2d(d, d_out, 2, stride=2), Permute(0, 2, 3, 1), nn.LayerNorm(d_out)
    )


class Stage(nn.Sequential):
    """Blocks, then the downsampling. Returns what the next stage takes, and the map before; both (B, H, W, C)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        *blocks, downsampling = self
        for block in blocks:
            x = block(x)
        return downsampling(x), x


class Classifier(nn.Module):
    def __init__(self, d: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((1, 2)))


@register(
    "efficientvmamba",
    task="classify",
    input="image",
    paper="arXiv 2403.09977",
    variants={
        "efficientvmamba_t": (
            6_493_660,
            {"dims": 48, "depths": (2, 2, 4, 2), "mlp_ratio": 0.0, "downsample_version": "v1", "drop_path_rate": 0.2},
        ),
        "efficientvmamba_s": (
            11_273_688,
            {"dims": 64, "depths": (2, 2, 4, 2), "mlp_ratio": 0.0, "downsample_version": "v1", "drop_path_rate": 0.2},
        ),
        "efficientvmamba_b": (
            33_717_136,
            {"dims": 96, "depths": (2, 2, 9, 2), "mlp_ratio": 0.0, "downsample_version": "v1", "drop_path_rate": 0.2},
        ),
    },
    small={"dims": 8, "depths": (1, 1, 1, 1), "mlp_ratio": 2.0, "downsample_version": "v1", "num_classes": 10},
)
class EfficientVMamba(nn.Module):
    """image (B, C, H, W) -> logits (B, num_classes), or with out_indices the normalised maps of these stages."""

    def __init__(self, config: EfficientVMambaConfig) -> None:
        super().__init__()
        self.config = config
        d1, d2, d3, d4 = config.widths
        self.patch_embed = nn.Sequential(
            nn.Conv2d(config.in_chans, d1, config.patch_size, stride=config.patch_size),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(d1) if config.patch_norm else nn.Identity(),
        )
        rates = linear_rates(config.drop_path_rate, config.depths)
        between = [downsample(*pair, config.downsample_version) for pair in ((d1, d2), (d2, d3), (d3, d4))]
        evss = [
            nn.Sequential(*(EVSSBlock(d, config.mlp_ratio, rate) for rate in rates[stage]))
            for stage, d in enumerate((d1, d2))
        ]
        residuals = [
            (Permute(0, 3, 1, 2), *(InvertedResidual(d, rate) for rate in rates[stage]), Permute(0, 2, 3, 1))
            for stage, d in ((2, d3), (3, d4))
        ]
        self.layers = nn.ModuleList(
            [
                Stage(OrderedDict(blocks=evss[0], downsample=between[0])),
                Stage(OrderedDict(blocks=evss[1], downsample=between[1])),
                Stage(*residuals[0], between[2]),
                Stage(*residuals[1], nn.Identity()),
            ]
        )
        if config.out_indices:
            for index in config.out_indices:
                self.add_module(f"outnorm{index}", nn.LayerNorm(config.widths[index]))
        else:
            self.classifier = Classifier(d4, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        if self.config.out_indices:
            return self.features(image)
        return self.classifier(self._stages(image)[-1])

    def features(self, image: Tensor) -> list[Tensor]:
        """The maps (B, C, H, W) before each downsampling; with out_indices those asked for, normalised."""
        maps = self._stages(image)
        if chosen := self.config.out_indices:
            maps = [self.get_submodule(f"outnorm{index}")(maps[index]) for index in sorted(chosen)]
        return [each.permute(0, 3, 1, 2) for each in maps]

    def _stages(self, image: Tensor) -> list[Tensor]:
        smallest = self.config.patch_size * (1 if self.config.downsample_version == "v1" else 8)
        check_image("efficientvmamba", image, channels=self.config.in_chans, at_least=smallest)
        x, maps = self.patch_embed(image), []
        for stage in self.layers:
            x, before = stage(x)
            maps.append(before)
        return maps

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, 64, 64)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Older names; a classifier's checkpoint for the backbone, whose maps' norms then stay fresh."""
        state = key_maps.rename(
            state,
            (r"^(module\.)+", ""),
            (r"^patch_embed\.proj\.", "patch_embed.0."),
            (r"^patch_embed\.norm\.", "patch_embed.2."),
            (r"\.ln_1\.", ".norm."),
            (r"\.self_attention\.", ".op."),
            (r"^(norm|head)\.", r"classifier.\1."),
        )
        if not self.config.out_indices:
            return state
        fresh = {key: value for key, value in self.state_dict().items() if key.startswith("outnorm")}
        return fresh | key_maps.drop(state, r"^classifier\.")
