"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159): a query reads a few places of several maps.

    y_qm = sum_l sum_p w_qmlp V_lm(location_qmlp)

V_lm is map l of head m, read bilinearly between pixel centres, which lie at (i + 0.5) / size; outside the map it is zero.

value [b, s, m, d], the maps one behind the other, row by row, s = sum h_l w_l; shapes ((h_0, w_0), ...); locations
[b, q, m, l, p, 2] as (x, y), 0 to 1 from edge to edge; weights [b, q, m, l, p] -> y [b, q, m, d] in value's dtype.

`reference` is the formula, corner by corner. Models call `ms_deformable_attention`: the op
`tersor::ms_deformable_attention`, in torch on CPUs (`sampled`, by grid_sample) and in Triton on GPUs
(ms_deformable_attention_triton.py), forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = Sequence[tuple[int, int]]


def reference(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    wide = torch.promote_types(value.dtype, torch.float32)
    y = locations.new_zeros(*locations.shape[:3], value.shape[-1], dtype=wide)
    for level, (start, height, width) in enumerate(levels(shapes)):
        x_pixel = locations[:, :, :, level, :, 0].to(wide) * width - 0.5  # [b, q, m, p]
        y_pixel = locations[:, :, :, level, :, 1].to(wide) * height - 0.5
        left, top = x_pixel.floor(), y_pixel.floor()
        for row, row_share in ((top, 1 - (y_pixel - top)), (top + 1, y_pixel - top)):
            for column, column_share in ((left, 1 - (x_pixel - left)), (left + 1, x_pixel - left)):
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                place = start + row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
                share = weights[:, :, :, level].to(wide) * row_share * column_share * inside
                y = y + torch.einsum("bqmp,bqmpd->bqmd", share, _gather(value.to(wide), place.long()))
    return y.to(value.dtype)


def ms_deformable_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """As `reference`, fast. Differentiable in every tensor."""
    y: Tensor = _attention(value, [side for shape in shapes for side in shape], locations, weights)
    return y


def levels(shapes: Shapes) -> Iterator[tuple[int, int, int]]:
    """(first row of the map in `value`, height, width) of each map."""
    start = 0
    for height, width in shapes:
        yield start, height, width
        start += height * width


def sampled(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """In plain torch: one grid_sample a map."""
    batch, queries, heads = locations.shape[:3]
    wide = torch.promote_types(value.dtype, torch.float32)
    y = torch.zeros(batch * heads, value.shape[-1], queries, dtype=wide, device=value.device)
    for level in range(len(shapes)):
        image, grid, share = _level(value.to(wide), shapes, locations.to(wide), weights.to(wide), level)
        y = y + (_sample(image, grid) * share[:, None]).sum(-1)
    return _as_queries(y, batch).to(value.dtype)


def sampled_backward(
    grad_y: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, written out because autograd does not run inside an op."""
    batch, _, heads = locations.shape[:3]
    wide = torch.promote_types(value.dtype, torch.float32)
    grad = _as_images(grad_y.to(wide))[..., None]  # [b m, d, q, 1]
    of_value, of_locations, of_weights = [], [], []
    for level in range(len(shapes)):
        image, grid, share = _level(value.to(wide), shapes, locations.to(wide), weights.to(wide), level)
        of_weights.append((grad * _sample(image, grid)).sum(1))  # [b m, q, p]
        of_image, of_grid = torch.ops.aten.grid_sampler_2d_backward(
            (grad * share[:, None]).contiguous(), image, grid, 0, 0, False, [True, True]
        )
        of_value.append(of_image.flatten(2))  # [b m, d, h w]
        of_locations.append(2 * of_grid)  # [b m, q, p, 2]
    grad_value = _as_queries(torch.cat(of_value, 2), batch)
    grad_locations, grad_weights = (
        torch.stack(each, 2).reshape(batch, heads, *each[0].shape[1:2], len(shapes), *each[0].shape[2:]).transpose(1, 2)
        for each in (of_locations, of_weights)
    )
    return (
        grad_value.to(value.dtype).contiguous(),
        grad_locations.to(locations.dtype).contiguous(),
        grad_weights.to(weights.dtype).contiguous(),
    )


def _level(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, level: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A map as images [b m, d, h, w], where they are read [b m, q, p, 2] from -1 to 1, the weights [b m, q, p]."""
    start, height, width = list(levels(shapes))[level]
    image = _as_images(value[:, start : start + height * width])
    image = image.reshape(*image.shape[:2], height, width)
    grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
    return image, grid, weights[:, :, :, level].transpose(1, 2).flatten(0, 1)


def _sample(image: Tensor, grid: Tensor) -> Tensor:
    """-> [b m, d, q, p]."""
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _as_images(x: Tensor) -> Tensor:
    """[b, n, m, d] -> [b m, d, n]."""
    return x.permute(0, 2, 3, 1).flatten(0, 1)


def _as_queries(x: Tensor, batch: int) -> Tensor:
    """Its inverse."""
    return x.reshape(batch, -1, *x.shape[1:]).permute(0, 3, 1, 2)


def _gather(value: Tensor, place: Tensor) -> Tensor:
    """value [b, s, m, d] at place [b, q, m, p] -> [b, q, m, p, d]."""
    batch = torch.arange(value.shape[0], device=value.device)[:, None, None, None]
    head = torch.arange(value.shape[2], device=value.device)[None, None, :, None]
    return value[batch, place, head]


def _pairs(sides: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sides[::2], sides[1::2], strict=True))


@torch.library.custom_op("tersor::ms_deformable_attention", mutates_args=())
def _attention(value: Tensor, sides: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return sampled(value, _pairs(sides), locations, weights).contiguous()


@_attention.register_kernel("cuda")
def _(value: Tensor, sides: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    from tersor.kernels import ms_deformable_attention_triton

    return ms_deformable_attention_triton.forward(value, _pairs(sides), locations, weights)


@_attention.register_fake
def _(value: Tensor, sides: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(*locations.shape[:3], value.shape[-1])


@torch.library.custom_op("tersor::ms_deformable_attention_backward", mutates_args=())
def _attention_backward(
    grad_y: Tensor, value: Tensor, sides: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return sampled_backward(grad_y, value, _pairs(sides), locations, weights)


@_attention_backward.register_kernel("cuda")
def _(
    grad_y: Tensor, value: Tensor, sides: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from tersor.kernels import ms_deformable_attention_triton

    return ms_deformable_attention_triton.backward(grad_y, value, _pairs(sides), locations, weights)


@_attention_backward.register_fake
def _(
    grad_y: Tensor, value: Tensor, sides: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    value, ctx.sides, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, grad_y: Tensor):  # type: ignore[no-untyped-def]
    value, locations, weights = ctx.saved_tensors
    gradients = _attention_backward(grad_y, value, ctx.sides, locations, weights)
    return gradients[0], None, gradients[1], gradients[2]


_attention.register_autograd(_backward, setup_context=_setup_context)
