"""DLGSANet: super-resolution with predicted kernels and sparse channel attention (Li et al., ICCV 2023, arXiv 2301.02031).

What it is for: a picture of 2, 3 or 4 times the size from a network of half a million parameters.

    model = tersor.models.load("dlgsanet_light_x4", "DLGSANet_light_x4.pth")      # official checkpoint
    large = model(image)                                                          # image (B, 3, H, W) in [0, 1], any size

s = conv(image - mean); deep = conv(groups(s)); then deep + s goes through a convolution and a pixel shuffle. A group is
`blocks` times a local and a global layer, a convolution, and a skip around it. Layers on x [B, C, H, W]:

    local    x = x + W1 (K * (W0 LN x)),   x = x + F(LN x)     K: a k x k kernel for every pixel and group of channels,
                                           K = V2 DWkxk(V1 u), u = W0 LN x; not normalised, zeros outside
    global   x = x + G(LN x),              x = x + F(LN x)
        q, k, v = DW3x3(W x), as n heads of C/n rows, H W long;  q, k of length 1
        G = Wo (ReLU(t q k^T) v)           channels attend to channels, t a number for each head
    F = W2 (GELU(a) * b), [a, b] = DW3x3(W1 x), 2C wide        or W2 GELU(W1 x), "BaseFFN"

LN is over the channels of a pixel. In eval mode with `tlc_flag` G works in overlapping windows of `tlc_kernel` pixels a
side, so that q k^T is a sum over as many pixels as in training, and averages where they overlap.

Origin: NeonLeexiang/DLGSANet at 0974b9a (basicsr/archs/dlgsanet_arch.py), Apache-2.0; its kernel for K runs on CUDA
only, here it is k^2 shifted products in plain torch. Key names are theirs. `idynamic_num_heads` is, as published, the
number of channels that share a kernel. `buildblock_type` "edge" has a softmax for the ReLU, "idynamic" only local
layers, "restormer" only global ones with softmax; the softmax ones always have windows of 48. Windows take any batch
here, one picture at a time there. The option file of Tiny x3 has 4 blocks (730,899 parameters), the paper's size 3.

Proven: the golden cases of the published code (overlapping windows; x3 without, with "pixelshuffle", norms and "BaseFFN";
Tiny x4), parameter counts. A small one trained by us for seven minutes beats bicubic enlarging by 0.2 dB
(benchmarks/results/vision_training.md). Not proven: PSNR as published (Urban100 x4: 26.55 Tiny, 26.66 Light).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.activations import Activate
from tersor.layers.checks import at_least, divides, one_of
from tersor.layers.patch_embed import check_image
from tersor.models.registry import register

MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's red, green and blue
UPSAMPLE_WIDTH = 64  # of "pixelshuffle"
SOFTMAX_WINDOW = 48  # the published softmax layers are not told tlc_kernel


@dataclass(frozen=True, kw_only=True)
class DLGSANetConfig:
    in_chans: int = 3
    dim: int = 60  # C
    groups: int = 4
    blocks: int = 3
    buildblock_type: str = "edge"  # "sparseedge" in the published models, "idynamic", "restormer"
    window_size: int = 7  # k
    idynamic_num_heads: int = 6  # channels that share a predicted kernel
    idynamic_ffn_type: str = "GDFN"  # or "BaseFFN"
    idynamic_ffn_expansion_factor: float = 2.0
    idynamic: bool = True  # False: one learned kernel for all pixels
    restormer_num_heads: int = 6  # n
    restormer_ffn_type: str = "GDFN"
    restormer_ffn_expansion_factor: float = 2.0
    tlc_flag: bool = True
    tlc_kernel: int = 48
    activation: str = "relu"  # of the sparse attention; "gelu", "sigmoid", "identity"
    upscale: int = 4
    img_range: float = 1.0
    upsampler: str = ""  # "pixelshuffledirect" in the published models, "pixelshuffle"; "": the size stays
    body_norm: bool = False

    def __post_init__(self) -> None:
        name = "dlgsanet"
        one_of(name, "buildblock_type", self.buildblock_type, ("sparseedge", "edge", "idynamic", "restormer"))
        one_of(name, "upsampler", self.upsampler, ("pixelshuffledirect", "pixelshuffle", ""))
        one_of(name, "activation", self.activation, ("relu", "gelu", "sigmoid", "identity"))
        for kind in (self.idynamic_ffn_type, self.restormer_ffn_type):
            one_of(name, "ffn_type", kind, ("GDFN", "BaseFFN"))
        at_least(name, 1, groups=self.groups, blocks=self.blocks, tlc_kernel=self.tlc_kernel, upscale=self.upscale)
        divides(name, "restormer_num_heads", self.restormer_num_heads, "dim", self.dim)
        if self.idynamic:
            divides(name, "idynamic_num_heads", self.idynamic_num_heads, "dim", self.dim)
        if self.window_size < 1 or self.window_size % 2 == 0:
            raise TersorError(f"dlgsanet's window_size is odd, not {self.window_size}")
        if self.upsampler == "pixelshuffle" and self.upscale != 3 and self.upscale & (self.upscale - 1):
            raise TersorError(
                f"dlgsanet's pixelshuffle makes pictures 3 or 2^n times as large, not {self.upscale} times"
            )


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class GatedFFN(nn.Module):
    """F of the module docstring."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.project_in = nn.Conv2d(d, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, d, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.dwconv(self.project_in(x)).chunk(2, 1)
        return self.project_out(F.gelu(a) * b)


class BaseFFN(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(d, hidden, 1), nn.GELU(), nn.Conv2d(hidden, d, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def ffn(kind: str, d: int, factor: float) -> nn.Module:
    return GatedFFN(d, int(d * factor)) if kind == "GDFN" else BaseFFN(d, int(d * factor))


def dynamic_depthwise(u: Tensor, weights: Tensor) -> Tensor:
    """u (B, C, H, W) under a kernel of its own at each pixel, weights (B, g, k, k, H, W); C/g channels share one.

    A sum of k^2 shifted products: no copy of u is k^2 times as large.
    """
    (height, width), k, g = u.shape[2:], weights.shape[2], weights.shape[1]
    padded = F.pad(u, (k // 2,) * 4)
    padded = padded.reshape(u.shape[0], g, -1, *padded.shape[2:])  # (B, g, C/g, H + k - 1, W + k - 1)
    total = torch.zeros_like(u).reshape(u.shape[0], g, -1, height, width)
    for i in range(k):
        for j in range(k):
            total = total + weights[:, :, None, i, j] * padded[..., i : i + height, j : j + width]
    return total.reshape(u.shape)


class DynamicConv(nn.Module):
    def __init__(self, d: int, kernel: int, channels: int) -> None:
        super().__init__()
        self.kernel, hidden = kernel, d // 4
        self.conv1 = nn.Sequential(
            nn.Conv2d(d, hidden, 1), nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)
        )
        self.conv2 = nn.Sequential(nn.Conv2d(hidden, kernel**2 * (d // channels), 1))

    def forward(self, u: Tensor) -> Tensor:
        weights: Tensor = self.conv2(self.conv1(u))
        size = (self.kernel, self.kernel, *u.shape[2:])
        return dynamic_depthwise(u, weights.reshape(u.shape[0], -1, *size))


class LocalConv(nn.Module):
    def __init__(self, config: DLGSANetConfig) -> None:
        super().__init__()
        d, k = config.dim, config.window_size
        self.conv0 = nn.Conv2d(d, d, 1, bias=False)
        self.conv1 = nn.Conv2d(d, d, 1, bias=False)
        if config.idynamic:
            self.conv: nn.Module = DynamicConv(d, k, config.idynamic_num_heads)
        else:
            self.conv = nn.Conv2d(d, d, k, padding=k // 2, groups=d)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv(self.conv0(x)))


class LocalLayer(nn.Module):
    def __init__(self, config: DLGSANetConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(config.dim), ChannelNorm(config.dim)
        self.IDynamicDWConv = LocalConv(config)
        self.IDynamic_ffn = ffn(config.idynamic_ffn_type, config.dim, config.idynamic_ffn_expansion_factor)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.IDynamicDWConv(self.norm1(x))
        return x + self.IDynamic_ffn(self.norm2(x))


class ChannelAttention(nn.Module):
    """G of the module docstring; window: of the local windows in eval mode, None: the whole picture."""

    def __init__(self, d: int, heads: int, activation: str, window: int | None) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(d, 3 * d, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(3 * d, 3 * d, 3, padding=1, groups=3 * d, bias=False)
        self.project_out = nn.Conv2d(d, d, 1, bias=False)
        self.act = nn.Softmax(-1) if activation == "softmax" else Activate(activation, of="dlgsanet")

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv_dwconv(self.qkv(x))
        if self.training or self.window is None:
            return self.project_out(self._attend(qkv))
        return self.project_out(self._in_windows(qkv, self.window))

    def _attend(self, qkv: Tensor) -> Tensor:
        """(B, 3C, H, W) -> (B, C, H, W)."""
        batch, _, height, width = qkv.shape
        q, k, v = (each.reshape(batch, self.heads, -1, height * width) for each in qkv.chunk(3, 1))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)  # (B, n, C/n, C/n)
        return (self.act(scores * self.temperature) @ v).reshape(batch, -1, height, width)

    def _in_windows(self, qkv: Tensor, side: int) -> Tensor:
        batch, channels, height, width = qkv.shape
        rows, columns = min(side, height), min(side, width)
        places = [(i, j) for i in window_starts(height, rows) for j in window_starts(width, columns)]
        parts = self._attend(torch.cat([qkv[:, :, i : i + rows, j : j + columns] for i, j in places]))
        total = qkv.new_zeros(batch, channels // 3, height, width)
        count = qkv.new_zeros(height, width)
        for (i, j), part in zip(places, parts.view(len(places), -1, *parts.shape[1:]), strict=True):
            total[:, :, i : i + rows, j : j + columns] += part
            count[i : i + rows, j : j + columns] += 1
        return total / count


class GlobalLayer(nn.Module):
    def __init__(self, config: DLGSANetConfig) -> None:
        super().__init__()
        sparse = config.buildblock_type == "sparseedge"
        side = config.tlc_kernel if sparse else SOFTMAX_WINDOW
        activation = config.activation if sparse else "softmax"
        window = side if config.tlc_flag else None
        self.norm3, self.norm4 = ChannelNorm(config.dim), ChannelNorm(config.dim)
        self.restormer_attn = ChannelAttention(config.dim, config.restormer_num_heads, activation, window)
        self.restormer_ffn = ffn(config.restormer_ffn_type, config.dim, config.restormer_ffn_expansion_factor)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.restormer_attn(self.norm3(x))
        return x + self.restormer_ffn(self.norm4(x))


class Group(nn.Module):
    def __init__(self, config: DLGSANetConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(config.blocks):
            if config.buildblock_type != "restormer":
                layers.append(LocalLayer(config))
            if config.buildblock_type != "idynamic":
                layers.append(GlobalLayer(config))
        self.body = nn.Sequential(*layers, nn.Conv2d(config.dim, config.dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class PatchEmbed(nn.Module):
    def __init__(self, d_in: int, d: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(d_in, d, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@register(
    "dlgsanet",
    task="restore",
    input="image",
    paper="arXiv 2301.02031",
    variants={
        "dlgsanet_tiny_x2": (
            565_710,
            {
                "dim": 48,
                "groups": 3,
                "buildblock_type": "sparseedge",
                "upsampler": "pixelshuffledirect",
                "upscale": 2,
                "tlc_kernel": 96,
            },
        ),
        "dlgsanet_tiny_x3": (
            572_205,
            {
                "dim": 48,
                "groups": 3,
                "buildblock_type": "sparseedge",
                "upsampler": "pixelshuffledirect",
                "upscale": 3,
                "tlc_kernel": 72,
            },
        ),
        "dlgsanet_tiny_x4": (
            581_298,
            {"dim": 48, "groups": 3, "buildblock_type": "sparseedge", "upsampler": "pixelshuffledirect"},
        ),
        "dlgsanet_light_x2": (
            745_188,
            {
                "dim": 48,
                "buildblock_type": "sparseedge",
                "upsampler": "pixelshuffledirect",
                "upscale": 2,
                "tlc_kernel": 96,
            },
        ),
        "dlgsanet_light_x3": (
            751_683,
            {
                "dim": 48,
                "buildblock_type": "sparseedge",
                "upsampler": "pixelshuffledirect",
                "upscale": 3,
                "tlc_kernel": 72,
            },
        ),
        "dlgsanet_light_x4": (
            760_776,
            {"dim": 48, "buildblock_type": "sparseedge", "upsampler": "pixelshuffledirect"},
        ),
        "dlgsanet_large_x4": (
            4_762_920,
            {
                "dim": 90,
                "groups": 6,
                "blocks": 4,
                "buildblock_type": "sparseedge",
                "upsampler": "pixelshuffledirect",
            },
        ),
    },
    small={
        "dim": 16,
        "groups": 1,
        "blocks": 1,
        "buildblock_type": "sparseedge",
        "window_size": 3,
        "idynamic_num_heads": 4,
        "restormer_num_heads": 2,
        "tlc_kernel": 8,
        "upsampler": "pixelshuffledirect",
        "upscale": 2,
    },
)
class DLGSANet(nn.Module):
    """image (B, C, H, W) -> (B, C, upscale H, upscale W)."""

    mean: Tensor

    def __init__(self, config: DLGSANetConfig) -> None:
        super().__init__()
        self.config = config
        d = config.dim
        mean = torch.tensor(MEAN if config.in_chans == 3 else (0.0,) * config.in_chans, device="cpu")
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.overlap_embed = nn.Sequential(PatchEmbed(config.in_chans, d))
        body: list[nn.Module] = [Group(config) for _ in range(config.groups)]
        if config.body_norm:
            body = [ChannelNorm(d), *body, ChannelNorm(d)]
        self.deep_feature_extraction = nn.Sequential(*body, nn.Conv2d(d, d, 3, padding=1))
        if config.upsampler == "pixelshuffledirect":
            self.upsample = shuffles([config.upscale], d, config.in_chans)
        elif config.upsampler == "pixelshuffle":
            self.conv_before_upsample = nn.Sequential(nn.Conv2d(d, UPSAMPLE_WIDTH, 3, padding=1), nn.LeakyReLU())
            steps = [3] if config.upscale == 3 else [2] * (config.upscale.bit_length() - 1)
            self.upsample = shuffles(steps, UPSAMPLE_WIDTH, UPSAMPLE_WIDTH)
            self.conv_last = nn.Conv2d(UPSAMPLE_WIDTH, config.in_chans, 3, padding=1)
        else:
            self.conv_last = nn.Conv2d(d, config.in_chans, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        s = self._shallow(image)
        x = self.deep_feature_extraction(s) + s
        if self.config.upsampler == "pixelshuffledirect":
            x = self.upsample(x)
        elif self.config.upsampler == "pixelshuffle":
            x = self.conv_last(self.upsample(self.conv_before_upsample(x)))
        else:
            x = self.conv_last(x)
        return x / self.config.img_range + self.mean

    def features(self, image: Tensor) -> list[Tensor]:
        """One map (B, C, H, W): what the groups make of the picture, before the skip and the reconstruction."""
        return [self.deep_feature_extraction(self._shallow(image))]

    def _shallow(self, image: Tensor) -> Tensor:
        check_image("dlgsanet", image, channels=self.config.in_chans)
        return self.overlap_embed((image - self.mean) * self.config.img_range)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.rand(batch_size, self.config.in_chans, 12, 16)}


def window_starts(length: int, side: int) -> list[int]:
    """Where windows of `side` pixels start so that they cover `length`, as evenly as the published rule has it."""
    count = (length - 1) // side + 1
    step = side if count == 1 else math.ceil((length - side) / (count - 1) - 1e-8)
    starts = [0]
    while starts[-1] + side < length:
        starts.append(min(starts[-1] + step, length - side))
    return starts


def shuffles(steps: list[int], d: int, d_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for step in steps:
        layers += [nn.Conv2d(d, d_out * step**2, 3, padding=1), nn.PixelShuffle(step)]
    return nn.Sequential(*layers)
