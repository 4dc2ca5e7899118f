"""Finds norms whose output only linear layers read, by running the model, whatever its classes.

Between a norm and the layers that it feeds, models cut, roll and reorder tokens, but leave the channels in their places. So
every norm is made to output random numbers of its own, the same for all tokens; the layers that see exactly these are its
readers. Then the norm's output is scaled and shifted channel by channel, and its readers undo that at their inputs. Where the
model's output stays the same, nothing else reads the norm, such as a residual connection, or padding behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import Batch, call, first_tensor
from tersor.calibrate.blocks import find_blocks
from tersor.layers.linear_map import LinearMap


@dataclass(frozen=True)
class NormPair:
    """A norm and the linear layers that read its output, by name. Nothing else reads it."""

    norm: str
    linears: tuple[str, ...]


def is_layer_norm(module: nn.Module) -> bool:
    """Whether it is a LayerNorm over one axis with both parameters, so that it can take a scale and an offset."""
    return (
        isinstance(module, nn.LayerNorm)
        and len(module.normalized_shape) == 1
        and module.weight is not None
        and module.bias is not None
    )


@torch.no_grad()
def find_norm_pairs(
    model: nn.Module,
    batch: Batch,
    maps: Mapping[str, LinearMap],
    *,
    is_norm: Callable[[nn.Module], bool] = is_layer_norm,
    offsets: bool = True,
) -> list[NormPair]:
    """The pairs inside the repeated blocks, in tree order. maps: the linear layers that count; batch: one that the model takes.

    A norm that is also read by a layer outside `maps` is in no pair. is_norm: which modules count, each with a `weight`
    [channels]; offsets: whether the pairs have to take an offset too, as LayerNorms do and norms without a bias cannot.
    """
    blocks = {id(module) for unit in find_blocks(model) for module in unit.module.modules()}
    norms = {name: module for name, module in model.named_modules() if id(module) in blocks and is_norm(module)}
    linears = {
        name: each for name, each in maps.items() if isinstance(each, nn.Module) and not isinstance(each, nn.Conv2d)
    }
    readers = _readers(model, norms, linears, batch)
    pairs = [NormPair(norm, tuple(found)) for norm, found in readers.items() if found]
    reference = first_tensor(call(model, batch))
    if _nothing_else_reads(model, pairs, batch, reference, offsets):
        return pairs
    return [pair for pair in pairs if _nothing_else_reads(model, [pair], batch, reference, offsets)]


def _readers(
    model: nn.Module, norms: Mapping[str, nn.Module], linears: Mapping[str, nn.Module], batch: Batch
) -> dict[str, list[str]]:
    """{norm: the linear layers that see its output in every call}"""
    random = torch.Generator().manual_seed(0)
    signs = {name: torch.randn(_width(norm), generator=random).to(_weight(norm)) for name, norm in norms.items()}
    seen: dict[str, set[str | None]] = {name: set() for name in linears}

    def give(sign: Tensor) -> Any:
        return lambda _module, _args, y: sign.expand_as(y).contiguous()

    def look(reader: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            seen[reader].add(next((name for name, sign in signs.items() if _is_all(x, sign)), None))

        return hook

    with ExitStack() as hooks:
        for name, norm in norms.items():
            hooks.enter_context(norm.register_forward_hook(give(signs[name])))
        for name, each in linears.items():
            hooks.enter_context(each.register_forward_pre_hook(look(name)))
        call(model, batch)
    return {norm: [reader for reader, found in seen.items() if found == {norm}] for norm in norms}


def _is_all(x: Any, row: Tensor) -> bool:
    """Whether every token of x is this row."""
    return isinstance(x, Tensor) and x.shape[-1] == len(row) and torch.equal(x, row.expand_as(x))


def _nothing_else_reads(
    model: nn.Module, pairs: list[NormPair], batch: Batch, reference: Tensor | None, offsets: bool
) -> bool:
    random = torch.Generator().manual_seed(0)

    def change(scale: Tensor, offset: Tensor) -> Any:
        return lambda _module, _args, y: y * scale + offset

    def undo(scale: Tensor, offset: Tensor) -> Any:
        return lambda _module, args: ((args[0] - offset) / scale, *args[1:])

    with ExitStack() as hooks:
        for pair in pairs:
            norm = model.get_submodule(pair.norm)
            scale = torch.exp2(torch.randint(-1, 2, (_width(norm),), generator=random)).to(_weight(norm))
            offset = torch.randn(_width(norm), generator=random).to(_weight(norm)) * offsets
            hooks.enter_context(norm.register_forward_hook(change(scale, offset)))
            for name in pair.linears:
                hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(undo(scale, offset)))
        changed = first_tensor(call(model, batch))
    if reference is None or changed is None:
        return False
    tolerance = 1e-3 if torch.finfo(reference.dtype).eps < 1e-5 else 5e-2
    return bool((changed - reference).norm() <= tolerance * reference.norm())


def _weight(norm: nn.Module) -> Tensor:
    assert isinstance(norm.weight, Tensor)
    return norm.weight


def _width(norm: nn.Module) -> int:
    return _weight(norm).numel()
