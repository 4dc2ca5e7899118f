"""FlatFormer, flattened window attention for point clouds (Liu et al., CVPR 2023, arXiv 2301.08739).

What it is for: the encoder of LiDAR detectors. The pillars that hold points are sorted window by window into one sequence
and cut into groups of equal size, so attention works on full, equal batches: no padded windows, no sparse convolution, cost
linear in the number of pillars.

    model = tersor.models.create("flatformer_waymo")
    bev = model(x, coords)                          # x (N, C) pillar features, coords (N, 4) integers (sample, z, y, x)
    tokens = model.encode(x, coords)                # (N, C), in the order of the input

Bird's-eye-view map (B, C, ny, nx), zero where no pillar is. A block is four layers, whose orders of the pillars are

    x, x_shift   windows of (wx, wy) cells along rows, back and forth; inside a window along columns, back and forth
    y, y_shift   the same with x and y exchanged                    _shift: the windows moved by half their size

and a layer, on the sorted sequence of each sample in groups of G:

    q, k = W (z + p),  v = W z                      p: sines and cosines of the cell's x and y, no parameters
    z = LN(z + Wo softmax(q k^T / sqrt(d)) v)       among the G pillars of a group
    z = LN(z + W2 act(W1 z))                        hidden 2C

The last group of a sample is filled up with copies of pillars of the group before, which take part in its softmax, as
published. A sample of fewer than G pillars has no group before; there the empty places are masked, so it is plain
attention over the sample (the published code reads rows of another sample or fails).

Sorting is per sample here. The published keys hold the sample's number times 10 Sx Sy, which is the same wherever that is
above the largest key, as in the published sizes; for small grids it mixes neighbouring samples.

Origin: mit-han-lab/flatformer at 31dc5a9 (mmdet3d/models/middle_encoders/flatformer.py), which states no licence: written
from the facts. Its keys, with or without `middle_encoder.`, are accepted; the other parts of a detector's file are left out.

Proven: the golden cases (index maps, positions, blocks, BEV map; published and small sizes), the parameter count; on an H200
1.6 to 2.4 times as fast as windows that are filled up, and 4 times as a dense map (benchmarks/results/lidar_h200.md; on a CPU
2 to 8 and 56 times, lidar.md). Not proven: Waymo results (L2 mAPH 67.2 with one sweep published; no weights were released), the
published speeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.activations import activation
from tersor.layers.checks import at_least, divides
from tersor.models.registry import register

ORDERS = ("x", "x_shift", "y", "y_shift")  # of a block's layers
TWO_PI = 2 * 3.1415  # the published literal, for normalized positions
PREFIX = "middle_encoder."


@dataclass(frozen=True, kw_only=True)
class FlatFormerConfig:
    in_channels: int = 128  # C
    num_heads: int = 8
    num_blocks: int = 2
    activation: str = "gelu"  # exact
    window_shape: tuple[int, ...] = (9, 9, 1)  # cells along x, y, z
    sparse_shape: tuple[int, ...] = (468, 468, 1)  # the grid, x, y, z
    output_shape: tuple[int, ...] = (468, 468)  # ny, nx
    pos_temperature: float = 10_000
    normalize_pos: bool = False  # positions as a share of the grid, times 2 pi
    group_size: int = 69  # G

    def __post_init__(self) -> None:
        divides("flatformer", "num_heads", self.num_heads, "in_channels", self.in_channels)
        at_least("flatformer", 4, in_channels=self.in_channels)
        at_least("flatformer", 1, group_size=self.group_size)
        activation(self.activation, of="flatformer")
        for name, length in (("window_shape", 3), ("sparse_shape", 3), ("output_shape", 2)):
            shape = getattr(self, name)
            if len(shape) != length or min(shape) < 1:
                raise TersorError(f"flatformer's {name} is {length} positive numbers, not {shape}")


@dataclass(frozen=True)
class Groups:
    """How N rows, sorted by sample, lie in P places of full groups."""

    rows: Tensor  # (P,): the row in each place
    places: Tensor  # (N,): each row's own place
    real: Tensor | None  # (P / G, 1, 1, G): places that attention may look at; None: all


class Attention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qk_proj, self.v_proj = nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)

    def forward(self, z: Tensor, p: Tensor, real: Tensor | None) -> Tensor:
        """z, p (groups, G, C)."""
        maps = (*self.qk_proj(z + p).chunk(2, -1), self.v_proj(z))
        q, k, v = (rearrange(y, "g n (h e) -> g h n e", h=self.heads) for y in maps)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real)
        return self.out_proj(rearrange(mixed, "g h n e -> g n (h e)"))


class Layer(nn.Module):
    def __init__(self, config: FlatFormerConfig) -> None:
        super().__init__()
        d = config.in_channels
        self.attn = Attention(d, config.num_heads)
        self.fc1, self.fc2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.activation = activation(config.activation, of="flatformer")

    def forward(self, z: Tensor, p: Tensor, real: Tensor | None) -> Tensor:
        z = self.norm1(z + self.attn(z, p, real))
        return self.norm2(z + self.fc2(self.activation(self.fc1(z))))


class Block(nn.Module):
    def __init__(self, config: FlatFormerConfig) -> None:
        super().__init__()
        self.group_size = config.group_size
        self.block = nn.ModuleList(Layer(config) for _ in ORDERS)

    def forward(self, x: Tensor, p: Tensor, orders: dict[str, Tensor], groups: Groups) -> Tensor:
        for layer, name in zip(self.block, ORDERS, strict=True):
            rows = orders[name][groups.rows]  # (P,)
            z, at = (y[rows].view(-1, self.group_size, y.shape[1]) for y in (x, p))  # (groups, G, C)
            z = layer(z, at, groups.real).flatten(0, 1)[groups.places]  # copies are dropped
            x = torch.empty_like(z).index_copy(0, orders[name], z)
        return x


@register(
    "flatformer",
    task="detect-features",
    input="points",
    paper="arXiv 2301.08739",
    variants={
        "flatformer": (1_059_840, {}),
        "flatformer_waymo": (1_059_840, {"window_shape": (13, 13, 1), "group_size": 144}),
    },
    small={
        "in_channels": 16,
        "num_heads": 2,
        "num_blocks": 1,
        "window_shape": (3, 3, 1),
        "sparse_shape": (12, 12, 1),
        "output_shape": (12, 12),
        "group_size": 8,
    },
    untraceable="samples are told apart by their number in coords, so shapes depend on values",
)
class FlatFormer(nn.Module):
    """x (N, C), coords (N, 4) -> (B, C, ny, nx)."""

    def __init__(self, config: FlatFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.block_list = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, x: Tensor, coords: Tensor, batch_size: int | None = None) -> Tensor:
        """batch_size: where the last samples may have no pillar; else the largest number in coords says it."""
        tokens = self.encode(x, coords)
        (ny, nx), samples = self.config.output_shape, int(coords[:, 0].max()) + 1 if batch_size is None else batch_size
        cells = (coords[:, 0] * ny + coords[:, 2]) * nx + coords[:, 3]
        bev = tokens.new_zeros(samples * ny * nx, tokens.shape[1]).index_copy(0, cells, tokens)
        return rearrange(bev, "(b y x) c -> b c y x", y=ny, x=nx)

    def encode(self, x: Tensor, coords: Tensor) -> Tensor:
        """(N, C), row by row as x."""
        self.check(x, coords)
        orders, groups = sort_orders(coords, self.config), group_rows(coords[:, 0], self.config.group_size)
        p = positions(coords, self.config).to(x.dtype)
        for block in self.block_list:
            x = block(x, p, orders, groups)
        return x

    def check(self, x: Tensor, coords: Tensor) -> None:
        config = self.config
        if x.dim() != 2 or x.shape[1] != config.in_channels or coords.shape != (len(x), 4) or not len(x):
            raise TersorError(
                f"flatformer takes x (N, {config.in_channels}) and coords (N, 4), not {list(x.shape)} and {list(coords.shape)}"
            )
        limits = [min(a, b) for a, b in zip(config.sparse_shape, config.output_shape[::-1], strict=False)]  # x, y
        largest = [int(coords[:, axis].max()) for axis in (3, 2)]
        if int(coords.min()) < 0 or any(found >= limit for found, limit in zip(largest, limits, strict=True)):
            raise TersorError(f"flatformer's cells go from 0 to below {limits} (x, y); coords reach {largest}")

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        (ny, nx), pillars = self.config.output_shape, 3 * self.config.group_size - 1
        pillars = min(pillars, ny * nx)
        cells = torch.cat([torch.randperm(ny * nx)[:pillars] for _ in range(batch_size)])
        sample = torch.arange(batch_size).repeat_interleave(pillars)
        coords = torch.stack((sample, torch.zeros_like(cells), cells // nx, cells % nx), 1)
        return {"x": torch.randn(len(cells), self.config.in_channels), "coords": coords}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if any(key.startswith(PREFIX) for key in state):
            state = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
        converted = {}
        for key, value in state.items():
            key = key.replace("attn.attn.", "attn.")
            if "in_proj_" not in key:
                converted[key] = value
                continue
            d = len(value) // 3
            converted[key.replace("in_proj_", "qk_proj.")] = value[: 2 * d]
            converted[key.replace("in_proj_", "v_proj.")] = value[2 * d :]
        return converted


def positions(coords: Tensor, config: FlatFormerConfig) -> Tensor:
    """(N, C): sines and cosines in turn, of x, then of y; zeros where C is no multiple of 4."""
    P = config.in_channels // 4 * 2
    k = torch.arange(0, P, 2, dtype=torch.float32, device=coords.device)
    rates = config.pos_temperature ** (k / P)
    parts = []
    for axis, size in ((3, config.sparse_shape[0]), (2, config.sparse_shape[1])):
        value = coords[:, axis].float()
        if config.normalize_pos:
            value = value / size * TWO_PI
        angles = value[:, None] / rates
        parts.append(torch.stack((angles.sin(), angles.cos()), -1).flatten(1))  # (N, P)
    return F.pad(torch.cat(parts, 1), (0, config.in_channels - 2 * P))


def sort_orders(coords: Tensor, config: FlatFormerConfig) -> dict[str, Tensor]:
    """Name of an order -> (N,): the rows in that order, sample after sample."""
    wx, wy, _ = config.window_shape
    sx, sy, _ = config.sparse_shape
    sample, _, y, x = coords.long().unbind(1)
    found = {}
    for name in ORDERS:
        dx, dy = (wx // 2, wy // 2) if name.endswith("_shift") else (0, 0)
        along_x = ((x + dx) // wx, (x + dx) % wx, 2 * (math.ceil(sx / wx) + 1), 2 * wx)
        along_y = ((y + dy) // wy, (y + dy) % wy, 2 * (math.ceil(sy / wy) + 1), 2 * wy)
        key = snake_key(along_x, along_y) if name.startswith("x") else snake_key(along_y, along_x)
        span = key.max() - key.min() + 1
        found[name] = (sample * span + key).argsort(stable=True)
    return found


def snake_key(fast: tuple[Tensor, Tensor, int, int], slow: tuple[Tensor, Tensor, int, int]) -> Tensor:
    """(N,): each axis is (window, cell in it, twice the windows, twice the cells). Windows go along the fast axis, every
    second row of them backwards; cells go along the slow axis, every second line backwards."""
    (a1, a2, windows, a_cells), (b1, b2, _, b_cells) = fast, slow
    turn, inner = 1 - 2 * (b1 % 2), 1 - 2 * (a2 % 2)
    return (windows * b1 + turn * a1) * a_cells * b_cells + turn * (b_cells * a2 + inner * b2)


def group_rows(sample: Tensor, G: int) -> Groups:
    """sample (N,): the number of each row's sample. Rows are meant as sorted by it."""
    counts = sample.long().bincount()
    padded = -(-counts // G) * G
    start, padded_start = counts.cumsum(0) - counts, padded.cumsum(0) - padded
    of_row = torch.arange(len(counts), device=sample.device).repeat_interleave(counts)
    places = torch.arange(len(of_row), device=sample.device) + (padded_start - start)[of_row]
    of_place = torch.arange(len(counts), device=sample.device).repeat_interleave(padded)
    local, n = torch.arange(len(of_place), device=sample.device) - padded_start[of_place], counts[of_place]
    copied = torch.where(n >= G, local - G, 0)  # of the group before, where there is one
    rows = start[of_place] + torch.where(local < n, local, copied)
    short = bool(((counts > 0) & (counts < G)).any())
    real = ((local < n) | (n >= G)).reshape(-1, 1, 1, G) if short else None
    return Groups(rows, places, real)
