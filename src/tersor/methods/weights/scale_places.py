"""Places where channels can be scaled in linear layers, and scaled back before them, without changing what the model computes.

A place is a source and its readers. Channel i of the source's output is divided by s_i > 0, and column i of every reader's
weight is multiplied by s_i. This is exact where nothing else reads the source:

    norm -> linear layers          γ ← γ / s, β ← β / s            W ← W diag(s)
    linear layer -> linear layer   W' ← diag(1/s) W', b' ← b' / s  W ← W diag(s)

In the second kind, what lies between the two layers scales each channel by itself: attention between v and o, the product with
the gate between up and down, a ReLU. Places are found by running the model, not by names. `activations/norm_pairs.py` finds
norms and their readers. Two linear layers are tested: the first's output is scaled by powers of two, which is exact in floating
point; the second's input must follow, and the block's output must stay when the input is scaled back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import Batch, call, first_tensor, probe_of, without_target
from tersor.calibrate.blocks import find_blocks
from tersor.errors import TersorError
from tersor.layers.linear_map import computes_its_own, is_linear_map, matrix_shape, set_weight_matrix, weight_matrix
from tersor.methods.activations.norm_pairs import find_norm_pairs
from tersor.methods.method import Work

CANDIDATES = 8  # layers called just before one, which are tested as its source
TOLERANCE = 1e-5  # relative; powers of two make no error, so a larger difference is no place


@dataclass(frozen=True)
class Place:
    """A source of activations, and the linear layers that read them, by name. Nothing else reads them."""

    source: str
    readers: tuple[str, ...]


@torch.no_grad()
def find_places(model: nn.Module, work: Work, *, of: str, linears: bool) -> tuple[list[Place], dict[str, str]]:
    """All places in the blocks, and for other norms the reason why they are none. linears: linear layers may be sources too.

    of: the method that asks. Raises TersorError where there is no place.
    """
    batch = probe_of(without_target(dict(work.samples[0])))
    names = Counter(id(each) for _, each in model.named_parameters(remove_duplicate=False))
    maps = {name: each for name, each in model.named_modules() if _is_scalable(each) and names[id(each.weight)] == 1}
    norms = [name for name, each in model.named_modules() if gain_of(each) is not None]
    norms = [name for name in norms if names[id(model.get_submodule(name).weight)] == 1]
    chosen = {id(model.get_submodule(name)) for name in norms}
    pairs = find_norm_pairs(model, batch, maps, is_norm=lambda each: id(each) in chosen, offsets=False)
    places = [Place(pair.norm, pair.linears) for pair in pairs]
    if linears:
        places += _linear_places(model, maps, batch, {name for place in places for name in place.readers})
    wanted = [place for place in places if all(map(work.wanted, place.readers))]
    wanted = [place for place in wanted if place.source not in maps or work.wanted(place.source)]
    left = {place.source: "leads to layers that were not asked for" for place in places if place not in wanted}
    inside = tuple(f"{unit.name}." for unit in find_blocks(model) if unit.name)
    for name in norms:
        if name.startswith(inside) and name not in {place.source for place in places}:
            left[name] = "is not read by linear layers alone, or one of them is tied or an expert"
    if not wanted:
        why = next((f" ({name} {why})" for name, why in left.items()), "")
        raise TersorError(
            f"{of} needs a norm whose output goes to linear layers alone, and finds none to scale in the blocks of "
            f"{type(model).__name__}{why}: leave {of} out"
        )
    return wanted, left


def _is_scalable(module: nn.Module) -> bool:
    plain = is_linear_map(module) and not isinstance(module, nn.Conv2d) and not computes_its_own(module)
    return plain and isinstance(module.weight, nn.Parameter)


@torch.no_grad()
def gain_of(module: nn.Module) -> int | None:
    """What a norm adds to its weight before it multiplies by it: 0, or 1 in Gemma's. None where the module is no norm.

    It is tested: when that sum and the bias are scaled channel by channel, the output must be scaled alike.
    """
    parameters = dict(module.named_parameters())
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or weight.dim() != 1 or not parameters.keys() <= {"weight", "bias"} or is_linear_map(module):
        return None
    if bias is not None and bias.shape != weight.shape:
        return None
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, len(weight), generator=random).to(weight)
    s = torch.exp2(torch.randint(-2, 3, (len(weight),), generator=random)).to(weight)
    with _kept(weight, bias):
        weight.copy_(torch.randn(len(weight), generator=random))
        y = _output(module, x)
        if y is None or y.shape != x.shape or not y.any():
            return None
        if bias is not None:
            bias.mul_(s)
        before = weight.clone()
        for gain in (0, 1):
            weight.copy_((before + gain) * s - gain)
            if torch.allclose(module(x), y * s, rtol=16 * torch.finfo(y.dtype).eps, atol=16 * torch.finfo(y.dtype).eps):
                return gain
    return None


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    """The module's output for x; None where it does not take such an input."""
    try:
        y = module(x)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    return y if isinstance(y, Tensor) else None


@contextmanager
def _kept(*tensors: Tensor | None) -> Iterator[None]:
    before = [None if each is None else each.clone() for each in tensors]
    try:
        yield
    finally:
        for each, value in zip(tensors, before, strict=True):
            if each is not None and value is not None:
                each.copy_(value)


def _linear_places(model: nn.Module, maps: Mapping[str, nn.Module], batch: Batch, taken: set[str]) -> list[Place]:
    """Places of two linear layers: a source and its only reader. taken: layers that have a source already."""
    found = []
    paths = {id(each): name for name, each in maps.items()}
    for block, (args, kwargs) in _calls(model, batch).items():
        inside = {paths[id(each)]: each for each in block.modules() if id(each) in paths}
        order: list[str] = []
        inputs: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name, each in inside.items():
                hooks.enter_context(each.register_forward_pre_hook(_noting(name, order, inputs)))
            reference = first_tensor(block(*args, **kwargs))
        counts, used = Counter(order), set[str]()
        for n, reader in enumerate(order):
            if reader in taken or counts[reader] > 1 or reference is None:
                continue
            width = matrix_shape(maps[reader])[1]
            before = [each for each in order[:n] if matrix_shape(maps[each])[0] == width and counts[each] == 1]
            for source in reversed(before[-CANDIDATES:]):
                given = inputs[reader], reference
                if source not in used and _follows(block, args, kwargs, maps[source], maps[reader], *given):
                    found.append(Place(source, (reader,)))
                    used.add(source)
                    break
    return found


def _noting(name: str, order: list[str], inputs: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that notes the order of calls, and each layer's input."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:  # a layer that is called by keyword is no place
            order.append(name)
            inputs[name] = args[0]

    return hook


def _calls(model: nn.Module, batch: Batch) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of the first call of every block."""
    found: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(module, (args, kwargs))

    with ExitStack() as hooks:
        for unit in find_blocks(model):
            hooks.enter_context(unit.module.register_forward_pre_hook(note, with_kwargs=True))
        call(model, batch)
    return found


def _follows(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    source: nn.Module,
    reader: nn.Module,
    x: Tensor,
    reference: Tensor,
) -> bool:
    """Whether the channels of x, the reader's input, are the source's, and the block reads these nowhere else."""
    s = torch.exp2(torch.randint(-3, 4, (x.shape[-1],), generator=torch.Generator().manual_seed(0))).to(x)
    seen: list[Tensor] = []

    def undo(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(given[0])
        return (given[0] / s, *given[1:])

    with ExitStack() as hooks:
        hooks.enter_context(source.register_forward_hook(lambda _module, _args, y: y * s))
        hooks.enter_context(reader.register_forward_pre_hook(undo))
        y = first_tensor(block(*args, **kwargs))
    return y is not None and len(seen) == 1 and _alike(seen[0], x * s) and _alike(y, reference)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).float().norm() <= TOLERANCE * b.float().norm()) and bool(b.any())


@dataclass
class Sizes:
    """How large the channels of a place's activations are."""

    total: Tensor  # Σ |x| over tokens, [channels]
    largest: Tensor  # max |x|, [channels]
    tokens: int

    @property
    def mean(self) -> Tensor:
        return self.total / self.tokens


@torch.no_grad()
def sizes_of(model: nn.Module, places: Sequence[Place], work: Work) -> dict[Place, Sizes]:
    """The sizes of the samples' activations at each place, in float32. Places that no sample reaches are left out."""
    found: dict[Place, Sizes] = {}

    def note(place: Place) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float().abs()  # [tokens, channels]
            if len(x) == 0:
                return
            total, largest = x.sum(0), x.amax(0)
            known = found.get(place)
            if known is None:
                found[place] = Sizes(total, largest, len(x))
            else:
                known.total += total
                known.largest = torch.maximum(known.largest, largest)
                known.tokens += len(x)

        return hook

    with ExitStack() as hooks:
        for place in places:
            hooks.enter_context(model.get_submodule(place.readers[0]).register_forward_pre_hook(note(place)))
        for n, sample in enumerate(work.samples):
            call(model, without_target(sample))
            work.progress("measuring the channels", n + 1, len(work.samples))
    return found


@torch.no_grad()
def fold(model: nn.Module, place: Place, s: Tensor) -> None:
    """Divide the source's channels by s [channels] > 0 and multiply the readers' columns by it, in place."""
    source = model.get_submodule(place.source)
    weight, bias = source.weight, getattr(source, "bias", None)
    assert isinstance(weight, Tensor)
    if is_linear_map(source):
        W = weight_matrix(source)
        set_weight_matrix(source, W.to(s.dtype) / s[:, None])
    else:
        gain = gain_of(source) or 0
        weight.copy_((weight.to(s.dtype) + gain) / s - gain)
    if isinstance(bias, Tensor):
        bias.copy_(bias.to(s.dtype) / s)
    for name in place.readers:
        reader = model.get_submodule(name)
        set_weight_matrix(reader, weight_matrix(reader).to(s.dtype) * s)
