"""TurboViT, a reconstruction of it from Hiera's blocks (Wong, Abbasi and Nair, arXiv 2308.11421; Hiera: Ryali et al., ICML
2023, arXiv 2306.00989).

What it is for: fast image classification by a plain hierarchical transformer: matrix products, softmax, LayerNorm, GELU
and maxima, no convolution after the patch embedding. Early stages attend inside mask units (windows), late ones over the
whole image; queries are max-pooled between stages, so that four stages have strides 4, 8, 16, 32.

    model = tersor.models.create("turbovit")                  # 12.7M parameters, 2.25G multiply-adds
    model = tersor.models.load("hiera_tiny", "hiera_tiny_224.pth")   # facebookresearch's or timm's file
    logits = model(image)                                     # image (B, 3, 224, 224), ImageNet-normalised
    maps = model.features(image)                              # four maps at strides 4, 8, 16, 32

**TurboViT's code, weights and dimensions were never published.** The abstract says: mask unit attention, Q-pooling at three
places, most blocks behind the second; 2.47 times fewer parameters than FasterViT-0 (so about 12.7M), 3.4 times fewer
operations than MobileViTv2-2.0 (about 2.2G), 82.1 % top-1. Ours are the variant's widths, depths and heads, chosen to
meet these counts with Hiera's blocks (2.25G are 3.34 times fewer), and no accuracy is claimed for it. `costs` counts
any design, and `search` looks for designs within a budget, by a score of yours; the paper's own search is proprietary.

Tokens x [B, N, C] are put in an order in which pooling and windows are plain reshapes ("unrolled"): the 2x2 position at
the finest level is the slowest index, then those of the coarser levels, then the place of the unit in the image. Then

    n = LN(x);   x = P(x) + A(n);   x = x + W2 GELU(W1 LN(x))
    P(x) = x, where the width grows Wp n, and behind it, where the block pools, the maximum over each 2x2
    A: attention of q (pooled by the maximum where the block pools), k, v, inside each unit or over all tokens

Width, heads and pooling change in the first block of a stage. That block still attends as the stage before did
(`mask_unit_attn` says per stage whether in units). A unit is `mask_unit_size` tokens large before any pooling and
shrinks with it. With `q_pool` below the number of further stages, the last ones widen without pooling. `dims`, `heads`
and `mlp_ratios` give each stage its own, in place of Hiera's rule (times dim_mul and head_mul from stage to stage).

Origin: the blocks of facebookresearch/hiera, Apache-2.0, as in timm 1.0.31 (whose key names are ours; `norm` and
`head.projection` of the original are mapped). A block that pools without widening pools its shortcut; Hiera has no such.

Proven: the golden cases of timm's Hiera (the reconstruction at full size; two tiny ones, also not square, with two pools and
global first stages) to 5e-6; mask unit attention equals an independent windowed attention; counts of the sheet's designs.
Beside FasterViT-0 it is 2.7 (compiled) to 4.8 times as fast for one picture on an H200, and as fast to 1.4 times for 64
(benchmarks/results/vision_latency.md; published: 3.21). Not proven: that this is TurboViT's architecture; any accuracy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers import checks
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.patch_embed import check_image
from tersor.models import key_maps
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class TurboViTConfig:
    img_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns normed pooled features
    embed_dim: int = 64
    num_heads: int = 1
    stages: tuple[int, ...] = (1, 2, 7, 2)  # blocks
    q_pool: int = 3  # how many stages begin with pooling
    q_stride: tuple[int, int] = (2, 2)
    mask_unit_size: tuple[int, int] = (8, 8)  # tokens
    mask_unit_attn: tuple[bool, ...] = (True, True, False, False)
    dim_mul: float = 2.0
    head_mul: float = 2.0
    mlp_ratio: float = 4.0
    patch_kernel: tuple[int, int] = (7, 7)
    patch_stride: tuple[int, int] = (4, 4)
    patch_padding: tuple[int, int] = (3, 3)
    drop_path_rate: float = 0.0
    dims: tuple[int, ...] = ()  # C of each stage; (): by embed_dim and dim_mul
    heads: tuple[int, ...] = ()  # (): by num_heads and head_mul
    mlp_ratios: tuple[float, ...] = ()  # (): mlp_ratio everywhere

    def __post_init__(self) -> None:
        count = len(self.stages)
        checks.at_least("turbovit", 0, num_classes=self.num_classes)
        checks.at_least("turbovit", 1, in_chans=self.in_chans, embed_dim=self.embed_dim, num_heads=self.num_heads)
        for blocks in self.stages:
            checks.at_least("turbovit", 1, stages=blocks)
        if not 0 <= self.q_pool < count:
            raise TersorError(
                f"turbovit pools before at most {count - 1} of its {count} stages, not q_pool {self.q_pool}"
            )
        for name in ("mask_unit_attn", "dims", "heads", "mlp_ratios"):
            given = getattr(self, name)
            if len(given) != count and (given or name == "mask_unit_attn"):
                raise TersorError(f"turbovit needs one entry of {name} for each of {count} stages, not {given}")
        for C, heads in zip(self.widths, self.head_counts, strict=True):
            checks.divides("turbovit", "heads", heads, "width", C)
        levels = count - 1
        allowed = [tuple(stride**j for stride in self.q_stride) for j in range(levels + 1)]
        checks.one_of("turbovit", "mask_unit_size", tuple(self.mask_unit_size), allowed)
        for side, tokens, stride, pixels in zip(
            self.img_size, self.grid, self.q_stride, self.patch_stride, strict=True
        ):
            if tokens < 1 or tokens % stride**levels:
                raise TersorError(
                    f"turbovit divides its tokens by {stride} {levels} times; img_size {side} does not go, "
                    f"multiples of {pixels * stride**levels} do"
                )
        for block in self.plan():
            if block.in_units and (block.unit < block.pool or block.unit % block.pool):
                raise TersorError(
                    f"turbovit's mask units of {self.mask_unit_size} tokens are used up before stage {block.stage + 1}; "
                    "set mask_unit_attn to False there, or take larger units"
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens in a column and in a row, before pooling."""
        return self.img_size[0] // self.patch_stride[0], self.img_size[1] // self.patch_stride[1]

    @property
    def widths(self) -> list[int]:
        return list(self.dims) or _grow(self.embed_dim, self.dim_mul, len(self.stages))

    @property
    def head_counts(self) -> list[int]:
        return list(self.heads) or _grow(self.num_heads, self.head_mul, len(self.stages))

    @property
    def ratios(self) -> list[float]:
        return list(self.mlp_ratios) or [self.mlp_ratio] * len(self.stages)

    def plan(self) -> list[BlockPlan]:
        """Every block's sizes, in order."""
        q, tokens, unit = math.prod(self.q_stride), math.prod(self.grid), math.prod(self.mask_unit_size)
        blocks, d_in = [], self.widths[0]
        for stage, depth in enumerate(self.stages):
            for number in range(depth):
                first = number == 0 and stage > 0
                pool = q if first and stage <= self.q_pool else 1
                in_units = self.mask_unit_attn[stage - 1 if first else stage]
                blocks.append(
                    BlockPlan(
                        d_in=d_in,
                        d_out=self.widths[stage],
                        heads=self.head_counts[stage],
                        hidden=int(self.widths[stage] * self.ratios[stage]),
                        tokens=tokens,
                        in_units=in_units,
                        unit=unit,
                        pool=pool,
                        stage=stage,
                    )
                )
                d_in, tokens, unit = self.widths[stage], tokens // pool, unit // pool
        return blocks


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    d_in: int
    d_out: int
    heads: int
    hidden: int  # of the MLP
    tokens: int  # that go in
    in_units: bool  # else attention over all tokens
    unit: int  # tokens in a mask unit, before pooling
    pool: int  # tokens that become one; 1: no pooling
    stage: int


@dataclass(frozen=True, kw_only=True)
class Costs:
    parameters: int
    multiply_adds: int  # for one image, with the products of the attention

    def within(self, budget: Costs) -> bool:
        return self.parameters <= budget.parameters and self.multiply_adds <= budget.multiply_adds


def costs(config: TurboViTConfig) -> Costs:
    """Counted from the config, without building the model."""
    N, C, last = math.prod(config.grid), config.widths[0], config.widths[-1]
    taps = config.in_chans * math.prod(config.patch_kernel)
    parameters = taps * C + C + N * C  # patch embedding and positions
    products = N * C * taps
    for block in config.plan():
        a, b, kept = block.d_in, block.d_out, block.tokens // block.pool
        parameters += 2 * a + (a + 1) * 3 * b + (b + 1) * b + 2 * b + (b + 1) * block.hidden + (block.hidden + 1) * b
        products += block.tokens * a * 3 * b + kept * b * b + 2 * kept * b * block.hidden
        products += 2 * kept * b * (block.unit if block.in_units else block.tokens)  # q k^T and its product with v
        if a != b:
            parameters += (a + 1) * b
            products += block.tokens * a * b
    parameters += 2 * last + (last + 1) * config.num_classes
    return Costs(parameters=parameters, multiply_adds=products + last * config.num_classes)


def search(
    score: Callable[[TurboViTConfig], float],
    budget: Costs,
    *,
    start: TurboViTConfig | None = None,
    proposals: int = 500,
    kept: int = 12,
    seed: int = 0,
) -> list[tuple[float, TurboViTConfig]]:
    """Designs within the budget, best score first.

    A generator changes one thing of a design that was kept (a stage's width, depth, heads or MLP ratio); the result is
    kept while it is within the budget, has most of its blocks behind the second pooling, as the paper says of its own,
    and is among the `kept` best by `score`: an accuracy proxy, a latency that you measure, or both.
    """
    chance = random.Random(seed)
    start = start or TurboViTConfig()
    first = replace(start, dims=tuple(start.widths), heads=tuple(start.head_counts), mlp_ratios=tuple(start.ratios))
    parents, seen, found = [first], {first}, list[tuple[float, TurboViTConfig]]()
    if _admitted(first, budget):
        found.append((score(first), first))
    for _ in range(proposals):
        design = _proposal(chance.choice(parents), chance)
        if design is None or design in seen:
            continue
        seen.add(design)
        if _admitted(design, budget):
            found = sorted([*found, (score(design), design)], key=lambda each: -each[0])[:kept]
            parents = [each for _, each in found]
        elif not found:  # still outside: go on from wherever it is cheapest
            parents = sorted([*parents, design], key=lambda each: _excess(each, budget))[:kept]
    return found


def _proposal(design: TurboViTConfig, chance: random.Random) -> TurboViTConfig | None:
    values = {name: list(getattr(design, name)) for name in ("dims", "stages", "heads", "mlp_ratios")}
    name, stage = chance.choice(list(values)), chance.randrange(len(design.stages))
    if name == "heads":
        values[name][stage] = chance.choice((1, 2, 4, 8, 16))
    elif name == "mlp_ratios":
        values[name][stage] = chance.choice((2.0, 3.0, 4.0))
    else:
        values[name][stage] += chance.choice((-16, 16) if name == "dims" else (-1, 1))
    changed: dict[str, Any] = {name: tuple(values[name])}
    try:
        return replace(design, **changed)
    except TersorError:  # heads that do not divide the width, no block left
        return None


def _admitted(design: TurboViTConfig, budget: Costs) -> bool:
    behind = sum(design.stages[2:])
    return 2 * behind > sum(design.stages) and costs(design).within(budget)


def _excess(design: TurboViTConfig, budget: Costs) -> float:
    cost = costs(design)
    return max(cost.parameters / budget.parameters, cost.multiply_adds / budget.multiply_adds)


def unrolled_order(grid: Sequence[int], stride: Sequence[int], levels: int) -> Tensor:
    """(N,): the row-major number of the token that stands at each place of the unrolled order."""
    places = torch.arange(math.prod(grid), device="cpu").reshape(1, *grid)
    (a, b), (H, W) = stride, grid
    for _ in range(levels):
        H, W = H // a, W // b
        places = places.reshape(-1, H, a, W, b).permute(0, 2, 4, 1, 3).reshape(-1, H, W)
    return places.reshape(-1)


def max_pool(x: Tensor, pool: int) -> Tensor:
    """x (B, N, C) -> (B, N / pool, C): in the unrolled order, the maximum over the finest level."""
    return x.reshape(x.shape[0], pool, -1, x.shape[-1]).amax(1) if pool > 1 else x


class MaskUnitAttention(nn.Module):
    def __init__(self, plan: BlockPlan) -> None:
        super().__init__()
        self.heads, self.pool = plan.heads, plan.pool
        self.units = plan.tokens // plan.unit if plan.in_units else 1
        self.qkv = nn.Linear(plan.d_in, 3 * plan.d_out)
        self.proj = nn.Linear(plan.d_out, plan.d_out)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        units = self.units
        qkv = self.qkv(x).reshape(B, N // units, units, 3, self.heads, -1)  # the unit is the fast index of a token
        q, k, v = qkv.permute(3, 0, 4, 2, 1, 5)  # (B, h, units, tokens, C/h) each
        if self.pool > 1:
            q = q.reshape(B, self.heads, units, self.pool, -1, q.shape[-1]).amax(3)
        q, k, v = (
            each.flatten(1, 2) for each in (q, k, v)
        )  # (B, h units, tokens, C/h): ONNX's attention has four dimensions
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.reshape(B, self.heads, units, *mixed.shape[2:]).permute(0, 3, 2, 1, 4)
        return self.proj(mixed.reshape(B, N // self.pool, -1))


class Mlp(nn.Module):
    def __init__(self, C: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(C, hidden)
        self.fc2 = nn.Linear(hidden, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, plan: BlockPlan, drop_path: float) -> None:
        super().__init__()
        self.pool = plan.pool
        self.norm1 = nn.LayerNorm(plan.d_in, eps=1e-6)
        self.proj = nn.Linear(plan.d_in, plan.d_out) if plan.d_in != plan.d_out else None
        self.attn = MaskUnitAttention(plan)
        self.norm2 = nn.LayerNorm(plan.d_out, eps=1e-6)
        self.mlp = Mlp(plan.d_out, plan.hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        shortcut = max_pool(x if self.proj is None else self.proj(n), self.pool)
        x = shortcut + self.drop_path(self.attn(n))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """image (B, 3, H, W) -> tokens (B, N, C), row by row."""

    def __init__(self, config: TurboViTConfig) -> None:
        super().__init__()
        kernel, stride, padding = config.patch_kernel, config.patch_stride, config.patch_padding
        self.proj = nn.Conv2d(config.in_chans, config.widths[0], kernel, stride, padding)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class Head(nn.Module):
    """tokens (B, N, C) -> logits."""

    def __init__(self, C: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C, eps=1e-6)
        self.fc = nn.Linear(C, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.mean(1)))


@register(
    "turbovit",
    task="classify",
    input="image",
    paper="arXiv 2308.11421",
    variants={
        "turbovit": (12_659_752, {}),
        "hiera_tiny": (27_910_216, {"embed_dim": 96}),
        "hiera_small": (35_008_072, {"embed_dim": 96, "stages": (1, 2, 11, 2)}),
        "hiera_base": (51_524_968, {"embed_dim": 96, "stages": (2, 3, 16, 3)}),
    },
    small={
        "img_size": (64, 96),
        "num_classes": 10,
        "embed_dim": 8,
        "stages": (1, 1, 2, 1),
        "mlp_ratio": 2.0,
    },
)
class TurboViT(nn.Module):
    """image (B, C, *img_size) -> logits (B, num_classes)."""

    def __init__(self, config: TurboViTConfig) -> None:
        super().__init__()
        self.config = config
        plan = config.plan()
        rates = [rate for stage in linear_rates(config.drop_path_rate, config.stages) for rate in stage]
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(config.grid), config.widths[0]))
        self.blocks = nn.ModuleList(Block(each, rate) for each, rate in zip(plan, rates, strict=True))
        self.head = Head(config.widths[-1], config.num_classes)
        self.register_buffer("order", unrolled_order(config.grid, config.q_stride, len(config.stages) - 1), False)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def embed(self, image: Tensor) -> Tensor:
        """image -> tokens with their positions, unrolled."""
        check_image("turbovit", image, channels=self.config.in_chans)
        if tuple(image.shape[-2:]) != tuple(self.config.img_size):
            H, W = self.config.img_size
            raise TersorError(
                f"this turbovit takes images of {H} x {W} pixels, not {image.shape[-2]} x {image.shape[-1]}; "
                "for others create it with that img_size"
            )
        return (self.patch_embed(image) + self.pos_embed)[:, self.get_buffer("order")]

    def features(self, image: Tensor) -> list[Tensor]:
        """The stages' maps (B, C, H, W), back in the order of the image."""
        ends = [sum(self.config.stages[: i + 1]) for i in range(len(self.config.stages))]
        x, maps = self.embed(image), list[Tensor]()
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number in ends:
                maps.append(self._rolled(x, pools=min(len(maps), self.config.q_pool)))
        return maps

    def _rolled(self, x: Tensor, pools: int) -> Tensor:
        (H, W), (a, b) = self.config.grid, self.config.q_stride
        grid = (H // a**pools, W // b**pools)
        order = unrolled_order(grid, (a, b), len(self.config.stages) - 1 - pools).argsort()
        return x[:, order.to(x.device)].transpose(1, 2).reshape(x.shape[0], -1, *grid)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, *self.config.img_size)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return key_maps.rename(state, (r"^norm\.", "head.norm."), (r"^head\.projection\.", "head.fc."))


def _grow(first: int, factor: float, count: int) -> list[int]:
    """Each stage's value from the one before, cut to a whole number, as Hiera does."""
    values = [first]
    while len(values) < count:
        values.append(int(values[-1] * factor))
    return values
