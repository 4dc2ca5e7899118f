"""Learns weights block by block, so that a quantized block computes what the original one did.

A block's input comes from the quantized blocks before it; its target is the original model's output of that block, on exact
inputs. The unrounded weights learn by gradient descent; the gradient goes straight through every rounding. Grids stay as they
are. The result is taken only where the block's error on all samples is smaller than before.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import Batch, call, first_tensor
from tersor.calibrate.blocks import find_blocks
from tersor.formats.activation_grid import at_least_float32
from tersor.layers.linear_map import weight_matrix
from tersor.methods.activations.calibrated import CalibratedMap, CalibratedProducts

RATE = 0.02  # of Adam, in steps of a weight's grid
SAMPLES = 8  # of the batch, in each step
Part = CalibratedMap | CalibratedProducts


@dataclass(frozen=True)
class BlockError:
    """‖block(x^) - target‖² / ‖target‖² of one block, before and after learning."""

    name: str
    before: float
    after: float


def reconstruct_blocks(model: nn.Module, parts: Sequence[Part], batch: Batch, *, steps: int) -> list[BlockError]:
    """Learn the weights of the calibrated maps `parts` inside the model's repeated blocks, whose grids are all fitted."""
    blocks = {unit.name: unit.module for unit in find_blocks(model) if unit.name}
    mine = {name: _maps_in(block, parts) for name, block in blocks.items()}
    for part in parts:
        part.enabled = False
    targets = {name: output for name, (_, _, output) in _calls(model, blocks, batch).items()}
    for part in parts:
        part.enabled = True
    found = []
    for name, block in blocks.items():
        if not mine[name] or name not in targets:
            continue
        args, kwargs, _ = _calls(model, {name: block}, batch)[name]
        found.append(_learn(name, block, mine[name], (args, kwargs), targets[name], steps))
    return found


def _maps_in(block: nn.Module, parts: Sequence[Part]) -> list[CalibratedMap]:
    inside = {id(module) for module in block.modules()}
    return [each for each in parts if isinstance(each, CalibratedMap) and id(each) in inside and each.codes is not None]


Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]


@torch.no_grad()
def _calls(model: nn.Module, blocks: dict[str, nn.Module], batch: Batch) -> dict[str, Call]:
    """Arguments and output of each block that returns a tensor and is called once."""
    found: dict[str, list[Call | None]] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensor = first_tensor(output)
            found.setdefault(name, []).append(None if tensor is None else (args, kwargs, tensor.clone()))

        return hook

    with ExitStack() as hooks:
        for name, block in blocks.items():
            hooks.enter_context(block.register_forward_hook(note(name), with_kwargs=True))
        call(model, batch)
    return {name: calls[0] for name, calls in found.items() if len(calls) == 1 and calls[0] is not None}


def _learn(
    name: str,
    block: nn.Module,
    maps: Sequence[CalibratedMap],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    target: Tensor,
    steps: int,
) -> BlockError:
    size, random = len(target), torch.Generator().manual_seed(0)

    def loss(rows: Tensor | None) -> Tensor:
        args, kwargs = arguments if rows is None else (_rows(each, rows, size) for each in arguments)
        output = first_tensor(block(*args, **kwargs))
        assert output is not None
        return (output - (target if rows is None else target[rows])).square().mean()

    with torch.no_grad():
        scale = max(float(target.square().mean()), 1e-30)
        before = after = float(loss(None)) / scale
    kept = [each.codes for each in maps]
    starts = [at_least_float32(weight_matrix(each.original).detach()) for each in maps]
    moves = [torch.zeros_like(W, requires_grad=True) for W in starts]  # in steps of the grid
    optimizer = torch.optim.Adam(moves, lr=RATE)
    with torch.enable_grad():
        for _ in range(steps):
            for each, W, move in zip(maps, starts, moves, strict=True):
                assert each.grid is not None
                each.learned = W + move * each.grid.scale
            rows = torch.randperm(size, generator=random)[:SAMPLES].to(target.device)
            gradients = torch.autograd.grad(loss(rows), moves, allow_unused=True)
            for move, gradient in zip(moves, gradients, strict=True):
                move.grad = gradient
            optimizer.step()
    with torch.no_grad():
        for each, W, move in zip(maps, starts, moves, strict=True):
            assert each.grid is not None
            each.learned = None
            each.codes = each.grid.quantize(W + move * each.grid.scale).to(torch.uint8)
        after = float(loss(None)) / scale
    if not after < before:
        after = before
        for each, codes in zip(maps, kept, strict=True):
            each.codes = codes
    return BlockError(name, before, after)


def _rows(value: Any, rows: Tensor, size: int) -> Any:
    """The rows of these samples, from all tensors with one row per sample; anything else as it is."""
    if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size:
        return value[rows]
    if isinstance(value, tuple | list):
        return type(value)(_rows(each, rows, size) for each in value)
    if isinstance(value, dict):
        return {name: _rows(each, rows, size) for name, each in value.items()}
    return value
