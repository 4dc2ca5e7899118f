"""Which parts of a compressed model correspond to which of the original, and how one takes the other's place.

Both module trees are walked side by side. A part is the smallest module that differs: another class (a packed layer in the
place of a dense one) or other tensors. Some methods move scales from one module into another, which alone compute nonsense in the
other model: a norm that changed goes together with the layers that read it, and two linear layers go together where the
channels of one grew as the columns of the other shrank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.blocks import find_blocks
from tersor.errors import TersorError
from tersor.layers.experts import expert_maps
from tersor.layers.linear_map import is_linear_map, weight_matrix
from tersor.methods.method import Work
from tersor.methods.weights.scale_places import find_places
from tersor.progress import silent

TERNARY = 1.58
Loaded = Callable[[str], AbstractContextManager[None]]
MOVED = 0.02  # mean |log| of a channel's change that rounding does not make


@dataclass(frozen=True)
class Part:
    """Modules that are exchanged together. depth, block: of the repeated block that they are in; changed: whether they differ."""

    name: str
    kind: str
    depth: int | None
    block: str | None
    members: tuple[str, ...]
    bits: float | None
    changed: bool


def parts_of(
    base: nn.Module,
    other: nn.Module,
    batch: Mapping[str, Any] | None = None,
    *,
    loaded: Loaded = lambda name: nullcontext(),
) -> list[Part]:
    """The parts in tree order: those that differ, and the linear maps that do not.

    batch: arguments of the model, with which scales that were moved are looked for. loaded: brings both modules of a name into
    memory while they are compared, where they are not there. Raises TersorError where the layers do not correspond.
    """
    if type(base) is not type(other):
        raise _unlike(f"one is {type(other).__name__}, the other {type(base).__name__}")
    changed, same = list[str](), list[str]()
    _walk(base, other, "", changed, same, loaded)
    groups = _groups(base, other, changed, batch)
    blocks = [unit.name for unit in find_blocks(base) if unit.name]
    order = {name: n for n, (name, _) in enumerate(base.named_modules())}
    found = [_part(group, other, blocks, changed=True) for group in groups]
    found += [_part((name,), other, blocks, changed=False) for name in same]
    return sorted(found, key=lambda part: order[part.members[0]])


@contextmanager
def exchanged(model: nn.Module, donor: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """The donor's modules of these names stand in the model's places."""
    before = {name: model.get_submodule(name) for name in names}
    try:
        for name in before:
            model.set_submodule(name, donor.get_submodule(name))
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def _walk(base: nn.Module, other: nn.Module, name: str, changed: list[str], same: list[str], loaded: Loaded) -> None:
    """Sort the modules below `name` into those that differ and the linear maps that do not."""
    with loaded(name):
        _sort(base, other, name, changed, same, loaded)


def _sort(base: nn.Module, other: nn.Module, name: str, changed: list[str], same: list[str], loaded: Loaded) -> None:
    _check_sizes(base, other, name)
    if type(base) is not type(other):
        changed.append(name)
        return
    if expert_maps(base) or expert_maps(other):
        (same if _equal(base.state_dict(), other.state_dict()) else changed).append(name)
        return
    mine, theirs = dict(base.named_children()), dict(other.named_children())
    if mine.keys() != theirs.keys():
        odd = sorted(mine.keys() ^ theirs.keys())[0]
        raise _unlike(f"only one of the models has {f'{name}.{odd}' if name else odd}")
    if not mine and is_linear_map(base) and _equal(base.state_dict(), other.state_dict()):
        same.append(name)
        return
    if not _equal(_own(base, leaf=not mine), _own(other, leaf=not mine)):
        if not name:
            raise _unlike("the models have parameters of their own, outside of all layers, that differ")
        changed.append(name)
        return
    for child, module in mine.items():
        _walk(module, theirs[child], f"{name}.{child}" if name else child, changed, same, loaded)


def _own(module: nn.Module, *, leaf: bool) -> Mapping[str, Tensor]:
    """What a module holds itself: of a leaf its state, which packed layers give in their standard layout."""
    if leaf:
        found: Mapping[str, Tensor] = module.state_dict()
        return found
    held = {**module._parameters, **module._buffers}
    return {
        name: each for name, each in held.items() if each is not None and name not in module._non_persistent_buffers_set
    }


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        a.shape == other[name].shape and torch.equal(a, other[name].to(a.device)) for name, a in one.items()
    )


def _check_sizes(base: nn.Module, other: nn.Module, name: str) -> None:
    """Raise TersorError where two modules of one name map between unlike sizes."""
    mine, theirs = _sizes(base), _sizes(other)
    for what in mine.keys() & theirs.keys():
        if mine[what] != theirs[what]:
            raise _unlike(f"{name} has {theirs[what]} {what.replace('_', ' ')} in one, {mine[what]} in the other")


def _sizes(module: nn.Module) -> dict[str, int]:
    names = ("in_features", "out_features", "num_embeddings", "embedding_dim", "in_channels", "out_channels")
    return {name: value for name in names if isinstance(value := getattr(module, name, None), int)}


def _unlike(why: str) -> TersorError:
    return TersorError(
        f"the layers of the two models do not correspond: {why}; only methods that keep every module in its place can be "
        "attributed"
    )


def _groups(
    base: nn.Module, other: nn.Module, changed: Sequence[str], batch: Mapping[str, Any] | None
) -> list[tuple[str, ...]]:
    """The changed modules, those together that only make sense together; linear layers first in each."""
    heads = {name: name for name in changed}

    def head(name: str) -> str:
        while heads[name] != name:
            name = heads[name]
        return name

    norms = [name for name in changed if is_norm_like(base.get_submodule(name))]
    if norms and batch is not None:
        for source, readers in _places(base, batch):
            mine = [name for name in readers if name in heads]
            moved = source in norms or any(_moved(base, other, source, reader) for reader in mine)
            if source in heads and moved:
                for name in mine:
                    heads[head(name)] = head(source)
    found: dict[str, list[str]] = {}
    for name in changed:
        found.setdefault(head(name), []).append(name)
    return [tuple(sorted(group, key=lambda name: name in norms)) for group in found.values()]


def is_norm_like(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _places(base: nn.Module, batch: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    work = Work([dict(batch)], lambda name: True, silent)
    try:
        places, _ = find_places(base, work, of="attribute", linears=True)
    except TersorError:  # the model has none
        return []
    return [(place.source, place.readers) for place in places]


def _moved(base: nn.Module, other: nn.Module, source: str, reader: str) -> bool:
    """Whether channels of the source changed by the inverse of the change of the reader's columns.

    Both may have other scales on their other side, as W' = diag(a) W diag(b); so medians of log |W' / W| are compared, which tell
    a and b apart but for one factor.
    """
    rows = _log_ratio(base, other, source)
    columns = _log_ratio(base, other, reader)
    if rows is None or columns is None or rows.shape[0] != columns.shape[1]:
        return False
    r, c = (_centred(each) for each in (rows.nanmedian(dim=1).values, columns.nanmedian(dim=0).values))
    return float(r.abs().mean()) > MOVED and float((r + c).norm()) < 0.5 * float(r.norm())


def _log_ratio(base: nn.Module, other: nn.Module, name: str) -> Tensor | None:
    """log |W' / W| [out, in], NaN where one is zero; None where there is no matrix."""
    before, after = (_matrix(each.get_submodule(name)) for each in (base, other))
    if before is None or after is None:
        return None
    ratio: Tensor = (after.to(before.device).abs() / before.abs()).log()
    return ratio.masked_fill(~ratio.isfinite(), torch.nan)


def _centred(values: Tensor) -> Tensor:
    values = values.nan_to_num(0.0)
    return values - values.mean()


def _matrix(module: nn.Module) -> Tensor | None:
    """The weight [out, in], packed or not; None where there is none."""
    if is_linear_map(module):
        return weight_matrix(module).detach().float()
    weight = getattr(module, "weight", None)
    return weight.detach().float() if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _part(members: tuple[str, ...], other: nn.Module, blocks: Sequence[str], *, changed: bool) -> Part:
    first = members[0]
    depth = next((n for n, block in enumerate(blocks) if f"{first}.".startswith(f"{block}.")), None)
    block = None if depth is None else blocks[depth]
    short = [name[len(block) + 1 :] if block and name != block else name for name in members]
    kind = "block" if first == block else " + ".join([short[0], *(name.rpartition(".")[2] for name in short[1:])])
    name = " + ".join([first, *(name.rpartition(".")[2] for name in members[1:])])
    return Part(name, kind, depth, block, members, _bits(other.get_submodule(first)), changed)


def _bits(module: nn.Module) -> float | None:
    for each in module.modules():
        bits: Any = getattr(each, "bits", getattr(each, "w_bits", None))
        if bits == "ternary":
            return TERNARY
        if isinstance(bits, int | float):
            return float(bits)
    return None
