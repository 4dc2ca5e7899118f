"""PlainMamba, a non-hierarchical state-space vision backbone (arXiv 2403.17695), with ToP's token pruning (2409.18962).

What it is for: image classification, and a backbone of one width and resolution, in time linear in the number of tokens;
with `prune_after`, on fewer tokens the deeper the layer.

    model = tersor.models.load("plainmamba_l1", "l1.pth")                   # the official dense checkpoint
    logits = model(image)                                                   # image (B, 3, H, W), any size
    pruned = tersor.models.load("plainmamba_l1", "l1.pth", prune_after=(6, 12, 18), keep=0.8)

A convolutional stem makes tokens of 16 x 16 pixels, H' x W' of width D. A layer adds to x

    x | z = W LN(x),   u = SiLU(depthwise 7x7 conv(x)),   dt | B | C = Wx u,   delta = softplus(Wdt dt + 2 b)
    y_k = scan of u in order k, with B + (a learned row for the move that led to each place)
    output = Wo (sum_k y_k) SiLU(z)               four snake orders: rows and columns, from either end

Pruning after a layer: the ceil(N keep) most important tokens stay, importance being max(0, y_k) summed over channels and
orders. The orders stay those of the whole grid, dropped places are skipped in each, and states decay over them
(tersor.layers.aligned_scan) with the step of the next kept token. Convolutions see zeros where tokens are gone. No code
of this pruning was published: these last two are our choice.

Origin: ChenhongyiYang/PlainMamba at 0975a1d (plain_mamba.py), Apache-2.0. Quirks kept, for the weights depend on them:
only u is put in order k, while delta, B and C stay row by row; the bias b of dt counts twice; layers in
`layers_with_dwconv` send the whole map through a convolution without a residual. The four scans are one call here.

Proven: the golden cases of the published code to 5e-6 (patches, tokens, logits), keep=1 equals the dense model. Not
proven: ImageNet accuracy (77.9, 81.6, 82.3 published dense; 81.7 for L3 pruned to 58 % of its operations).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.kernels.selective_scan import selective_scan, time_step
from tersor.layers.aligned_scan import aligned_scan, gaps, importance
from tersor.layers.checks import at_least, divides, one_of
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.patch_embed import check_image
from tersor.layers.positions import resize_grid
from tersor.layers.scan_orders import snake_orders
from tersor.models.registry import register

STEM = 64  # channels of the stem


@dataclass(frozen=True, kw_only=True)
class PlainMambaConfig:
    img_size: int = 224  # that of pos_embed, which is resized for other images
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, forward returns pooled features
    embed_dims: int = 192
    num_layers: int = 24
    num_convs_patch_embed: int = 1
    layers_with_dwconv: tuple[int, ...] = (0,)
    d_state: int = 16
    expand: int = 2
    conv_size: int = 7
    init_layer_scale: float | None = None  # of each layer's output; None: no such parameter
    drop_path_rate: float = 0.0
    prune_after: tuple[int, ...] = ()  # layers, counted from 1, after which tokens are dropped
    keep: float = 0.8  # share of the tokens that stays each time

    def __post_init__(self) -> None:
        divides("plainmamba", "2 of the stem", 2, "patch_size", self.patch_size)
        divides("plainmamba", "patch_size", self.patch_size, "img_size", self.img_size)
        at_least("plainmamba", 1, embed_dims=self.embed_dims, num_layers=self.num_layers, d_state=self.d_state)
        if not self.conv_size % 2:
            raise TersorError(f"plainmamba's conv_size is odd, not {self.conv_size}")
        if not 0 < self.keep <= 1:
            raise TersorError(f"plainmamba keeps a share of its tokens in 0..1, not {self.keep}")
        for layer in self.prune_after:
            one_of("plainmamba", "prune_after", layer, range(1, self.num_layers))

    def kept(self, tokens: int) -> int:
        """How many of so many tokens stay in a pruning."""
        return math.ceil(tokens * self.keep)


@dataclass(frozen=True, kw_only=True)
class Walks:
    """The four ways through the tokens that are left. n tokens of a grid of L places."""

    grid: tuple[int, int]
    places: Tensor | None  # (B, n), ascending: where the tokens stand in the grid; None: all are there
    order: Tensor  # (B or 1, 4, n): the tokens, numbered as they are stored, in the order of the walk
    moves: Tensor  # (B or 1, 4, n): which row of direction_Bs belongs to the step that led to each
    gaps: Tensor  # (B or 1, 4, n): the walk's distance to the token before

    def on_grid(self, x: Tensor) -> Tensor:
        """x (B, n, C) -> (B, C, H, W), zeros where no token is."""
        if self.places is not None:
            empty = x.new_zeros(x.shape[0], self.grid[0] * self.grid[1], x.shape[-1])
            x = empty.scatter(1, self.places[..., None].expand_as(x), x)
        return x.transpose(1, 2).unflatten(2, self.grid)  # type: ignore[no-untyped-call]

    def off_grid(self, x: Tensor) -> Tensor:
        """Its inverse."""
        x = x.flatten(2).transpose(1, 2)
        return x if self.places is None else _rows(x, self.places)


def walks(grid: tuple[int, int], places: Tensor | None, device: torch.device) -> Walks:
    orders = snake_orders(*grid, device=device)  # (4, L)
    ranks = orders.argsort(1)  # when the walk comes to each place
    rows, columns = orders // grid[1], orders % grid[1]
    down, right = rows.diff(dim=1), columns.diff(dim=1)
    moves = 1 * (right > 0) + 2 * (right < 0) + 3 * (down < 0) + 4 * (down > 0)
    moves = F.pad(moves, (1, 0))  # (4, L); the first place has the row "start"
    if places is None:
        return Walks(grid=grid, places=None, order=orders[None], moves=moves[None], gaps=torch.ones_like(orders)[None])
    come, order = ranks[:, places].transpose(0, 1).sort(-1)  # (B, 4, n)
    return Walks(
        grid=grid,
        places=places,
        order=order,
        moves=moves.expand(len(places), -1, -1).gather(2, come),
        gaps=gaps(come.flatten(0, 1)).view_as(come),
    )


class Mamba2D(nn.Module):
    """x (B, n, D) -> the same shape, and every token's importance (B, n)."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        D, states = config.embed_dims, config.d_state
        E, rank = config.expand * D, math.ceil(D / 16)
        self.widths = [rank, states, states]
        self.in_proj = nn.Linear(D, 2 * E)
        self.conv2d = nn.Conv2d(E, E, config.conv_size, padding=config.conv_size // 2, groups=E)
        self.x_proj = nn.Linear(E, sum(self.widths), bias=False)
        self.dt_proj = nn.Linear(rank, E)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))
        self.direction_Bs = nn.Parameter(torch.zeros(5, states))  # start, right, left, up, down
        self.out_proj = nn.Linear(E, D)
        scale = config.init_layer_scale
        self.gamma = None if scale is None else nn.Parameter(torch.full((D,), scale))
        nn.init.trunc_normal_(self.direction_Bs, std=0.02)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        dt = torch.empty(E).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: Tensor, walks: Walks) -> tuple[Tensor, Tensor]:
        x, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(walks.off_grid(self.conv2d(walks.on_grid(x))))  # (B, n, E)
        (b, n, E), order = u.shape, walks.order.expand(len(u), -1, -1)
        dt, B, C = self.x_proj(u).split(self.widths, -1)
        dt = time_step(self.dt_proj(dt), dt_bias=self.dt_proj.bias, dt_softplus=True)  # the bias for a second time
        fed = _rows(u, order.flatten(1)).reshape(4 * b, n, E)  # the four walks side by side in the batch
        B = (B[:, None] + self.direction_Bs[walks.moves]).flatten(0, 1)
        dt, C = (each[:, None].expand(-1, 4, -1, -1).flatten(0, 1) for each in (dt, C))
        A = -self.A_log.exp()
        if walks.places is None:
            y = selective_scan(fed, dt, A, B, C, D=self.D)[0]
        else:
            y = aligned_scan(fed, dt, dt * walks.gaps.flatten(0, 1)[..., None], A, B, C, D=self.D)
        y = _rows(y, order.flatten(0, 1).argsort(1)).unflatten(0, (b, 4))  # type: ignore[no-untyped-call]
        out = self.out_proj(y.sum(1) * F.silu(z))
        return (out if self.gamma is None else out * self.gamma), importance(y).sum(1)


class Layer(nn.Module):
    def __init__(self, config: PlainMambaConfig, *, dwconv: bool, drop_path: float) -> None:
        super().__init__()
        D = config.embed_dims
        self.norm = nn.LayerNorm(D)
        self.mamba = Mamba2D(config)
        self.drop_path = DropPath(drop_path)
        self.dw = None
        if dwconv:
            self.dw = nn.Sequential(nn.Conv2d(D, D, 3, padding=1, groups=D, bias=False), nn.BatchNorm2d(D), nn.GELU())

    def forward(self, x: Tensor, walks: Walks) -> tuple[Tensor, Tensor]:
        mixed, weight = self.mamba(self.norm(x), walks)
        x = x + self.drop_path(mixed)
        return (x if self.dw is None else walks.off_grid(self.dw(walks.on_grid(x)))), weight


class PatchEmbed(nn.Module):
    """image (B, 3, H, W) -> map (B, D, H', W'), padded behind to whole patches."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.side = config.patch_size // 2
        self.stem = nn.Sequential(
            nn.Conv2d(config.in_chans, STEM, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(STEM), nn.ReLU()
        )
        convs: list[nn.Module] = []
        for _ in range(config.num_convs_patch_embed):
            convs += [nn.Conv2d(STEM, STEM, 3, padding=1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU()]
        self.convs = nn.Sequential(*convs)
        self.projection = nn.Conv2d(STEM, config.embed_dims, self.side, self.side)

    def forward(self, image: Tensor) -> Tensor:
        x = self.convs(self.stem(image))
        H, W = x.shape[-2:]
        return self.projection(F.pad(x, (0, -W % self.side, 0, -H % self.side)))


class Backbone(nn.Module):
    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.config, self.side = config, config.img_size // config.patch_size
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, config.embed_dims))
        (rates,) = linear_rates(config.drop_path_rate, (config.num_layers,))
        self.layers = nn.ModuleList(
            Layer(config, dwconv=number in config.layers_with_dwconv, drop_path=rate)
            for number, rate in enumerate(rates)
        )
        self.ln1 = nn.LayerNorm(config.embed_dims, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, image: Tensor) -> tuple[Tensor, Walks]:
        """The tokens that are left (B, n, D), and where they stand."""
        x = self.patch_embed(image)
        grid = (int(x.shape[2]), int(x.shape[3]))
        x = x.flatten(2).transpose(1, 2) + resize_grid(self.pos_embed, (self.side, self.side), grid)
        way = walks(grid, None, x.device)
        for number, layer in enumerate(self.layers, 1):
            x, weight = layer(x, way)
            if number in self.config.prune_after:
                stay = weight.topk(self.config.kept(x.shape[1]), dim=1).indices.sort(1).values
                x = _rows(x, stay)
                way = walks(grid, stay if way.places is None else way.places.gather(1, stay), x.device)
        return self.ln1(x), way


class Head(nn.Module):
    def __init__(self, D: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(D, num_classes)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.fc(pooled)


@register(
    "plainmamba",
    task="classify",
    input="image",
    paper="arXiv 2403.17695",
    variants={
        "plainmamba_l1": (7_551_656, {"drop_path_rate": 0.2}),
        "plainmamba_l2": (
            26_145_832,
            {"embed_dims": 384, "num_convs_patch_embed": 2, "layers_with_dwconv": (), "drop_path_rate": 0.2},
        ),
        "plainmamba_l3": (
            50_956_456,
            {
                "embed_dims": 448,
                "num_layers": 36,
                "num_convs_patch_embed": 2,
                "layers_with_dwconv": (),
                "drop_path_rate": 0.4,
            },
        ),
    },
    small={
        "img_size": 64,
        "num_classes": 10,
        "embed_dims": 16,
        "num_layers": 3,
        "d_state": 4,
        "prune_after": (1,),
    },
)
class PlainMamba(nn.Module):
    """image (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.head = Head(config.embed_dims, config.num_classes) if config.num_classes else nn.Identity()

    def tokens(self, image: Tensor) -> tuple[Tensor, Walks]:
        check_image("plainmamba", image, channels=self.config.in_chans)
        return self.backbone(image)

    def features(self, image: Tensor) -> list[Tensor]:
        """One map (B, D, H', W'), zeros where tokens were dropped."""
        x, way = self.tokens(image)
        return [way.on_grid(x)]

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.tokens(image)[0].mean(1))

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, self.config.img_size, self.config.img_size)}


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """x (B, n, C), places (B, k) -> (B, k, C)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
