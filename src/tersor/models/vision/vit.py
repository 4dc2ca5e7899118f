"""ViT, the vision transformer (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929), and DeiT (Touvron et al., arXiv 2012.12877).

What it is for: image classification, and the model on which quantizers, pruning and token reduction of vision
transformers are compared. `demo-vit` is one that comes with the package, trained on CIFAR-10.

    model = tersor.load("demo-vit")                                          # built in: 32 x 32 images, 10 classes
    model = tersor.models.load("deit_small_patch16_224", "deit_small.pth")   # a checkpoint of timm or of DeiT
    logits = model(image)                                                    # image (B, 3, H, W), normalised

With n patches of p x p pixels and a class token in front, x [B, 1 + n, D]:

    x = x + Wo [softmax(q k^T / sqrt(d)) v]        q, k, v = Wqkv LN(x), heads of d = D / num_heads
    x = x + W2 GELU(W1 LN(x))                      hidden mlp_ratio * D
    logits = head(LN(x)[class token])

`distilled` adds DeiT's distillation token and its own head: training returns both logits, eval their mean.
The two products of the attention are modules without weights (`qk`, `av`), so that a method can quantize them.

Origin: huggingface/pytorch-image-models' VisionTransformer, whose key names are ours (Apache-2.0), and facebookresearch/deit.

Proven: parameter counts of the published variants; the golden cases of the methods that run on it (repquant) load
timm's layout to 1e-9 in float64; demo-vit's accuracy (benchmarks/vision.py). Not proven: ImageNet accuracies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns the class token
    embed_dim: int = 768  # D
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    distilled: bool = False

    def __post_init__(self) -> None:
        if self.img_size % self.patch_size:
            raise TersorError(f"patches of {self.patch_size} do not divide an image of {self.img_size} pixels")
        if self.embed_dim % self.num_heads:
            raise TersorError(f"{self.num_heads} heads do not divide {self.embed_dim} channels")


class MatMul(nn.Module):
    """a @ b: a place that a method can put a quantized product in."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Attention(nn.Module):
    """x [B, N, D] -> [B, N, D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.scale = (config.embed_dim // config.num_heads) ** -0.5
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.qk, self.av = MatMul(), MatMul()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        weights = (self.qk(q, k.transpose(-2, -1)) * self.scale).softmax(-1)  # [B, h, N, N]
        return self.proj(rearrange(self.av(weights, v), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = Mlp(config.embed_dim, int(config.embed_dim * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """image [B, C, H, W] -> [B, n, D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.size = config.img_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-2:] != (self.size, self.size):
            found = " x ".join(map(str, image.shape[-2:]))
            raise TersorError(f"the model takes images of {self.size} x {self.size} pixels, not {found}")
        return rearrange(self.proj(image), "b d h w -> b (h w) d")


def classifier(width: int, classes: int) -> nn.Module:
    """tokens [B, width] -> logits [B, classes], or themselves for 0 classes."""
    return nn.Linear(width, classes) if classes else nn.Identity()


@register(
    "vit",
    task="classify",
    input="image",
    paper="arXiv 2010.11929",
    variants={
        "vit_tiny_patch16_224": (5_717_416, {"embed_dim": 192, "num_heads": 3}),
        "vit_small_patch16_224": (22_050_664, {"embed_dim": 384, "num_heads": 6}),
        "vit_base_patch16_224": (86_567_656, {}),
        "deit_tiny_patch16_224": (5_717_416, {"embed_dim": 192, "num_heads": 3}),
        "deit_small_patch16_224": (22_050_664, {"embed_dim": 384, "num_heads": 6}),
        "deit_base_patch16_224": (86_567_656, {}),
        "deit_base_distilled_patch16_224": (87_338_192, {"distilled": True}),
    },
    small={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10},
)
class VisionTransformer(nn.Module):
    """image [B, C, H, W] -> logits [B, num_classes]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width, patches = config.embed_dim, (config.img_size // config.patch_size) ** 2
        tokens = patches + (2 if config.distilled else 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width)) if config.distilled else None
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = classifier(width, config.num_classes)
        self.head_dist = classifier(width, config.num_classes) if config.distilled else None

    def embed(self, image: Tensor) -> Tensor:
        """The tokens that the first block sees, [B, 1 (2) + n, D]."""
        first = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        patches = self.patch_embed(image)
        tokens = [
            token.expand(patches.shape[0], -1, -1) for token in first
        ]  # len() would fix the batch of a traced model
        return torch.cat([*tokens, patches], 1) + self.pos_embed

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = self.head(x[:, 0])
        if self.head_dist is None:
            return logits
        distilled: Tensor = self.head_dist(x[:, 1])
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, self.config.img_size, self.config.img_size)}
