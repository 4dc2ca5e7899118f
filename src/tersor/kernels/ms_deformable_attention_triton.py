"""Multi-scale deformable attention on GPUs: a program holds a few queries of one head and walks over maps and points.

Locations, shares and sums are float32. In the backward pass the gradients of locations and weights belong to one query and are
plain stores. Many queries read one pixel, so the gradients of the maps are atomic additions, and their last bits vary between
runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_Q = 16  # queries per program; on an H200 as fast as 32 forward, and a third faster backward


def forward(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """As the op `tersor::ms_deformable_attention`: y [b, q, m, d]."""
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    batch, queries, heads, n_levels, points = weights.shape
    y = value.new_empty(batch, queries, heads, value.shape[-1])
    _forward[(triton.cdiv(queries, BLOCK_Q), heads, batch)](
        value, _table(tuple(shapes), value.device), locations, weights, y, value.shape[1], queries, n_levels, points,
        value.shape[-1], BLOCK_Q=BLOCK_Q, BLOCK_D=triton.next_power_of_2(value.shape[-1]),
    )  # fmt: skip
    return y


def backward(
    grad_y: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, each in its own dtype."""
    grad_y, value, locations, weights = (each.contiguous() for each in (grad_y, value, locations, weights))
    batch, queries, heads, n_levels, points = weights.shape
    grad_value = torch.zeros_like(value, dtype=torch.float32)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    _backward[(triton.cdiv(queries, BLOCK_Q), heads, batch)](
        grad_y, value, _table(tuple(shapes), value.device), locations, weights, grad_value, grad_locations,
        grad_weights, value.shape[1], queries, n_levels, points, value.shape[-1],
        BLOCK_Q=BLOCK_Q, BLOCK_D=triton.next_power_of_2(value.shape[-1]),
    )  # fmt: skip
    return grad_value.to(value.dtype), grad_locations, grad_weights


@lru_cache(maxsize=64)
def _table(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """[levels, 3] on the device: first row, height, width. Cached, so that a step copies nothing to the GPU."""
    sides = torch.tensor(shapes)
    pixels = sides.prod(1)
    return torch.cat((pixels.cumsum(0)[:, None] - pixels[:, None], sides), 1).to(device, torch.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _corner(
    value_pointer: tl.tensor,  # at this batch and head
    row: tl.tensor,  # [BLOCK_Q] int32, as column
    column: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    is_query: tl.tensor,
    stride: tl.tensor,  # between pixels: m d
    channels: tl.tensor,  # [BLOCK_D]
    d: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where the pixels are, [BLOCK_Q, BLOCK_D], which of these exist, and what they hold (0 outside)."""
    inside = is_query & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    mask = inside[:, None] & (channels < d)[None, :]
    place = (row * width + column).to(tl.int64)[:, None] * stride + channels[None, :]
    return place, mask, tl.load(value_pointer + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    value_pointer: tl.tensor,  # [b, s, m, d]
    table_pointer: tl.tensor,  # [l, 3]
    locations_pointer: tl.tensor,  # [b, q, m, l, p, 2]
    weights_pointer: tl.tensor,  # [b, q, m, l, p]
    y_pointer: tl.tensor,  # [b, q, m, d]
    tokens: tl.tensor,  # s
    queries: tl.tensor,
    n_levels: tl.tensor,
    points: tl.tensor,
    d: tl.tensor,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    head, heads, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, BLOCK_D)
    is_query, stride = query < queries, heads * d
    entry = (batch * queries + query) * heads + head  # of [b, q, m]
    value_pointer += batch * tokens * stride + head * d
    y = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for level in range(n_levels):
        start = tl.load(table_pointer + 3 * level)
        height, width = tl.load(table_pointer + 3 * level + 1), tl.load(table_pointer + 3 * level + 2)
        image = value_pointer + start.to(tl.int64) * stride
        for point in range(points):
            at = (entry * n_levels + level) * points + point
            weight = tl.load(weights_pointer + at, mask=is_query, other=0.0).to(tl.float32)
            x = tl.load(locations_pointer + 2 * at, mask=is_query, other=0.0).to(tl.float32) * width - 0.5
            z = tl.load(locations_pointer + 2 * at + 1, mask=is_query, other=0.0).to(tl.float32) * height - 0.5
            left, top = tl.floor(x), tl.floor(z)
            fx, fz = x - left, z - top
            column, row = left.to(tl.int32), top.to(tl.int32)
            _, _, v00 = _corner(image, row, column, height, width, is_query, stride, channels, d)
            _, _, v01 = _corner(image, row, column + 1, height, width, is_query, stride, channels, d)
            _, _, v10 = _corner(image, row + 1, column, height, width, is_query, stride, channels, d)
            _, _, v11 = _corner(image, row + 1, column + 1, height, width, is_query, stride, channels, d)
            y += (weight * (1 - fz) * (1 - fx))[:, None] * v00 + (weight * (1 - fz) * fx)[:, None] * v01
            y += (weight * fz * (1 - fx))[:, None] * v10 + (weight * fz * fx)[:, None] * v11
    mask = is_query[:, None] & (channels < d)[None, :]
    tl.store(y_pointer + entry[:, None] * d + channels[None, :], y, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(
    grad_y_pointer: tl.tensor,  # [b, q, m, d]
    value_pointer: tl.tensor,  # [b, s, m, d]
    table_pointer: tl.tensor,  # [l, 3]
    locations_pointer: tl.tensor,  # [b, q, m, l, p, 2]
    weights_pointer: tl.tensor,  # [b, q, m, l, p]
    grad_value_pointer: tl.tensor,  # as value, float32, zeros
    grad_locations_pointer: tl.tensor,
    grad_weights_pointer: tl.tensor,
    tokens: tl.tensor,
    queries: tl.tensor,
    n_levels: tl.tensor,
    points: tl.tensor,
    d: tl.tensor,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    head, heads, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, BLOCK_D)
    is_query, stride = query < queries, heads * d
    entry = (batch * queries + query) * heads + head
    first = batch * tokens * stride + head * d
    mask = is_query[:, None] & (channels < d)[None, :]
    g = tl.load(grad_y_pointer + entry[:, None] * d + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    for level in range(n_levels):
        start = tl.load(table_pointer + 3 * level)
        height, width = tl.load(table_pointer + 3 * level + 1), tl.load(table_pointer + 3 * level + 2)
        offset = first + start.to(tl.int64) * stride
        image, grad_image = value_pointer + offset, grad_value_pointer + offset
        for point in range(points):
            at = (entry * n_levels + level) * points + point
            weight = tl.load(weights_pointer + at, mask=is_query, other=0.0).to(tl.float32)
            x = tl.load(locations_pointer + 2 * at, mask=is_query, other=0.0).to(tl.float32) * width - 0.5
            z = tl.load(locations_pointer + 2 * at + 1, mask=is_query, other=0.0).to(tl.float32) * height - 0.5
            left, top = tl.floor(x), tl.floor(z)
            fx, fz = x - left, z - top
            column, row = left.to(tl.int32), top.to(tl.int32)
            p00, m00, v00 = _corner(image, row, column, height, width, is_query, stride, channels, d)
            p01, m01, v01 = _corner(image, row, column + 1, height, width, is_query, stride, channels, d)
            p10, m10, v10 = _corner(image, row + 1, column, height, width, is_query, stride, channels, d)
            p11, m11, v11 = _corner(image, row + 1, column + 1, height, width, is_query, stride, channels, d)
            s00, s01 = tl.sum(g * v00, 1), tl.sum(g * v01, 1)  # what each corner would add to the loss
            s10, s11 = tl.sum(g * v10, 1), tl.sum(g * v11, 1)
            upper, lower = (1 - fx) * s00 + fx * s01, (1 - fx) * s10 + fx * s11
            grad_x = weight * width * ((1 - fz) * (s01 - s00) + fz * (s11 - s10))
            tl.store(grad_weights_pointer + at, (1 - fz) * upper + fz * lower, mask=is_query)
            tl.store(grad_locations_pointer + 2 * at, grad_x, mask=is_query)
            tl.store(grad_locations_pointer + 2 * at + 1, weight * height * (lower - upper), mask=is_query)
            tl.atomic_add(grad_image + p00, (weight * (1 - fz) * (1 - fx))[:, None] * g, mask=m00)
            tl.atomic_add(grad_image + p01, (weight * (1 - fz) * fx)[:, None] * g, mask=m01)
            tl.atomic_add(grad_image + p10, (weight * fz * (1 - fx))[:, None] * g, mask=m10)
            tl.atomic_add(grad_image + p11, (weight * fz * fx)[:, None] * g, mask=m11)
