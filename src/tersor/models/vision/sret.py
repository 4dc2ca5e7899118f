"""SReT, the sliced recursive transformer (Shen et al., ECCV 2022, arXiv 2111.05297).

What it is for: image classification with few weights. Each block is used twice in a row, a small net of its own follows
each use, so a model of depth 20 stores 10 blocks. Slices, groups of tokens that attend among themselves, win back the
operations that the second use costs.

    model = tersor.models.load("sret_t", "SReT_T.pth")        # official file, shared blocks under one key or both
    logits = model(image)                                     # image (B, 3, 224, 224), ImageNet-normalised
    maps = model.features(image)                              # three maps at strides 8, 16, 32

A stage of `depth` L with r = `recursive_num` blocks runs, on tokens x [B, N, D],

    for b in range(r):  for l in range(L / r):   x = NLL_u(Block_b(x)),   u = b L / r + l
    Block:  x = c1 x + c2 A(LN(x));   x = c3 x + c4 W2 GELU(W1 LN(x))        c: one learnable number each, 1 at first
    NLL:    x = c1 x + c2 W2 GELU(W1 LN(x))                                 the non-linear projection, never shared

A is attention with heads of `base_dims` channels. With slices, the first use of a block cuts the N tokens, row by row,
into groups1 groups of N / groups1 that attend inside themselves; the second use into groups2, of shuffled tokens where
groups2 > 1. Use u counts as a second one where it is odd, which is meant for two uses a block.
`shuffle` says which permutation p that is (tokens x[:, p] go in, the inverse comes back): "random" is a fresh one at
every call, in eval mode too, as published, so that the outputs of published sliced models differ from call to call;
"fixed" is p_i = (a i + 1) mod N, a the smallest odd number above N // 3 that has no divisor in common with N; "train",
the default, is random in training and fixed in eval mode.

Sliced and unsliced models have the same weights: a checkpoint of one runs in the other. `published_state` gives the
checkpoint with each shared block under all its keys, as the published code saves it. Every stage's width has to be a
multiple of the one before (the convolution between them has a group a channel), and an image has to be
`image_size` pixels square (a learned position per token); 384 and 512 are published for S and T.
`soft_cross_entropy` is the loss that the distilled models were trained with.

Origin: szq0214/SReT at af6db0a (SReT.py, SReT_wo_slice.py, kd_loss.py), MIT. Its key names are ours. Its arguments
patch_size and stride have no effect there and are left out. Stochastic depth acts on the blocks only; a shared block has
the rate of its own number in the stage.

Proven: the golden cases of the published code (with and without slices, with the fixed shuffle, SReT-T at full size) to
5e-6; both checkpoint forms; the gradient of a shared block is the sum of its uses'. Not proven: ImageNet accuracy (SReT-T
76.0, LT 76.7, S 81.9 published; unsliced 76.1, 76.8, 82.0).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers import checks
from tersor.layers.drop_path import DropPath
from tersor.layers.patch_embed import check_image
from tersor.models.registry import register

STRIDE = 8  # of the stem


@dataclass(frozen=True, kw_only=True)
class SReTConfig:
    image_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns pooled features
    base_dims: tuple[int, ...] = (32, 32, 32)  # channels a head; the width D is this times heads
    heads: tuple[int, ...] = (2, 4, 8)
    depth: tuple[int, ...] = (4, 10, 6)  # uses of blocks
    recursive_num: tuple[int, ...] = (2, 5, 3)  # blocks
    mlp_ratio: float = 3.6
    np_mlp_ratio: float = 1.0  # of the non-linear projections
    groups1: tuple[int, ...] = ()  # slices of a block's first use, by stage; (): unsliced
    groups2: tuple[int, ...] = ()  # of its second use
    shuffle: str = "train"  # random permutation before the second use: in "train" only, "random" always, "fixed" never
    drop_rate: float = 0.0  # of the stem's output, the attention's projection and the MLPs
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0  # published: 0.1 in the sliced models

    def __post_init__(self) -> None:
        checks.one_of("sret", "shuffle", self.shuffle, ("train", "random", "fixed"))
        checks.at_least("sret", 0, num_classes=self.num_classes)
        checks.at_least("sret", 1, in_chans=self.in_chans)
        stages = {"base_dims": self.base_dims, "heads": self.heads, "depth": self.depth}
        checks.same_length("sret", **stages, recursive_num=self.recursive_num)
        checks.divides("sret", "its stem's stride", STRIDE, "image_size", self.image_size)
        for L, r in zip(self.depth, self.recursive_num, strict=True):
            checks.divides("sret", "recursive_num", r, "depth", L)
        for narrow, wide in pairwise(self.widths):
            checks.divides("sret", "the width before", narrow, "width (base_dims * heads)", wide)
        if bool(self.groups1) != bool(self.groups2):
            raise TersorError(f"sret takes groups1 and groups2 together, not {self.groups1} and {self.groups2}")
        if self.groups1:
            checks.same_length("sret", depth=self.depth, groups1=self.groups1, groups2=self.groups2)
            for side, g1, g2 in zip(self.sides, self.groups1, self.groups2, strict=True):
                checks.divides("sret", "groups1", g1, f"token count {side} x {side} =", side**2)
                checks.divides("sret", "groups2", g2, f"token count {side} x {side} =", side**2)

    @property
    def widths(self) -> list[int]:
        return [base * heads for base, heads in zip(self.base_dims, self.heads, strict=True)]

    @property
    def sides(self) -> list[int]:
        """Tokens a row, by stage."""
        return [-(-self.image_size // (STRIDE << stage)) for stage in range(len(self.depth))]


def fixed_permutation(n: int) -> Tensor:
    """(n,) int64: (a i + 1) mod n, a permutation because a and n have no common divisor."""
    a = n // 3 + 1
    while a % 2 == 0 or math.gcd(a, n) > 1:
        a += 1
    return (torch.arange(n, device="cpu") * a + 1) % n


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """logits (B, classes) of both -> mean over the batch of -sum softmax(teacher) log softmax(student).

    The caller divides both logits by a temperature T. No gradient goes to the teacher.
    """
    return -(teacher.detach().softmax(1) * student.log_softmax(1)).sum(1).mean()


class Coefficient(nn.Module):
    """One learnable number that scales a branch; named `bias` in checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias * x


class Mlp(nn.Module):
    def __init__(self, d: int, ratio: float, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, int(d * ratio))
        self.fc2 = nn.Linear(int(d * ratio), d)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, config: SReTConfig) -> None:
        super().__init__()
        self.heads, self.drop = heads, config.attn_drop_rate
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.proj_drop = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, groups: int = 1, order: Tensor | None = None) -> Tensor:
        """x (B, N, D). Groups are cut from x[:, order]; the output is in the order of x."""
        B, N, D = x.shape
        qkv = self.qkv(x if order is None else x[:, order])
        qkv = qkv.reshape(B * groups, N // groups, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B g, h, N/g, D/h) each
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop if self.training else 0.0)
        mixed = mixed.transpose(1, 2).reshape(B, N, D)
        if order is not None:
            mixed = mixed[:, order.argsort()]
        return self.proj_drop(self.proj(mixed))


class Block(nn.Module):
    def __init__(self, d: int, heads: int, config: SReTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d, eps=1e-6)
        self.attn = Attention(d, heads, config)
        self.norm2 = nn.LayerNorm(d, eps=1e-6)
        self.mlp = Mlp(d, config.mlp_ratio, config.drop_rate)
        self.coefficient1, self.coefficient2 = Coefficient(), Coefficient()
        self.coefficient3, self.coefficient4 = Coefficient(), Coefficient()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, groups: int = 1, order: Tensor | None = None) -> Tensor:
        mixed = self.attn(self.norm1(x), groups, order)
        x = self.coefficient1(x) + self.coefficient2(self.drop_path(mixed))
        return self.coefficient3(x) + self.coefficient4(self.drop_path(self.mlp(self.norm2(x))))


class NonLinearProjection(nn.Module):
    def __init__(self, d: int, config: SReTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d, eps=1e-6)
        self.mlp = Mlp(d, config.np_mlp_ratio, config.drop_rate)
        self.coefficient1, self.coefficient2 = Coefficient(), Coefficient()

    def forward(self, x: Tensor) -> Tensor:
        return self.coefficient1(x) + self.coefficient2(self.mlp(self.norm1(x)))


class Stage(nn.Module):
    """A shared block is held once, under the number of its first use (2 u); the projection after use u is number 2 u + 1."""

    def __init__(self, config: SReTConfig, stage: int) -> None:
        super().__init__()
        d, heads, N = config.widths[stage], config.heads[stage], config.sides[stage] ** 2
        uses, before = config.depth[stage], sum(config.depth[:stage])
        self.loops = uses // config.recursive_num[stage]
        self.shuffle = config.shuffle
        self.groups = (config.groups1[stage], config.groups2[stage]) if config.groups1 else (1, 1)
        self.blocks = nn.ModuleDict()
        for u in range(uses):
            if u % self.loops == 0:
                rate = config.drop_path_rate * (before + u // self.loops) / sum(config.depth)
                self.blocks[str(2 * u)] = Block(d, heads, config, rate)
            self.blocks[str(2 * u + 1)] = NonLinearProjection(d, config)
        self.uses = uses
        self.register_buffer("order", fixed_permutation(N), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        for u in range(self.uses):
            second = u % 2 == 1
            groups = self.groups[second]
            order = self._order(x) if second and groups > 1 else None
            x = self.blocks[str(2 * (u - u % self.loops))](x, groups, order)
            x = self.blocks[str(2 * u + 1)](x)
        return x.transpose(1, 2).reshape(x.shape[0], -1, H, W)

    def _order(self, x: Tensor) -> Tensor:
        if self.shuffle == "random" or (self.shuffle == "train" and self.training):
            return torch.randperm(x.shape[1], device=x.device)
        return self.get_buffer("order")


class Stem(nn.Module):
    """H -> H/8 in three convolutions."""

    def __init__(self, in_chans: int, d: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, d // 2, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(d // 2)
        self.conv2 = nn.Conv2d(d // 2, d, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(d)
        self.conv3 = nn.Conv2d(d, d, 3, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.bn3(self.conv3(x)).relu()


class Pool(nn.Module):
    """Halves height and width; every input channel makes d_out / d_in output channels by itself."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(d_in, d_out, 3, stride=2, padding=1, groups=d_in)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@register(
    "sret",
    task="classify",
    input="image",
    paper="arXiv 2111.05297",
    variants={
        "sret_t": (4_755_979, {"groups1": (8, 4, 1), "groups2": (2, 1, 1), "drop_path_rate": 0.1}),
        "sret_t_wo_slice": (4_755_979, {}),
        "sret_t_wo_slice_384": (4_853_259, {"image_size": 384}),
        "sret_lt": (
            4_988_024,
            {"mlp_ratio": 4.0, "groups1": (8, 4, 1), "groups2": (2, 1, 1), "drop_path_rate": 0.1},
        ),
        "sret_lt_16_14_1": (
            4_988_024,
            {"mlp_ratio": 4.0, "groups1": (16, 14, 1), "groups2": (1, 1, 1), "drop_path_rate": 0.1},
        ),
        "sret_lt_wo_slice": (4_988_024, {"mlp_ratio": 4.0}),
        "sret_s": (
            20_899_692,
            {
                "base_dims": (42, 42, 42),
                "heads": (3, 6, 12),
                "mlp_ratio": 3.0,
                "np_mlp_ratio": 2.0,
                "groups1": (8, 4, 1),
                "groups2": (2, 1, 1),
                "drop_path_rate": 0.1,
            },
        ),
        "sret_s_wo_slice": (
            20_899_692,
            {"base_dims": (42, 42, 42), "heads": (3, 6, 12), "mlp_ratio": 3.0, "np_mlp_ratio": 2.0},
        ),
        "sret_s_wo_slice_384": (
            21_091_212,
            {
                "image_size": 384,
                "base_dims": (42, 42, 42),
                "heads": (3, 6, 12),
                "mlp_ratio": 3.0,
                "np_mlp_ratio": 2.0,
            },
        ),
        "sret_s_wo_slice_512": (
            21_317_004,
            {
                "image_size": 512,
                "base_dims": (42, 42, 42),
                "heads": (3, 6, 12),
                "mlp_ratio": 3.0,
                "np_mlp_ratio": 2.0,
            },
        ),
    },
    small={
        "image_size": 64,
        "num_classes": 10,
        "base_dims": (8, 8, 8),
        "depth": (2, 4, 2),
        "recursive_num": (1, 2, 1),
        "mlp_ratio": 2.0,
        "groups1": (8, 4, 1),
        "groups2": (2, 1, 1),
    },
)
class SReT(nn.Module):
    """image (B, C, image_size, image_size) -> logits (B, num_classes)."""

    def __init__(self, config: SReTConfig) -> None:
        super().__init__()
        self.config = config
        widths, side = config.widths, config.sides[0]
        self.patch_embed = Stem(config.in_chans, widths[0])
        self.pos_embed = nn.Parameter(torch.empty(1, widths[0], side, side))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.transformers = nn.ModuleList(Stage(config, stage) for stage in range(len(widths)))
        self.pools = nn.ModuleList(Pool(narrow, wide) for narrow, wide in pairwise(widths))
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], config.num_classes) if config.num_classes else nn.Identity()

    def features(self, image: Tensor) -> list[Tensor]:
        """The stages' maps, (B, D, S/8, S/8) and on by factors of two."""
        side = self.config.image_size
        check_image("sret", image, channels=self.config.in_chans)
        if image.shape[-2:] != (side, side):
            raise TersorError(
                f"this sret takes images of {side} x {side} pixels, not {image.shape[-2]} x {image.shape[-1]}; "
                "for others create it with that image_size"
            )
        x = self.pos_drop(self.patch_embed(image) + self.pos_embed)
        maps = []
        for stage, transformer in enumerate(self.transformers):
            x = transformer(self.pools[stage - 1](x) if stage else x)
            maps.append(x)
        return maps

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.features(image)[-1].mean((2, 3))))

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        side = self.config.image_size
        return {"image": torch.randn(batch_size, self.config.in_chans, side, side)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A shared block's tensors may be given under the key of each use; they have to be equal."""
        converted: dict[str, Tensor] = {}
        for key, value in state.items():
            first, *_ = self._keys_of_uses(key)
            if first in converted and not torch.equal(converted[first], value):
                raise TersorError(f"sret uses one block for {first} and {key}, but the checkpoint's two differ")
            converted[first] = value
        return converted

    def published_state(self) -> dict[str, Tensor]:
        """The state in the published layout: a shared block's tensors under the key of each of its uses."""
        return {each: value for key, value in self.state_dict().items() for each in self._keys_of_uses(key)}

    def _keys_of_uses(self, key: str) -> list[str]:
        """The keys under which the published layout holds the tensor `key`; the first is ours."""
        match = re.fullmatch(r"(transformers\.(\d+)\.blocks\.)(\d+)(\..+)", key)
        if match is None or int(match[3]) % 2 or int(match[2]) >= len(self.config.depth):
            return [key]
        loops = self.config.depth[int(match[2])] // self.config.recursive_num[int(match[2])]
        u = int(match[3]) // 2
        return [f"{match[1]}{2 * (u - u % loops + use)}{match[4]}" for use in range(loops)]
