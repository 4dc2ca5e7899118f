"""VSSD, Mamba-2's state-space dual without an order (Shi et al., arXiv 2407.18559).

What it is for: image classification, and a backbone for detection and segmentation, at a cost linear in the number of
tokens. Every token adds to one state with a weight of its own and all tokens read that state, so no scan over the image
in two or four directions is needed.

    model = tersor.models.load("vssd_micro", "vssd_micro.pth")                  # official checkpoint
    logits = model(image)                                                       # image (B, 3, H, W), ImageNet-normalised
    maps = tersor.models.load("vssd_micro", path, out_indices=(0, 1, 2, 3))(image)   # strides 4, 8, 16, 32

Four stages of blocks, x [B, H, W, C], C doubling as H and W halve:

    x = x + DW3x3(x);   x = x + mixer(LN(x));   x = x + DW3x3(x);   x = x + W2 GELU(W1 LN(x))

    mixer of stages 1 to 3, h heads of p = 2C/h, state of N numbers for each channel of a head:
        z, xBC, dt = W x                          2C, 2C + 2N, h channels
        X, B, C = SiLU(DW3x3(xBC));  a = softplus(dt + bias) exp(A_log)
        S_h = sum_t a_th X_th B_t^T               [p, N], over all tokens
        y_th = S_h C_t + D_h X_th
        output = Wo (LN(y) * z)                   z without an activation, the norm before the gate
    mixer of stage 4: softmax attention over all tokens

Sums over tokens are not divided by their number; LN takes the scale out again.

Origin: YuHengsss/VSSD at 87b753b (classification/models/mamba2.py), without a licence file; written from the paper and
its mathematics. Key names are the published ones. Its classifier takes sides that are multiples of 32 only; this one
takes what the published backbone takes, any. `linear_attn_duality=False` is the causal scan in row order that the paper
compares with, and `bidirection` half of the heads (and groups) in reverse; both run on `tersor.kernels.ssd`. `lepe` adds
a convolution that the published code holds but never calls. Its constructor has other defaults than its models: ours are
those of the models.

Proven: the golden cases of the published code (the operator with one and two groups, two tiny models, the backbone at 76 x
100, Micro at 224), parameter counts, and the operator against the causal kernel's last state. A small one trained by us on
20,000 pictures of CIFAR-10 is ten points ahead of a plain ViT that trained as long (benchmarks/results/vision_training.md).
Not proven: ImageNet accuracy (82.5, 83.6, 84.1, 84.7 published); the causal modes have no published numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.kernels.ssd import non_causal, ssd
from tersor.layers.checks import divides, one_of, same_length
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.patch_embed import check_image
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class VSSDConfig:
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns pooled features
    embed_dim: int = 64  # C of the first stage
    depths: tuple[int, ...] = (2, 4, 12, 4)  # blocks of each stage
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    attn_types: tuple[str, ...] = ("mamba2", "mamba2", "mamba2", "standard")  # the mixer of each stage
    mlp_ratio: float = 4.0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.2  # of the last block; earlier ones linearly less
    ssd_expansion: int = 2  # width inside the mixer over C
    ssd_ngroups: int = 1  # of B and C; -1: as many as heads
    d_state: int = 64  # N
    linear_attn_duality: bool = True  # False: the causal scan
    bidirection: bool = False  # of the causal scan: half of the heads backward
    lepe: bool = False  # a convolution that is stored and not used
    ssd_positve_dA: bool = True  # noqa: N815  published spelling. False: a is negative
    simple_downsample: bool = False
    simple_patch_embed: bool = False
    out_indices: tuple[int, ...] = ()  # stages whose maps are returned in place of logits

    def __post_init__(self) -> None:
        same_length("vssd", depths=self.depths, num_heads=self.num_heads, attn_types=self.attn_types)
        for stage, (heads, kind) in enumerate(zip(self.num_heads, self.attn_types, strict=True)):
            one_of("vssd", "attn_types", kind, ("mamba2", "standard"))
            d = self.embed_dim * 2**stage
            divides("vssd", "num_heads", heads, "width", d if kind == "standard" else d * self.ssd_expansion)
            if kind == "mamba2" and self.ssd_ngroups != -1:
                divides("vssd", "ssd_ngroups", self.ssd_ngroups, "num_heads", heads)
            if kind == "mamba2" and self.bidirection and (heads % 2 or self.groups(heads) % 2):
                raise TersorError(f"vssd's bidirection halves the heads and groups, {heads} and {self.groups(heads)}")
        for index in self.out_indices:
            one_of("vssd", "out_indices", index, range(len(self.depths)))
        if self.bidirection and self.linear_attn_duality:
            raise TersorError("vssd's bidirection True is of the causal scan: it needs linear_attn_duality=False")

    def groups(self, heads: int) -> int:
        return heads if self.ssd_ngroups == -1 else self.ssd_ngroups


def conv_last(conv: nn.Module, x: Tensor) -> Tensor:
    """A module for (B, C, H, W), of a map (B, H, W, C)."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvUnit(nn.Module):
    """Convolution, BatchNorm if `norm`, ReLU if `act`. The bias is there where the norm is not, unless `bias` says so."""

    def __init__(
        self, d_in: int, d_out: int, kernel: int, *, stride: int = 1, padding: int | None = None, groups: int = 1,
        bias: bool = False, norm: bool = True, act: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(d_in, d_out, kernel, stride, padding, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(d_out) if norm else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return x.relu() if self.act else x


class Stem(nn.Module):
    """image (B, 3, H, W) -> (B, ceil(H/4), ceil(W/4), d)."""

    def __init__(self, d_in: int, d: int) -> None:
        super().__init__()
        m = d // 2
        self.conv1 = ConvUnit(d_in, m, 3, stride=2)
        self.conv2 = nn.Sequential(ConvUnit(m, m, 3), ConvUnit(m, m, 3, act=False))
        self.conv3 = nn.Sequential(ConvUnit(m, 4 * d, 3, stride=2), ConvUnit(4 * d, d, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.conv3(x + self.conv2(x))
        return x.permute(0, 2, 3, 1)


class SimpleStem(nn.Module):
    """image (B, 3, H, W) -> (B, floor(H/4), floor(W/4), d)."""

    def __init__(self, d_in: int, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.conv1 = ConvUnit(d_in, d, 4, stride=4, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv1(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C), through 8C channels."""

    def __init__(self, d: int) -> None:
        super().__init__()
        hidden = 8 * d
        self.conv = nn.Sequential(
            ConvUnit(d, hidden, 1, bias=True, norm=False),
            ConvUnit(hidden, hidden, 3, stride=2, groups=hidden, bias=True, norm=False),
            ConvUnit(hidden, 2 * d, 1, bias=True, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return conv_last(self.conv, x)


class SimpleDownsample(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(ConvUnit(d, 2 * d, 3, stride=2, bias=True, norm=False))
        self.norm = nn.LayerNorm(2 * d)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(conv_last(self.conv, x))


class SSDMixer(nn.Module):
    """The mixer of the module docstring, x [B, H, W, C]."""

    def __init__(self, d: int, heads: int, config: VSSDConfig) -> None:
        super().__init__()
        self.config, self.heads, self.groups = config, heads, config.groups(heads)
        inner, bc = config.ssd_expansion * d, self.groups * config.d_state
        self.widths = [inner, bc, bc]
        self.dt_bias = nn.Parameter(inverse_softplus_of_log_uniform(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.in_proj = nn.Linear(d, 2 * inner + 2 * bc + heads, bias=False)
        self.conv2d = nn.Conv2d(inner + 2 * bc, inner + 2 * bc, 3, padding=1, groups=inner + 2 * bc)
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, d, bias=False)
        if config.lepe:
            self.lepe = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[1]
        z, xBC, dt = self.in_proj(x).split((self.widths[0], sum(self.widths), self.heads), dim=-1)
        xBC = F.silu(conv_last(self.conv2d, xBC)).flatten(1, 2)  # (B, L, ...)
        X, B, C = torch.split(xBC, self.widths, dim=-1)
        X = rearrange(X, "b l (h p) -> b l h p", h=self.heads)
        B, C = (rearrange(each, "b l (g n) -> b l g n", g=self.groups) for each in (B, C))
        dt = F.softplus(dt.flatten(1, 2) + self.dt_bias)  # (B, L, heads)
        A = -self.A_log.exp()
        if self.config.linear_attn_duality:
            y = non_causal(X, -dt * A if self.config.ssd_positve_dA else dt * A, B, C, D=self.D)
        elif self.config.bidirection:
            y = self._both_ways(X, dt, A, B, C)
        else:
            y, _ = ssd(X, dt, A, B, C, D=self.D)
        y = rearrange(y, "b (y x) h p -> b y x (h p)", y=height)
        return self.out_proj(self.norm(y) * z)

    def _both_ways(self, X: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """The first half of the heads reads the tokens forward, the second backward."""
        Xs, dts, Bs, Cs = (each.chunk(2, 2) for each in (X, dt, B, C))
        As, Ds = A.chunk(2), self.D.chunk(2)
        forward, _ = ssd(Xs[0], dts[0], As[0], Bs[0], Cs[0], D=Ds[0])
        backward, _ = ssd(Xs[1].flip(1), dts[1].flip(1), As[1], Bs[1].flip(1), Cs[1].flip(1), D=Ds[1])
        return torch.cat((forward, backward.flip(1)), 2)


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, drop: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, drop
        self.to_qkv = nn.Linear(d, 3 * d, bias=False)
        self.to_out = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[1]
        q, k, v = rearrange(self.to_qkv(x), "b y x (three h p) -> three b h (y x) p", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop if self.training else 0.0)
        return self.to_out(rearrange(y, "b h (y x) p -> b y x (h p)", y=height))


class Mlp(nn.Module):
    def __init__(self, d: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, d)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, d: int, heads: int, kind: str, config: VSSDConfig, drop_path: float) -> None:
        super().__init__()
        self.cpe1 = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.norm1 = nn.LayerNorm(d)
        self.attn = SSDMixer(d, heads, config) if kind == "mamba2" else Attention(d, heads, config.drop_rate)
        self.cpe2 = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = Mlp(d, int(d * config.mlp_ratio), config.drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + conv_last(self.cpe1, x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + conv_last(self.cpe2, x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Returns what the next stage takes, and the map before it was downsampled; both (B, H, W, C)."""

    def __init__(self, blocks: list[Block], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(x)
        return (x if self.downsample is None else self.downsample(x)), x


@register(
    "vssd",
    task="classify",
    input="image",
    paper="arXiv 2407.18559",
    variants={
        "vssd_micro": (13_512_964, {"embed_dim": 48, "depths": (2, 2, 8, 4), "d_state": 48, "drop_path_rate": 0.1}),
        "vssd_tiny": (24_270_724, {"depths": (2, 4, 8, 4)}),
        "vssd_small": (40_075_650, {"depths": (3, 4, 21, 5), "drop_path_rate": 0.4}),
        "vssd_base": (
            88_823_151,
            {"embed_dim": 96, "depths": (3, 4, 21, 5), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.6},
        ),
    },
    small={
        "num_classes": 10,
        "embed_dim": 8,
        "depths": (1, 1, 1, 1),
        "num_heads": (2, 2, 4, 4),
        "d_state": 8,
    },
)
class VSSD(nn.Module):
    """image (B, C, H, W) -> logits (B, num_classes), or with out_indices the normalised maps of these stages."""

    def __init__(self, config: VSSDConfig) -> None:
        super().__init__()
        self.config = config
        stem, downsample = (
            SimpleStem if config.simple_patch_embed else Stem,
            SimpleDownsample if config.simple_downsample else Downsample,
        )
        self.patch_embed = stem(config.in_chans, config.embed_dim)
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.layers = nn.ModuleList()
        widths = [config.embed_dim * 2**stage for stage in range(len(config.depths))]
        rates = linear_rates(config.drop_path_rate, config.depths)
        kinds = zip(widths, config.num_heads, config.attn_types, rates, strict=True)
        for stage, (d, heads, kind, stage_rates) in enumerate(kinds):
            blocks = [Block(d, heads, kind, config, rate) for rate in stage_rates]
            self.layers.append(Stage(blocks, downsample(d) if stage + 1 < len(widths) else None))
        if config.out_indices:
            for index in config.out_indices:
                self.add_module(f"outnorm{index}", nn.LayerNorm(widths[index]))
        else:
            self.norm = nn.LayerNorm(widths[-1])
            self.head = nn.Linear(widths[-1], config.num_classes) if config.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        if self.config.out_indices:
            return self.features(image)
        x = self._stages(image)[-1]
        return self.head(self.norm(x).mean((1, 2)))

    def features(self, image: Tensor) -> list[Tensor]:
        """The maps (B, C, H, W) before each downsampling; with out_indices those asked for, normalised."""
        maps = self._stages(image)
        if chosen := self.config.out_indices:
            maps = [self.get_submodule(f"outnorm{index}")(maps[index]) for index in sorted(chosen)]
        return [each.permute(0, 3, 1, 2) for each in maps]

    def _stages(self, image: Tensor) -> list[Tensor]:
        check_image("vssd", image, channels=self.config.in_chans, at_least=4)
        x, maps = self.pos_drop(self.patch_embed(image)), []
        for stage in self.layers:
            x, before = stage(x)
            maps.append(before)
        return maps

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, 64, 64)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A classifier's checkpoint for the backbone: its head goes, and the maps' norms stay fresh."""
        if not self.config.out_indices:
            return state
        fresh = {key: value for key, value in self.state_dict().items() if key.startswith("outnorm")}
        return fresh | {key: value for key, value in state.items() if not key.startswith(("norm.", "head."))}


def inverse_softplus_of_log_uniform(count: int, *, low: float = 1e-3, high: float = 0.1) -> Tensor:
    """x such that softplus(x) is log-uniform between low and high, and at least 1e-4."""
    dt = torch.empty(count).uniform_(math.log(low), math.log(high)).exp().clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))
