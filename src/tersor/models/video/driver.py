"""Video Swin for driver monitoring: distracted and drowsy driving from clips (arXiv 2207.12148; 2106.13230).

What it is for: which of 9 distractions a driver is at (Driver Monitoring Dataset), or whether the driver is drowsy
(NTHU-DDD), from a few seconds of a camera's pictures; with other classes, any short clips. The driver paper trains an
unchanged Video Swin Transformer, so that one's Kinetics variants are here too.

    model = tersor.models.load("video_swin_t", "swin_tiny_patch244_window877_kinetics400_1k.pth")
    logits = model(clip)                        # clip (B, 3, T, H, W), ImageNet-normalised; any T, H, W
    maps = model.features(clip)                 # the stages' maps (B, C 2^i, T', H', W')

Patches of 2 frames x 4 x 4 pixels become tokens of width C. A stage halves height and width of the one before and
doubles the width; time keeps its length. A block, x [B, T', H', W', C]:

    x = x + Attention(LN x)                     in windows (wt, wh, ww); every second block's windows are shifted by half
    x = x + MLP(LN x)
    Attention: softmax(q k^T / sqrt(C / heads) + bias[offset] + mask) v
    logits = Linear(mean over T', H', W' of LN(x))

A side of the grid that is not longer than the window is one window, unshifted. A grid that is no multiple of the window
is padded with zeros behind the norm; unless the windows are shifted, tokens see that padding.

Origin: SwinTransformer/Video-Swin-Transformer at db018fb (mmaction/models/backbones/swin_transformer.py), Apache-2.0,
with the averaged linear head. No code was published for the driver paper. Quirk kept: where the grid cuts the window to
n tokens, their offsets are the first n rows and columns of the whole window's index, which is right only if no more
than time was cut; the weights were trained so. The config's defaults are the published constructor's; its training
configs, and ours below, set patch, window and patch_norm.
Checkpoints load in mmaction's, torchvision's and, inflated over time, the 2-D Swin's layout. Not known: which size,
frames per clip and first weights the driver paper used. It reports 97.5 % for distraction and 44 % for drowsiness,
which did not carry over to other drivers.

Proven: the golden cases of the published code to 5e-6 (cut windows, shifts, odd sizes, the T variant with 9 classes);
an inflated 2-D Swin sees in a still clip what it sees in the picture; the order of frames is learned where single
frames tell nothing. Not proven: any accuracy on driving or Kinetics; of torchvision's layout, more than the names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides, same_length
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.positions import resize_grid
from tersor.layers.windows import fit_window, merge, pad_to, partition, relative_index, shift_mask
from tersor.models import key_maps
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class DriverConfig:
    in_chans: int = 3
    num_classes: int = 400  # 0: no head, forward returns pooled features
    patch_size: tuple[int, int, int] = (4, 4, 4)  # T, H, W
    embed_dim: int = 96  # C of the first stage
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: tuple[int, int, int] = (2, 7, 7)  # T, H, W in tokens
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None  # None, or 0: head width ** -0.5
    patch_norm: bool = False
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.2
    dropout_ratio: float = 0.5  # before the classifier

    def __post_init__(self) -> None:
        for name in ("patch_size", "window_size"):
            sides = getattr(self, name)
            if len(sides) != 3 or min(sides) < 1:
                raise TersorError(f"driver's {name} is three numbers (time, height, width) of at least 1, not {sides}")
        same_length("driver", depths=self.depths, num_heads=self.num_heads)
        at_least("driver", 1, in_chans=self.in_chans, stages=len(self.depths), **{"blocks a stage": min(self.depths)})
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            divides("driver", "heads", heads, "width", width)

    @property
    def widths(self) -> list[int]:
        return [self.embed_dim * 2**stage for stage in range(len(self.depths))]


class PatchEmbed(nn.Module):
    """clip (B, 3, T, H, W) -> tokens (B, T', H', W', C); sides are padded with zeros to whole patches."""

    def __init__(self, config: DriverConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.proj = nn.Conv3d(config.in_chans, config.embed_dim, self.patch, self.patch)
        self.norm = nn.LayerNorm(config.embed_dim) if config.patch_norm else nn.Identity()

    def forward(self, clip: Tensor) -> Tensor:
        behind = [each for side, p in zip(clip.shape[:1:-1], self.patch[::-1], strict=True) for each in (0, -side % p)]
        return self.norm(self.proj(F.pad(clip, behind)).movedim(1, -1))


class WindowAttention(nn.Module):
    def __init__(self, config: DriverConfig, stage: int) -> None:
        super().__init__()
        C, self.heads = config.widths[stage], config.num_heads[stage]
        self.scale = config.qk_scale or (C // self.heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros(math.prod(2 * w - 1 for w in config.window_size), self.heads)
        )
        self.register_buffer("index", relative_index(config.window_size), persistent=False)
        self.qkv = nn.Linear(C, 3 * C, bias=config.qkv_bias)
        self.proj = nn.Linear(C, C)
        self.attn_drop, self.proj_drop = config.attn_drop_rate, nn.Dropout(config.drop_rate)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B * windows, n, C), mask (windows, n, n)."""
        BW, n, C = x.shape
        q, k, v = self.qkv(x).reshape(BW, n, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (BW, h, n, C/h)
        bias = self.relative_position_bias_table[self.get_buffer("index")[:n, :n]].permute(2, 0, 1)  # (h, n, n)
        added = bias[None] if mask is None else (mask[:, None] + bias).repeat(BW // len(mask), 1, 1, 1)
        dropout = self.attn_drop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(BW, n, C)))


class Mlp(nn.Module):
    def __init__(self, C: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(C, hidden)
        self.fc2 = nn.Linear(hidden, C)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """x (B, T', H', W', C) -> the same; `shifted` blocks move their windows by half a window."""

    def __init__(self, config: DriverConfig, stage: int, *, shifted: bool, drop_path: float) -> None:
        super().__init__()
        C = config.widths[stage]
        self.window = config.window_size
        self.shift = [w // 2 if shifted else 0 for w in self.window]
        self.norm1 = nn.LayerNorm(C)
        self.attn = WindowAttention(config, stage)
        self.norm2 = nn.LayerNorm(C)
        self.mlp = Mlp(C, int(C * config.mlp_ratio), config.drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        T, H, W = x.shape[1:-1]
        window, shift = fit_window((T, H, W), self.window, self.shift)
        x, mask = pad_to(x, window), None
        grid = x.shape[1:-1]
        if any(shift):
            mask = shift_mask(grid, window, shift, device=x.device).to(x)
            x = x.roll([-s for s in shift], (1, 2, 3))
        x = merge(self.attn(partition(x, window), mask), window, grid)
        if any(shift):
            x = x.roll(shift, (1, 2, 3))
        return x[:, :T, :H, :W]


class PatchMerging(nn.Module):
    """(B, T', H', W', C) -> (B, T', ceil(H'/2), ceil(W'/2), 2C)."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * C)
        self.reduction = nn.Linear(4 * C, 2 * C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to(x, (1, 2, 2))
        corners = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Stage(nn.Module):
    """x -> its own map, and what the next stage gets."""

    def __init__(self, config: DriverConfig, stage: int, rates: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(config, stage, shifted=number % 2 == 1, drop_path=rate) for number, rate in enumerate(rates)
        )
        self.downsample = PatchMerging(config.widths[stage]) if stage + 1 < len(config.depths) else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


class Backbone(nn.Module):
    """clip (B, 3, T, H, W) -> every stage's map (B, T', H', W', C 2^i), the last one behind a norm."""

    def __init__(self, config: DriverConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.pos_drop = nn.Dropout(config.drop_rate)
        rates = linear_rates(config.drop_path_rate, config.depths)
        self.layers = nn.ModuleList(Stage(config, stage, rates[stage]) for stage in range(len(rates)))
        self.norm = nn.LayerNorm(config.widths[-1])

    def forward(self, clip: Tensor) -> list[Tensor]:
        x = self.pos_drop(self.patch_embed(clip))
        maps: list[Tensor] = []
        for layer in self.layers:
            own, x = layer(x)
            maps.append(own)
        return [*maps[:-1], self.norm(x)]


class Head(nn.Module):
    def __init__(self, C: int, config: DriverConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout_ratio)
        self.fc_cls = nn.Linear(C, config.num_classes)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.fc_cls(self.dropout(pooled))


@register(
    "driver",
    task="classify",
    input="video",
    paper="arXiv 2207.12148",
    variants={
        "driver_distraction_t": (
            27_857_391,
            {
                "num_classes": 9,
                "patch_size": (2, 4, 4),
                "window_size": (8, 7, 7),
                "patch_norm": True,
                "drop_path_rate": 0.1,
            },
        ),
        "driver_drowsiness_t": (
            27_852_008,
            {
                "num_classes": 2,
                "patch_size": (2, 4, 4),
                "window_size": (8, 7, 7),
                "patch_norm": True,
                "drop_path_rate": 0.1,
            },
        ),
        "video_swin_t": (
            28_158_070,
            {"patch_size": (2, 4, 4), "window_size": (8, 7, 7), "patch_norm": True, "drop_path_rate": 0.1},
        ),
        "video_swin_s": (
            49_816_678,
            {
                "patch_size": (2, 4, 4),
                "depths": (2, 2, 18, 2),
                "window_size": (8, 7, 7),
                "patch_norm": True,
                "drop_path_rate": 0.1,
            },
        ),
        "video_swin_b": (
            88_048_984,
            {
                "patch_size": (2, 4, 4),
                "embed_dim": 128,
                "depths": (2, 2, 18, 2),
                "num_heads": (4, 8, 16, 32),
                "window_size": (8, 7, 7),
                "patch_norm": True,
                "drop_path_rate": 0.3,
            },
        ),
        "video_swin_b_ssv2": (
            88_834_038,
            {
                "num_classes": 174,
                "patch_size": (2, 4, 4),
                "embed_dim": 128,
                "depths": (2, 2, 18, 2),
                "num_heads": (4, 8, 16, 32),
                "window_size": (16, 7, 7),
                "patch_norm": True,
                "drop_path_rate": 0.4,
            },
        ),
    },
    small={
        "num_classes": 5,
        "patch_size": (2, 4, 4),
        "embed_dim": 16,
        "depths": (2, 1),
        "num_heads": (2, 4),
        "window_size": (2, 4, 4),
        "patch_norm": True,
    },
)
class Driver(nn.Module):
    """clip (B, C, T, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: DriverConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.cls_head = Head(config.widths[-1], config) if config.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.cls_head, Head):
            nn.init.normal_(self.cls_head.fc_cls.weight, std=0.01)

    def maps(self, clip: Tensor) -> list[Tensor]:
        if clip.dim() != 5 or clip.shape[1] != self.config.in_chans:
            raise TersorError(
                f"driver takes clips (batch, {self.config.in_chans}, time, height, width), not {list(clip.shape)}"
            )
        return self.backbone(clip)

    def features(self, clip: Tensor) -> list[Tensor]:
        """The stages' maps (B, C 2^i, T', H', W'), the last one behind the final norm."""
        return [each.movedim(-1, 1) for each in self.maps(clip)]

    def forward(self, clip: Tensor) -> Tensor:
        return self.cls_head(self.maps(clip)[-1].mean((1, 2, 3)))

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"clip": torch.randn(batch_size, self.config.in_chans, 8, 48, 64)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = key_maps.drop(state, r"relative_position_index$", r"attn_mask$")
        if any(key.startswith(("backbone.", "cls_head.")) for key in state):
            return state
        state = key_maps.rename(
            state,  # torchvision's names
            (r"^features\.(\d*[02468])\.(\d+)", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}"),
            (r"^features\.(\d*[13579])\.", lambda m: f"layers.{int(m[1]) // 2}.downsample."),
            (r"\.mlp\.0\.", ".mlp.fc1."),
            (r"\.mlp\.3\.", ".mlp.fc2."),
        )
        kernel = state.get("patch_embed.proj.weight")
        if kernel is not None and kernel.dim() == 4:
            state = inflate(state, self.config)
        return key_maps.rename(
            state, (r"^head\.", "cls_head.fc_cls."), (r"^(patch_embed|layers|norm)\.", r"backbone.\1.")
        )


def inflate(state: dict[str, Tensor], config: DriverConfig) -> dict[str, Tensor]:
    """A 2-D Swin's weights for clips: a still picture repeated over time gives the patches that it gives there.

    The patch kernel is spread evenly over the frames of a patch, and every offset in time gets the bias of its offset in
    space, brought to the spatial window by bicubic interpolation. The classifier stays as it is.
    """
    frames, (wt, wh, ww) = config.patch_size[0], config.window_size
    inflated = dict(state)
    inflated["patch_embed.proj.weight"] = (
        state["patch_embed.proj.weight"][:, :, None].repeat(1, 1, frames, 1, 1) / frames
    )
    for key, table in state.items():
        if key.endswith("relative_position_bias_table"):
            side = math.isqrt(len(table))  # the 2-D window is a square
            space = resize_grid(table[None], (side, side), (2 * wh - 1, 2 * ww - 1))[0]
            inflated[key] = space.repeat(2 * wt - 1, 1)
    return inflated
