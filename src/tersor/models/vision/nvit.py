"""NViT and ReViT: vision transformers whose widths differ from block to block (Yang et al., CVPR 2023, arXiv 2110.04869).

What it is for: the dense form of a ViT or DeiT from which structural pruning took embedding channels, heads, query/key
and value channels and hidden units of the MLPs; and ReViT, to be trained from scratch, whose widths follow the trend that pruning
found. `tersor compress nvit VIT` prunes (methods/structure/nvit.py).

    model = tersor.models.create("revit_tiny")
    model = tersor.models.load("nvit", "pruned.pth", embed_dim=496, heads=(6, 8, ...), qk=(40, ...), v=(32, ...), mlp=(1056, ...))
    model = tersor.models.load("nvit", "deit_base_distilled_patch16_224.pth")          # unpruned, equal to DeiT
    logits = model(image)                                                             # image (B, 3, H, W), normalised

Block i has h heads with q query/key and v value channels each, and m hidden units; x [B, n, D], n with the class (and
distillation) token:

    x = x + Wo [softmax(Q K^T / sqrt(head_dim)) V]     Q, K = W LN(x) [B, h, n, q], V = W LN(x) [B, h, n, v]
    x = x + W2 GELU(W1 LN(x))

The scale is that of the unpruned width (`head_dim`, 64), whatever q is. `token_mask`, one number per place, multiplies
Q, K and V (ones, unless a checkpoint says otherwise). Patches are flattened pixel by pixel, the channel fastest.
`norm_width` is the D over which the LayerNorms take mean and variance: channels that are missing count as zeros, so that a
pruned model computes what it did while the pruned channels were zeroed. 0, as published: of the D that are there.

Training returns the logits of both heads, eval their mean (one head without `distilled`).

Origin: NVlabs/NViT @ 48feca4 (NVIDIA Source Code License-NC: nothing of its code is used here), whose key names are ours.
DeiT's keys are read too. ReViT: with u = round(D / 200), w = round(D / 160), heads 10, 2u, 2u, 4u (6 times), 2u, 2u, 10;
q 16w, 8w, 8w, 16w (6 times), 8w, 8w, 16w; v 64; m 3D, 6D in the middle six.

Proven: the golden cases (dense models of three and twelve blocks); DeiT's layout loads to the function of the ViT.
Not proven: ImageNet accuracies. Not here: the widths of NViT-B, H, S and T, which were published in checkpoints only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.models.registry import register
from tersor.models.vision.vit import MatMul, Mlp, classifier


@dataclass(frozen=True, kw_only=True)
class NViTConfig:
    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns the class token
    embed_dim: int = 768  # D
    heads: tuple[int, ...] = (12,) * 12  # of each block, as the next three
    qk: tuple[int, ...] = (64,) * 12  # per head
    v: tuple[int, ...] = (64,) * 12  # per head
    mlp: tuple[int, ...] = (3072,) * 12
    head_dim: int = 64  # the attention's scale is head_dim^-0.5
    norm_width: int = 0  # channels that the LayerNorms count; 0: embed_dim
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    distilled: bool = True
    token_mask: bool = True

    def __post_init__(self) -> None:
        if self.img_size % self.patch_size:
            raise TersorError(f"patches of {self.patch_size} do not divide an image of {self.img_size} pixels")
        for name in ("qk", "v", "mlp"):
            if len(getattr(self, name)) != len(self.heads):
                raise TersorError(f"{name} is for {len(getattr(self, name))} blocks, heads for {len(self.heads)}")
        for name in ("heads", "qk", "v", "mlp"):
            if min(getattr(self, name), default=1) < 1:
                raise TersorError(f"{name}={getattr(self, name)} must be positive in every block")
        if self.norm_width and self.norm_width < self.embed_dim:
            raise TersorError(f"norm_width={self.norm_width} is less than the {self.embed_dim} channels that there are")

    @property
    def patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        return self.patches + (2 if self.distilled else 1)


class PrunedLayerNorm(nn.LayerNorm):
    """LayerNorm of x [..., D] whose mean and variance are over `counted` channels; those beyond D are zero."""

    def __init__(self, config: NViTConfig) -> None:
        super().__init__(config.embed_dim, eps=config.norm_eps)
        self.counted = config.norm_width or config.embed_dim

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        if self.counted == width:
            return super().forward(x)
        x, weight, bias = (F.pad(each, (0, self.counted - width)) for each in (x, self.weight, self.bias))
        return F.layer_norm(x, (self.counted,), weight, bias, self.eps)[..., :width]


class QKV(nn.Module):
    """x [B, n, D] -> q, k [B, h, n, q], v [B, h, n, v]."""

    def __init__(self, config: NViTConfig, block: int) -> None:
        super().__init__()
        self.heads = config.heads[block]
        qk, v = self.heads * config.qk[block], self.heads * config.v[block]
        self.token_mask = nn.Parameter(torch.ones(config.tokens, 1)) if config.token_mask else None
        self.Q = nn.Linear(config.embed_dim, qk, bias=config.qkv_bias)
        self.K = nn.Linear(config.embed_dim, qk, bias=config.qkv_bias)
        self.V = nn.Linear(config.embed_dim, v, bias=config.qkv_bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = [self.Q(x), self.K(x), self.V(x)]
        if self.token_mask is not None:
            found = [each * self.token_mask for each in found]
        return [rearrange(each, "b n (h d) -> b h n d", h=self.heads) for each in found]


class Projection(nn.Module):
    """What published keys call `proj.proj`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class NViTAttention(nn.Module):
    """x [B, n, D] -> [B, n, D]."""

    def __init__(self, config: NViTConfig, block: int) -> None:
        super().__init__()
        self.scale = config.head_dim**-0.5
        self.qkv = QKV(config, block)
        self.proj = Projection(config.heads[block] * config.v[block], config.embed_dim)
        self.qk, self.av = MatMul(), MatMul()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        weights = (self.qk(q, k.transpose(-2, -1)) * self.scale).softmax(-1)  # [B, h, n, n]
        return self.proj(rearrange(self.av(weights, v), "b h n d -> b n (h d)"))


class NViTBlock(nn.Module):
    def __init__(self, config: NViTConfig, block: int) -> None:
        super().__init__()
        self.norm1 = PrunedLayerNorm(config)
        self.attn = NViTAttention(config, block)
        self.norm2 = PrunedLayerNorm(config)
        self.mlp = Mlp(config.embed_dim, config.mlp[block])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """image [B, C, H, W] -> [B, patches, D]."""

    def __init__(self, config: NViTConfig) -> None:
        super().__init__()
        self.image, self.patch = config.img_size, config.patch_size
        self.proj = nn.Conv2d(config.in_chans * config.patch_size**2, config.embed_dim, 1)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-2:] != (self.image, self.image):
            found = " x ".join(map(str, image.shape[-2:]))
            raise TersorError(f"the model takes images of {self.image} x {self.image} pixels, not {found}")
        deep = rearrange(image, "b c (h p1) (w p2) -> b (p1 p2 c) h w", p1=self.patch, p2=self.patch)
        return rearrange(self.proj(deep), "b d h w -> b (h w) d")


@register(
    "nvit",
    task="classify",
    input="image",
    paper="arXiv 2110.04869",
    variants={
        "revit_tiny": (
            5_341_512,
            {
                "embed_dim": 176,
                "heads": (10, 2, 2, 4, 4, 4, 4, 4, 4, 2, 2, 10),
                "qk": (16, 8, 8, 16, 16, 16, 16, 16, 16, 8, 8, 16),
                "mlp": (528, 528, 528, 1056, 1056, 1056, 1056, 1056, 1056, 528, 528, 528),
            },
        ),
        "revit_small": (
            23_125_656,
            {
                "embed_dim": 384,
                "heads": (10, 4, 4, 8, 8, 8, 8, 8, 8, 4, 4, 10),
                "qk": (32, 16, 16, 32, 32, 32, 32, 32, 32, 16, 16, 32),
                "mlp": (1152, 1152, 1152, 2304, 2304, 2304, 2304, 2304, 2304, 1152, 1152, 1152),
            },
        ),
    },
    small={
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "num_classes": 10,
        "heads": (2, 3),
        "qk": (8, 12),
        "v": (16, 8),
        "mlp": (64, 48),
        "norm_width": 64,
    },
)
class NViT(nn.Module):
    """image [B, C, H, W] -> logits [B, num_classes]; of both heads in training where there are two."""

    def __init__(self, config: NViTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width)) if config.distilled else None
        self.pos_embed = nn.Parameter(torch.randn(1, config.tokens, width) * 0.02)
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(NViTBlock(config, n) for n in range(len(config.heads)))
        self.norm = PrunedLayerNorm(config)
        self.head = classifier(width, config.num_classes)
        self.head_dist = classifier(width, config.num_classes) if config.distilled else None

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        patches = self.patch_embed(image)
        first = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        x = torch.cat([*(token.expand(patches.shape[0], -1, -1) for token in first), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = self.head(x[:, 0])
        if self.head_dist is None:
            return logits
        distilled: Tensor = self.head_dist(x[:, 1])
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def operations(self) -> int:
        """Floating-point operations of the matrix products for one image, two for each multiplication."""
        config, D, n = self.config, self.config.embed_dim, self.config.tokens
        total = config.patches * config.in_chans * config.patch_size**2 * D
        total += (2 if config.distilled else 1) * D * config.num_classes
        for h, q, v, m in zip(config.heads, config.qk, config.v, config.mlp, strict=True):
            total += n * D * (2 * h * q + 2 * h * v + 2 * m) + n * n * h * (q + v)
        return 2 * total

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, self.config.img_size, self.config.img_size)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """ViT's and DeiT's layout (fused qkv, convolved patches) and that of the prunable model (a head axis in Q, K, V)."""
        found: dict[str, Tensor] = {}
        for key, value in state.items():
            if ".attn.qkv.weight" in key or ".attn.qkv.bias" in key:
                stem, _, last = key.rpartition(".")
                found |= {f"{stem}.{name}.{last}": part for name, part in zip("QKV", value.chunk(3), strict=True)}
            elif key == "patch_embed.proj.weight" and value.shape[-1] > 1:
                found[key] = rearrange(value, "d c p1 p2 -> d (p1 p2 c) 1 1")
            elif ".attn.qkv." in key and key.endswith(".weight") and value.dim() == 3:  # [q, D, h]
                found[key] = rearrange(value, "q d h -> (h q) d")
            elif ".attn.qkv." in key and key.endswith(".bias") and value.dim() == 2:
                found[key] = rearrange(value, "q h -> (h q)")
            elif ".attn.proj." in key and ".attn.proj.proj." not in key:
                flat = rearrange(value, "d v h -> d (h v)") if value.dim() == 3 else value
                found[key.replace(".attn.proj.", ".attn.proj.proj.")] = flat
            else:
                found[key] = value
        for key in [key for key in found if key.endswith("head_mask.weight")]:
            mask, stem = found.pop(key), key.removesuffix("head_mask.weight")
            if f"{stem}Q.weight" not in found:
                continue
            for name in "QKV":  # it multiplies what they give, per head
                rows = found[f"{stem}{name}.weight"]
                scale = mask.flatten().repeat_interleave(len(rows) // mask.numel())
                found[f"{stem}{name}.weight"] = rows * scale[:, None]
                found[f"{stem}{name}.bias"] = found[f"{stem}{name}.bias"] * scale
        return found
