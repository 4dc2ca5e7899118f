"""The parts of a mix of convolutions and attention, found by running it once: its layers in order, and its bridges.

A module that computes a softmax, or a product of two activations, is an attention. The transformer layer around it is the
nearest module above that lies in a list or a sequence and has other linear maps than the attention's (such as an MLP). There is
a bridge where the first layer of a transformer layer reads the output of a convolution outside all of them. The bridge consists
of that convolution and of the layers of the attention that run before its first product. For MobileViT these are the layers
that Q-HyViT's code lists by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tersor.calibrate.batches import Batch, call, first_tensor
from tersor.layers.products import Products

SOFTMAXES = frozenset({torch.softmax, Tensor.softmax, nn.functional.softmax})
LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Trace:
    """What ran."""

    events: list[tuple[str, str]]  # in order: the running module's name, and "map", "product" or "softmax"
    sizes: dict[str, int]  # how many numbers a part's operands and output have for one sample
    of_image: frozenset[str]  # the layers that read the model's own input

    def order(self, names: Iterable[str]) -> list[str]:
        """These names in the order in which they first ran. Those that did not run are left out."""
        wanted = set(names)
        return [
            name for name in dict.fromkeys(name for name, what in self.events if what != "softmax") if name in wanted
        ]


class _Softmaxes(TorchFunctionMode):
    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SOFTMAXES:
            self.found()
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def trace(model: nn.Module, maps: Iterable[str], probe: Batch) -> Trace:
    """Run the model on one sample. maps: the names of its linear maps and convolutions."""
    running: list[str] = []
    events: list[tuple[str, str]] = []
    sizes: dict[str, int] = {}
    given = {id(value) for value in (*probe.values(), *probe.get("args", ())) if isinstance(value, Tensor)}
    known, of_image = set(maps), set()

    def count(name: str, *tensors: Tensor) -> None:
        sizes[name] = sizes.get(name, 0) + sum(each.numel() for each in tensors)

    def entering(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            running.append(name)
            if name in known:
                events.append((name, "map"))
                if args and id(args[0]) in given:
                    of_image.add(name)

        return hook

    def leaving(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            running.pop()
            if name in known and args and isinstance(output, Tensor):
                count(name, args[0], output, output)

        return hook

    def product(_multiply: Any, a: Tensor, b: Tensor, output: Tensor) -> Tensor:
        events.append((running[-1], "product"))
        count(running[-1], a, b, output, output)
        return output

    with ExitStack() as watching:
        for name, module in model.named_modules():
            watching.enter_context(module.register_forward_pre_hook(entering(name)))
            watching.enter_context(module.register_forward_hook(leaving(name)))
        watching.enter_context(_Softmaxes(lambda: events.append((running[-1], "softmax"))))
        watching.enter_context(Products(lambda a, b: (a, b), product))
        call(model, probe)
    return Trace(events, sizes, frozenset(of_image))


def transformer_layers(model: nn.Module, events: Iterable[tuple[str, str]]) -> list[str]:
    """The names of the transformer layers around each attention; none where the model itself is one."""
    known = [name for name, what in events if what == "map"]
    found: dict[str, None] = {}
    for site in dict.fromkeys(name for name, what in events if what != "map"):
        name = site
        while name:
            parent = name.rpartition(".")[0]
            others = [each for each in known if _inside(each, name) and not _inside(each, site)]
            if others and isinstance(model.get_submodule(parent), LISTS):
                break
            if not parent:
                break
            name = parent
        if name:
            found[name] = None
    return list(found)


def bridges(model: nn.Module, traced: Trace) -> list[list[str]]:
    """The bridges in the order of running, each with the names of its layers."""
    layers = transformer_layers(model, traced.events)
    found: list[list[str]] = []
    before: str | None = None  # the layer that ran last, if it is in no transformer layer
    entry: list[str] = []  # of the bridge that is being crossed
    for name, what in traced.events:
        inside = any(_inside(name, layer) for layer in layers)
        if what != "map":
            entry, before = [], None
        elif not inside:
            before, entry = name, []
        elif before is not None:
            entry = [before, name]
            found.append(entry)
            before = None
        elif entry:
            entry.append(name)
    return found


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@torch.no_grad()
def fold_norms(model: nn.Module, maps: Mapping[str, nn.Module], probe: Batch) -> int:
    """Fold every BatchNorm that is the only reader of a convolution into it. Returns how many.

    The norm stays as the identity. A fold that would change the model's output is undone.
    """
    pairs = _normed(model, maps, probe)
    before = first_tensor(call(model, probe))
    saved = _fold(pairs)
    if _unchanged(before, first_tensor(call(model, probe))):
        return len(pairs)
    _restore(saved)
    folded = 0
    for pair in pairs:  # one of the convolutions has another reader: find out which
        saved = _fold([pair])
        if _unchanged(before, first_tensor(call(model, probe))):
            folded += 1
        else:
            _restore(saved)
    return folded


def _normed(model: nn.Module, maps: Mapping[str, nn.Module], probe: Batch) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    readers: dict[nn.Conv2d, list[nn.BatchNorm2d]] = {}
    calls: dict[nn.Module, int] = {}

    def gave(module: nn.Module, _args: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        outputs[id(output)] = (module, output)  # kept alive, so that no other tensor gets its id

    def reads(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        calls[module] = calls.get(module, 0) + 1
        if id(args[0]) in outputs:
            readers.setdefault(outputs[id(args[0])][0], []).append(module)

    with ExitStack() as hooks:
        for module in maps.values():
            if isinstance(module, nn.Conv2d):
                hooks.enter_context(module.register_forward_hook(gave))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                hooks.enter_context(module.register_forward_pre_hook(reads))
        call(model, probe)
    return [(conv, found[0]) for conv, found in readers.items() if len(found) == 1 and calls[found[0]] == 1]


Saved = list[tuple[nn.Module, str, Tensor | None]]


def _fold(pairs: Iterable[tuple[nn.Conv2d, nn.BatchNorm2d]]) -> Saved:
    """Fold, and return what was there before: (module, its parameter or buffer, the value)."""
    saved: Saved = []

    def put(module: nn.Module, name: str, value: Tensor) -> None:
        old = getattr(module, name)
        saved.append((module, name, old))
        parameter = name in module._parameters
        setattr(module, name, nn.Parameter(value.to(_dtype(module, old)), requires_grad=False) if parameter else value)

    for conv, norm in pairs:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, deviation = norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()
        gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
        beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
        bias = torch.zeros_like(mean) if conv.bias is None else conv.bias.double()
        put(conv, "weight", conv.weight.double() * (gamma / deviation).view(-1, 1, 1, 1))
        put(conv, "bias", beta + (bias - mean) * gamma / deviation)
        put(norm, "running_mean", torch.zeros_like(norm.running_mean))
        put(norm, "running_var", torch.full_like(norm.running_var, 1 - norm.eps))
        if norm.weight is not None:
            put(norm, "weight", torch.ones_like(norm.weight))
        if norm.bias is not None:
            put(norm, "bias", torch.zeros_like(norm.bias))
    return saved


def _dtype(module: nn.Module, old: Tensor | None) -> torch.dtype:
    like = module.weight if old is None else old
    assert isinstance(like, Tensor)
    return like.dtype


def _restore(saved: Saved) -> None:
    for module, name, value in reversed(saved):
        setattr(module, name, value)


def _unchanged(before: Tensor | None, after: Tensor | None) -> bool:
    if before is None or after is None:
        return False
    tolerance = 1e-3 if torch.finfo(before.dtype).eps < 1e-5 else 5e-2
    return bool((after - before).norm() <= tolerance * before.norm())
