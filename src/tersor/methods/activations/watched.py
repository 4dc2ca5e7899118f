"""Layers and products that record their operands, outputs and gradients, until their grids are searched.

A `WatchedMap` or `WatchedProducts` wraps a module of the model. It computes what the module did, or, once it has grids and
`quantized` is set, the same with rounded operands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.formats.activation_grid import at_least_float32
from tersor.formats.grid import Grid
from tersor.formats.twin_grid import GeluGrid
from tersor.layers.products import Multiply, Products
from tersor.layers.quantized_map import QuantizedMap
from tersor.layers.quantized_products import QuantizedProducts
from tersor.methods.activations.interval_search import (
    MapGrids,
    MapProblem,
    ProductGrids,
    ProductProblem,
    Record,
    symmetric,
)


def keep(operands: tuple[Tensor, ...], output: Tensor, multiply: Multiply | None, kept: list[Record]) -> Tensor:
    """Record a call; returns the output to go on with. The record gets its gradient when the loss is differentiated."""
    exact = tuple(at_least_float32(each.detach()).clone() for each in operands)
    record = Record(exact, at_least_float32(output.detach()).clone(), torch.zeros_like(output), multiply)
    record.gradient = at_least_float32(record.gradient)
    kept.append(record)
    output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)

    def note(gradient: Tensor) -> None:
        record.gradient = at_least_float32(gradient.detach())

    output.register_hook(note)  # type: ignore[no-untyped-call]
    return output


class WatchedMap(nn.Module):
    """A linear map or convolution. records: of the calls while `watching`; grids: once they are found."""

    def __init__(self, original: nn.Module, w_bits: int, a_bits: int) -> None:
        super().__init__()
        self.original, self.w_bits, self.a_bits = original, w_bits, a_bits
        self.watching = self.quantized = False
        self.records: list[Record] = []
        self.grids: MapGrids | None = None

    @property
    def weight(self) -> Tensor:
        return self.original.weight  # type: ignore[return-value]

    def problem(self) -> MapProblem:
        return MapProblem(self.original, self.records, self.w_bits, self.a_bits)

    def forward(self, x: Tensor) -> Tensor:
        if self.quantized and self.grids is not None:
            return self.problem().quantized(self.grids, at_least_float32(x)).to(x.dtype)
        output: Tensor = self.original(x)
        return keep((x,), output, None, self.records) if self.watching else output

    def error(self) -> float:
        """‖o^ - o‖² / ‖o‖² over the records."""
        assert self.grids is not None
        problem = self.problem()
        return _share([(problem.quantized(self.grids, each.operands[0]), each.output) for each in self.records])

    @torch.no_grad()
    def freeze(self) -> QuantizedMap:
        """The layer as it is stored."""
        assert self.grids is not None
        problem, grids = self.problem(), self.grids
        W = problem.weight_for(grids.input, channelwise=grids.channelwise)
        rows, columns = grids.weight.shape
        assert columns == 1
        weight = symmetric(grids.weight.repeat_interleave(len(W) // rows, 0), self.w_bits)
        bias = self.original.bias
        assert bias is None or isinstance(bias, Tensor)
        input = grids.input
        count = len(input.scale) if grids.channelwise else 1
        frozen = QuantizedMap(
            self.original,
            w_bits=self.w_bits,
            a_bits=self.a_bits,
            bias=bias is not None,
            input_grids=count,
            gelu=isinstance(input, GeluGrid),
        )
        if isinstance(input, Grid):
            shape = (-1,) if count > 1 else ()
            input = Grid(input.scale.view(shape), input.zero.view(shape), input.bits)
        frozen.fill(weight.quantize(W).to(torch.uint8), weight, input, bias)
        return frozen


class WatchedProducts(nn.Module):
    """A module that multiplies activations. records: of each product, in the order of computing."""

    def __init__(self, inner: nn.Module, bits: int) -> None:
        super().__init__()
        self.inner, self.bits = inner, bits
        self.watching = self.quantized = False
        self.records: list[list[Record]] = []
        self.grids: list[ProductGrids] = []

    def problems(self) -> list[ProductProblem]:
        made = [ProductProblem(each, (self.bits, self.bits)) for each in self.records]
        if len({each.heads for each in made}) > 1:  # all products of the module must have the same number of grids
            for each in made:
                each.heads = 1
        return made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.watching and not (self.quantized and self.grids):
            return self.inner(*args, **kwargs)
        count = 0

        def operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            if not self.quantized:
                return a, b
            pair = self.grids[count].shaped()
            first, second = (g.round(at_least_float32(x)).to(x.dtype) for g, x in zip(pair, (a, b), strict=True))
            return first, second

        def seen(multiply: Multiply, a: Tensor, b: Tensor, output: Tensor) -> Tensor:
            nonlocal count
            count += 1
            if not self.watching:
                return output
            if count > len(self.records):
                self.records.append([])
            return keep((a, b), output, multiply, self.records[count - 1])

        with Products(operands, seen):
            return self.inner(*args, **kwargs)

    def error(self) -> float:
        """‖o^ - o‖² / ‖o‖² over the records, of the product that changed most."""
        found = []
        for problem, grids in zip(self.problems(), self.grids, strict=True):
            found.append(_share([(problem.quantized(grids, each), each.output) for each in problem.records]))
        return max(found)

    @torch.no_grad()
    def freeze(self) -> QuantizedProducts:
        """The module as it is stored."""
        heads = max(grid.scale.numel() for each in self.grids for grid in each.pair)
        return QuantizedProducts.of_grids(self.inner, self.bits, [each.shaped() for each in self.grids], heads=heads)


def _share(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Σ (found - wanted)² / Σ wanted² over the pairs (found, wanted)."""
    wanted = sum(float(each.square().sum()) for _, each in pairs)
    return sum(float((found - each).square().sum()) for found, each in pairs) / max(wanted, 1e-30)
