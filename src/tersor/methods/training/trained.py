"""Layers while they are trained: they hold weights in full precision, and every forward pass quantizes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.formats.activation_grid import at_least_float32
from tersor.formats.clipped_grid import Weights, bits_of, codes_of, inside
from tersor.layers.dynamic_map import UNROUNDED, DynamicMap
from tersor.layers.dynamic_products import rounded_through
from tersor.layers.linear_map import call_with_matrix, weight_matrix
from tersor.layers.packed_rows import PackedRows
from tersor.layers.straight_through import straight_through


class TrainedMap(nn.Module):
    """A linear map on rounded inputs and weights; the gradient goes straight through both."""

    def __init__(self, original: nn.Module, weights: Weights, *, per_output: bool, a_bits: int, clip: float) -> None:
        super().__init__()
        self.original, self.weights, self.a_bits, self.clip = original, weights, a_bits, clip
        self.per_output = per_output
        self.over = (1,) if per_output else None

    @property
    def weight(self) -> Tensor:
        return self.original.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        W = weight_matrix(self.original)
        if self.a_bits != UNROUNDED:
            x = rounded_through(x, self.a_bits, self.clip)
        rounded = codes_of(W, self.weights, self.clip, self.over).dequantize()
        return call_with_matrix(self.original, x, straight_through(rounded, inside(W, self.clip)))

    @torch.no_grad()
    def freeze(self, dtype: torch.dtype) -> DynamicMap:
        """The layer as it is stored. dtype: of its bias and of its `weight`."""
        bias = getattr(self.original, "bias", None)
        W = at_least_float32(weight_matrix(self.original))
        found = codes_of(W, self.weights, self.clip, self.over)
        frozen = DynamicMap(
            self.original,
            w_bits=bits_of(self.weights),
            a_bits=self.a_bits,
            clip=self.clip,
            per_output=self.per_output,
            bias=bias is not None,
        )
        frozen.fill(found, bias)
        frozen.like = frozen.like.to(dtype)
        return frozen

    @torch.no_grad()
    def error(self) -> float:
        """‖Ŵ - W‖² / ‖W‖²."""
        W = weight_matrix(self.original)
        return _error(codes_of(W, self.weights, self.clip, self.over).dequantize(), W)


class TrainedRows(nn.Module):
    """An embedding whose rows are rounded, each on a grid of its own."""

    def __init__(self, original: nn.Embedding, weights: Weights, *, clip: float) -> None:
        super().__init__()
        self.original, self.weights, self.clip = original, weights, clip

    @property
    def weight(self) -> Tensor:
        return self.original.weight

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.original(ids)
        rounded = codes_of(rows, self.weights, self.clip, (-1,)).dequantize()
        return straight_through(rounded, inside(rows, self.clip))

    @torch.no_grad()
    def freeze(self, dtype: torch.dtype) -> PackedRows:
        frozen = PackedRows(self.original, bits=bits_of(self.weights))
        frozen.fill(codes_of(at_least_float32(self.original.weight), self.weights, self.clip, (1,)))
        frozen.like = frozen.like.to(dtype)
        return frozen

    @torch.no_grad()
    def error(self) -> float:
        W = self.original.weight
        return _error(codes_of(W, self.weights, self.clip, (1,)).dequantize(), W)


def _error(rounded: Tensor, W: Tensor) -> float:
    return float((rounded - W).square().sum() / W.square().sum().clamp(min=torch.finfo(W.dtype).tiny))
