"""What Any2Point puts around a frozen transformer: point tokens, virtual positions, and adapters guided by shared cells.

See any2point.py for the whole. B clouds, N tokens of width D with centres c (B, N, 3), V = 6 views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.kernels.furthest_points import furthest_points

EXPANSION, BLOCKS = 2, (2, 1, 1)  # of the tokeniser's stages: how much wider each is, and its residual MLPs
SINE_SCALE, SINE_BASE = 100.0, 1000.0  # of the position code of a neighbour
VIEWS = (  # Euler angles, degrees: four sides, bottom and top
    *((90.0 * quarter, 0.0, 90.0) for quarter in range(4)),
    (0.0, -90.0, 90.0),
    (0.0, 90.0, 90.0),
)
VIEW_HEADS = 6
LENGTH = 77  # positions of CLIP's text table
LINE_SHIFT = 1.6  # of a view's depth; it cancels out but for its rounding, and places on a line are compared to 1e-6


@dataclass(frozen=True)
class Plane:
    """The picture that a source model was trained on, in pixels: its patches have one row each in the table."""

    width: int
    height: int
    patch: int


@dataclass(frozen=True)
class Cells:
    """Which tokens of a cloud share a cell. Cells are numbered within a cloud."""

    index: Tensor  # (B, N): the cell of each token
    count: int  # cells of a cloud

    def same(self) -> Tensor:
        """(B, 1, N, N): whether two tokens share a cell."""
        return (self.index[:, :, None] == self.index[:, None, :])[:, None]

    def pool(self, x: Tensor, reduce: str) -> Tensor:
        """x (B, N, D) -> (B, count, D), "mean" or "amax" over a cell's tokens, 0 where a cell has none."""
        empty = x.new_zeros(x.shape[0], self.count, x.shape[2])
        return empty.scatter_reduce(1, self._rows(x), x, reduce, include_self=False)

    def spread(self, pooled: Tensor) -> Tensor:
        """(B, count, D) -> (B, N, D): each token gets its cell's value."""
        return pooled.gather(1, self._rows(pooled))

    def _rows(self, x: Tensor) -> Tensor:
        return self.index[..., None].expand(-1, -1, x.shape[2])


class ResidualMLP(nn.Module):
    """On rows (rows, d); published as convolutions of kernel 1."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.net1 = nn.Sequential(nn.Linear(d, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True))
        self.net2 = nn.Sequential(nn.Linear(hidden, d), nn.BatchNorm1d(d))

    def forward(self, x: Tensor) -> Tensor:
        return (self.net2(self.net1(x)) + x).relu_()


class Stage(nn.Module):
    """Half as many points, twice as many channels: each point collects from its nearest neighbours."""

    def __init__(self, d: int, hidden: int, blocks: int, neighbours: int, norm: str, across_batch: bool) -> None:
        super().__init__()
        self.neighbours, self.norm, self.across_batch = neighbours, norm, across_batch
        self.linear2 = nn.Sequential(*(ResidualMLP(d, hidden) for _ in range(blocks)))

    def forward(self, points: Tensor, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """points (B, M, 3), x (B, M, d / 2) -> the `count` points that are kept (B, G, 3) and their features (B, G, d)."""
        centre = furthest_points(points, count)  # (B, G)
        near = neighbours(points, take(points, centre), self.neighbours)  # (B, G, K)
        c = take(points, centre)
        offset = self.scaled(take(points, near) - c[:, :, None])  # (B, G, K, 3)
        around, own = take(x, near), take(x, centre)[:, :, None]
        wide = torch.cat((around, own.expand_as(around)), -1)  # (B, G, K, d)
        z = wide + sine_code(offset, wide.shape[-1])
        return c, self.linear2(z.flatten(0, 2)).view_as(z).amax(2)

    def scaled(self, offset: Tensor) -> Tensor:
        if self.norm == "mn40":
            every = offset if self.across_batch else offset.flatten(1)
            deviation = every.std() if self.across_batch else every.std(1).reshape(-1, 1, 1, 1)
            return offset / (deviation + 1e-5)
        reach = offset.abs().amax(2, keepdim=True)  # over the neighbours, of each axis
        return offset / torch.where(reach > 0, reach, 1)  # flat neighbourhoods stay at 0; published, they give NaN


class PointTokens(nn.Module):
    """Points (B, M, 3) -> centres (B, N, 3) and tokens (B, N, 8 channels): the part of Point-PN that Any2Point trains."""

    def __init__(
        self, points: int, channels: int, neighbours: int, lastdim: int, norm: str, across_batch: bool
    ) -> None:
        super().__init__()
        self.counts = [points // 2 ** (stage + 1) for stage in range(len(BLOCKS))]
        widths = [channels * EXPANSION ** (stage + 1) for stage in range(len(BLOCKS))]
        hidden = [*(width // 2 for width in widths[:-1]), lastdim]
        self.raw = nn.Sequential(nn.Linear(3, channels, bias=False), nn.BatchNorm1d(channels), nn.ReLU())
        self.stages = nn.ModuleList(
            Stage(width, inner, blocks, neighbours, norm, across_batch)
            for width, inner, blocks in zip(widths, hidden, BLOCKS, strict=True)
        )

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        x = self.raw(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        for stage, count in zip(self.stages, self.counts, strict=True):
            points, x = stage(points, x, count)
        return points, x


class ViewAttention(nn.Module):
    """t + attention among tokens of one cell, through few channels. The scale is that of all heads together, as published."""

    def __init__(self, d: int, inner: int, qkv_bias: bool) -> None:
        super().__init__()
        self.scale = inner**-0.5
        self.norm = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * inner, bias=qkv_bias)
        self.proj = nn.Linear(inner, d)

    def forward(self, t: Tensor, same: Tensor) -> Tensor:
        """t (B, N, D), same (B, 1, N, N)."""
        q, k, v = rearrange(self.qkv(self.norm(t)), "b n (p h e) -> p b h n e", p=3, h=VIEW_HEADS)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=same, scale=self.scale)
        return t + self.proj(rearrange(mixed, "b h n e -> b n (h e)"))


class Guide(nn.Module):
    """One block's fusion of the views by their agreement with what the cells of space say."""

    def __init__(self, d: int, coef_pro: float, maxmean: bool) -> None:
        super().__init__()
        self.coef_pro, self.maxmean = coef_pro, maxmean
        self.space = nn.BatchNorm1d(d)
        self.views = nn.ModuleList(nn.BatchNorm1d(d) for _ in VIEWS)

    def forward(self, t: Tensor, seen: list[Tensor], cells: list[Cells], space: Cells) -> Tensor:
        """t (B, N, D), seen and cells: one entry a view -> (B, N, D)."""
        v3 = self.pooled_in_space(t, space)
        views = [self.pooled(*each) for each in zip(seen, cells, self.views, strict=True)]
        agreement = torch.stack([view_weight(view, v3) for view in views])  # (V, B, N)
        agreement = agreement / agreement.sum(0)
        mixed = sum(view * weight[..., None] for view, weight in zip(views, agreement, strict=True))
        return t + self.coef_pro * mixed

    def pooled(self, y: Tensor, cells: Cells, norm: nn.Module) -> Tensor:
        pooled = cells.pool(y, "mean")
        if self.maxmean:
            pooled = pooled + cells.pool(y, "amax")
        normed = norm(pooled.flatten(0, 1)).view_as(pooled)  # empty cells count in training's statistics, as published
        return cells.spread(F.gelu(normed))

    def pooled_in_space(self, t: Tensor, space: Cells) -> Tensor:
        """Cells of space are numbered by their first token; only cells that have tokens enter training's statistics."""
        pooled = space.pool(t, "amax") + space.pool(t, "mean")
        if self.training:
            taken = space.index == torch.arange(space.count, device=t.device)  # a token that is its cell's first
            normed = torch.zeros_like(pooled)
            normed[taken] = self.space(pooled[taken])
        else:
            normed = self.space(pooled.flatten(0, 1)).view_as(pooled)
        return space.spread(F.gelu(normed))


def view_weight(view: Tensor, v3: Tensor) -> Tensor:
    """(B, N), 0 to 1: how far a view agrees with space, before it is shared out among the views."""
    return (F.cosine_similarity(view, v3, dim=-1) + 1) / 2


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x (B, M, C), rows (B, ...) -> (B, ..., C)."""
    flat = rows.flatten(1)[..., None].expand(-1, -1, x.shape[2])
    return x.gather(1, flat).reshape(*rows.shape, x.shape[2])


def neighbours(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """(B, G, k): rows of the points nearest to each centre, by |a|^2 + |b|^2 - 2 ab as published."""
    squares = points.square().sum(-1)[:, None] + centres.square().sum(-1)[:, :, None]
    distance = squares - 2 * centres @ points.transpose(1, 2)
    return distance.topk(k, largest=False, sorted=False).indices


def sine_code(v: Tensor, d: int) -> Tensor:
    """v (..., 3) -> (..., d): of each axis in turn d/6 sines, then d/6 cosines, of 100 v / 1000^(6 f / d)."""
    count = d // 6
    rates = SINE_BASE ** (torch.arange(count, dtype=v.dtype, device=v.device) / count)
    angles = SINE_SCALE * v[..., None] / rates  # (..., 3, d / 6)
    return torch.cat((angles.sin(), angles.cos()), -1).flatten(-2)


def view_rotations() -> Tensor:
    """(V, 3, 3) on the CPU: R^T of R = Rx Ry Rz, so that rows of points are turned by points @ R^T. Float32 throughout, as
    published: a quarter turn's cosine is -4e-8."""
    angles = torch.deg2rad(torch.tensor(VIEWS, device="cpu"))  # (V, 3)
    (cx, cy, cz), (sx, sy, sz) = angles.cos().unbind(1), angles.sin().unbind(1)
    zero, one = torch.zeros_like(cx), torch.ones_like(cx)
    x = torch.stack((one, zero, zero, zero, cx, -sx, zero, sx, cx), 1)
    y = torch.stack((cy, zero, sy, zero, one, zero, -sy, zero, cy), 1)
    z = torch.stack((cz, -sz, zero, sz, cz, zero, zero, zero, one), 1)
    Rx, Ry, Rz = (matrix.view(-1, 3, 3) for matrix in (x, y, z))
    return (Rx @ Ry @ Rz).transpose(1, 2)


def on_lines(c: Tensor, rotations: Tensor, direction: Sequence[float]) -> Tensor:
    """(B, V, N) in [0, 77): where the centres lie on one line a view, from end to end, half a step back and wrapped around."""
    turned = c[:, None] @ rotations  # (B, V, N, 3)
    turned = turned + turned.new_tensor((0.0, 0.0, LINE_SHIFT))
    axis = torch.tensor(direction, dtype=c.dtype, device=c.device)
    along = (turned - turned.mean(2, keepdim=True)) @ (axis / axis.norm())
    low, high = along.amin(2, keepdim=True), along.amax(2, keepdim=True)
    span = high - low
    return ((along - low) / torch.where(span > 0, span, 1) * LENGTH - 0.5) % LENGTH


def on_planes(c: Tensor, rotations: Tensor, trans: float, plane: Plane) -> Tensor:
    """(B, V, N, 2): pixels (x, y) of the centres on one picture a view, in perspective, wrapped around at the edges."""
    turned = c[:, None] @ rotations
    depth = turned[..., 2] - trans + 1e-12
    x = (turned[..., 0] / depth + 1) * plane.width / 2 - 0.5
    y = (turned[..., 1] / depth * (plane.height / plane.width) + 1) * plane.height / 2 - 0.5
    return torch.stack((x % plane.width, y % plane.height), -1)


def rows_on_lines(s: Tensor, table: Tensor, across_batch: bool) -> Tensor:
    """s (B, V, N), table (77, D) -> (B, V, N, D), linear between rows; 0 where a place falls on a row, as published."""
    every = s.flatten() if across_batch else s.flatten(1)
    span = every.amax(-1) - every.amin(-1)
    u = s * ((LENGTH - 1) / torch.where(span > 0, span, 1)).reshape(-1, 1, 1)
    left, right = (edge.long().clamp(0, LENGTH - 1) for edge in (u.floor(), u.ceil()))
    return (right - u)[..., None] * table[left] + (u - left)[..., None] * table[right]


def rows_on_planes(places: Tensor, table: Tensor, plane: Plane, transpose: bool) -> Tensor:
    """places (B, V, N, 2), table (rows, D) of patches -> (B, V, N, D), bilinear; 0 outside.

    What is read is (B V, D, N). Published, these numbers are laid out anew as (N, D): a token's vector is then made of a few
    channels of many tokens. transpose: each token gets its own.
    """
    size = torch.tensor((plane.width, plane.height), dtype=places.dtype, device=places.device)
    grid = (2 * places / (size - 1) - 1).flatten(0, 1)[:, :, None]  # (B V, N, 1, 2)
    image = rearrange(table, "(h w) d -> 1 d h w", w=plane.width // plane.patch).expand(len(grid), -1, -1, -1)
    read = F.grid_sample(image, grid, align_corners=True)[..., 0]  # (B V, D, N)
    if transpose:
        read = read.transpose(1, 2)
    return read.reshape(*places.shape[:3], table.shape[1])


def cells_on_lines(s: Tensor, size: int) -> list[Cells]:
    """Of each view: pieces of the line, `size` positions long."""
    count = math.ceil(LENGTH / size)
    index = (s / size).floor().long().clamp(0, count - 1)
    return [Cells(each, count) for each in index.unbind(1)]


def cells_on_planes(places: Tensor, size: int, plane: Plane) -> list[Cells]:
    """Of each view: squares of `size` pixels a side."""
    across, down = math.ceil(plane.width / size), math.ceil(plane.height / size)
    x, y = (places / size).floor().long().unbind(-1)  # (B, V, N)
    index = x.clamp(0, across - 1) + y.clamp(0, down - 1) * across
    return [Cells(each, across * down) for each in index.unbind(1)]


def cells_in_space(c: Tensor, size: float) -> Cells:
    """Cubes with a side of `size`, from each cloud's lowest corner on, numbered by the first token in them."""
    cubes = ((c - c.amin(1, keepdim=True)) / size).long()  # (B, N, 3)
    same = (cubes[:, :, None] == cubes[:, None, :]).all(-1)  # (B, N, N)
    return Cells(same.long().argmax(-1), c.shape[1])
