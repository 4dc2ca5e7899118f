"""Records what the layers of a transformer compute on one batch, and can replace it by another model's signals.

`find_places` runs the model once and watches it; names do not matter. It finds the repeated blocks, and each attention: a
product of activations, a softmax of it, a second product. For each attention it finds the linear layers that queries and keys,
and values, come from, the layer that reads the context, and the first norm after that one. `run` runs the model, or another of
the same structure, and returns the `Signals`. With an intervention some of them are replaced by a teacher's while the model
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tersor.calibrate.batches import Batch, call
from tersor.calibrate.blocks import find_units
from tersor.errors import TersorError
from tersor.layers.linear_map import linear_maps
from tersor.layers.products import FUSED, PRODUCTS, attention, is_activation

Intervention = Literal["", "output", "context", "map"]
SOFTMAX = (torch.softmax, Tensor.softmax, nn.functional.softmax)


@dataclass
class Signals:
    """What one run computed. `hidden` and `attended` have one entry per block, the other lists one per attention."""

    hidden: list[Tensor] = field(default_factory=list)  # [B, N, D]; in front stands the input of the first block
    # [B, N, D], of the first norm after the attention's last layer.
    attended: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)  # [B, heads, N, N], before the softmax
    maps: list[Tensor] = field(default_factory=list)  # [B, heads, N, N], after it
    contexts: list[Tensor] = field(default_factory=list)  # map · v, [B, heads, N, d]
    outputs: list[Tensor] = field(default_factory=list)  # of the layer that reads the context
    output: Any = None  # what the model returns


@dataclass(frozen=True)
class AttentionPlace:
    """The parts around one attention, by name."""

    queries: dict[str, Tensor]  # the layers that queries and keys come from, each with a mask [out] of these outputs
    values: dict[str, Tensor]  # the same for the values
    output: str  # the layer that reads the context
    norm: str | None  # the first one after that
    sites: tuple[str, str]  # the innermost modules that compute the two products


@dataclass(frozen=True)
class Places:
    blocks: list[str]
    attentions: list[AttentionPlace]


class Watch(TorchFunctionMode):
    """Sees all attentions while it is active, in the order in which they run.

    on_map(scores, map) and on_context(context) return what is used instead of the map and of the context. on_operands(first,
    second, where) is called for each product of an attention and only looks. place: says where in the model a product runs.
    """

    def __init__(
        self,
        on_map: Callable[[Tensor, Tensor], Tensor],
        on_context: Callable[[Tensor], Tensor],
        on_operands: Callable[[Tensor, Tensor, str], None] = lambda a, b, where: None,
        place: Callable[[], str] = str,
    ) -> None:
        super().__init__()
        self.on_map, self.on_context, self.on_operands, self.place = on_map, on_context, on_operands, place
        self.first: tuple[Tensor, Tensor, str] | None = None  # the last product, as long as no softmax has followed
        self.shape = torch.Size()  # of its result
        self.map: torch.Size | None = None  # the shape of a map that waits for its product

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is FUSED:
            with self:
                return attention(torch.matmul, *args, **kwargs)
        result = func(*args, **kwargs)
        if func in SOFTMAX and self.first is not None and args and args[0].shape == self.shape:
            self.on_operands(*self.first)
            self.first, self.map = None, result.shape
            return self.on_map(args[0], result)
        at = PRODUCTS.get(func)
        if at is None or len(args) != at + 2 or not all(map(is_activation, args[at:])):
            return result
        if self.map is not None and args[at].shape == self.map:
            self.on_operands(args[at], args[at + 1], self.place())
            self.map = None
            return self.on_context(result)
        self.first, self.shape = (args[at], args[at + 1], self.place()), result.shape
        return result


def find_places(model: nn.Module, probe: Batch) -> Places:
    """Raises TersorError where no attention is found, or a layer of one runs several times."""
    called: list[str] = []  # linear layers and norms, in the order of running
    running: list[str] = []
    leaves: dict[str, Tensor] = {}  # outputs of linear layers, each detached from its input
    sites: list[str] = []
    operands: list[Tensor] = []  # for each attention q, kᵀ, map, v
    place_of: list[int] = []  # how many of `called` had run when an attention was complete
    maps = linear_maps(model)

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, _args: Any, result: Any) -> Any:
            running.pop()
            if name not in maps:
                if type(module).__name__.endswith("Norm"):
                    called.append(name)
                return None
            called.append(name)
            leaves[name] = result.detach().requires_grad_(True)
            return leaves[name]

        return hook

    def look(a: Tensor, b: Tensor, where: str) -> None:
        sites.append(where)
        operands.extend((a, b))

    def complete(context: Tensor) -> Tensor:
        place_of.append(len(called))
        return context

    with ExitStack() as stack, torch.enable_grad():
        for name, module in model.named_modules():
            for handle in (module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))):
                stack.callback(handle.remove)
        stack.enter_context(Watch(lambda scores, found: found, complete, look, lambda: running[-1]))
        call(model, probe)
    if not place_of:
        raise TersorError(
            f"{type(model).__name__} computes no attention (a product of activations, its softmax, a second product), so a "
            "teacher's cannot be put in its place; intervention=none trains without"
        )
    found = []
    for n, at in enumerate(place_of):
        q, k, _, v = operands[4 * n : 4 * n + 4]
        after = called[at:]
        output = next((name for name in after if name in maps), "")
        norm = next((name for name in after[after.index(output) :] if name not in maps), None) if output else None
        mine = {**_sources((q, k), leaves), **_sources((v,), leaves)}
        again = next((name for name in [*mine, output] if called.count(name) > 1), None)
        if again is not None or not output or not mine:
            what = f"{again} runs several times" if again else "its layers cannot be told apart"
            raise TersorError(f"attention {n} of {type(model).__name__}: {what}; intervention=none trains without")
        found.append(
            AttentionPlace(
                _sources((q, k), leaves), _sources((v,), leaves), output, norm, (sites[2 * n], sites[2 * n + 1])
            )
        )
    return Places([unit.name for unit in find_units(model) if unit.is_block], found)


def _sources(operands: Sequence[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers whose outputs reach the operands directly, without another layer between, and which of their outputs do."""
    if not any(each.requires_grad for each in operands):
        return {}
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        parts = [
            (each * torch.randn(each.shape, generator=generator).to(each)).sum()
            for each in operands
            if each.requires_grad
        ]
        total = torch.stack(parts).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {
        name: (gradient.flatten(0, -2) != 0).any(0)
        for name, gradient in zip(leaves, gradients, strict=True)
        if gradient is not None
    }


@dataclass(frozen=True)
class Parts:
    """A model's modules at its places. Wrappers may change names; the modules stay the same."""

    model: nn.Module
    blocks: list[nn.Module]
    attentions: list[dict[str, Any]]


def parts_of(model: nn.Module, places: Places) -> Parts:
    found = []
    for place in places.attentions:
        cut = {
            name: {model.get_submodule(each): mask for each, mask in of.items()}
            for name, of in (("queries", place.queries), ("values", place.values))
        }
        norm = None if place.norm is None else model.get_submodule(place.norm)
        found.append({**cut, "output": model.get_submodule(place.output), "norm": norm})
    return Parts(model, [model.get_submodule(name) for name in places.blocks], found)


def run(parts: Parts, batch: Batch, *, kind: Intervention = "", teacher: Signals | None = None) -> Signals:
    """Run the model and return its signals. kind: use the teacher's maps, contexts or outputs in place of the model's own.

    The model's own are still computed and returned. What an intervention makes useless gets no gradient: the hidden states get
    none through queries and keys ("map"), and none through values either ("context", "output").
    """
    signals = Signals()

    def on_map(scores: Tensor, found: Tensor) -> Tensor:
        signals.scores.append(scores)
        signals.maps.append(found)
        return teacher.maps[len(signals.maps) - 1].to(found) if kind == "map" and teacher else found

    def on_context(context: Tensor) -> Tensor:
        signals.contexts.append(context)
        return teacher.contexts[len(signals.contexts) - 1].to(context) if kind == "context" and teacher else context

    def on_output(_module: nn.Module, _args: Any, result: Tensor) -> Tensor | None:
        signals.outputs.append(result)
        return teacher.outputs[len(signals.outputs) - 1].to(result) if kind == "output" and teacher else None

    def first_hidden(_module: nn.Module, args: Any, kwargs: Any) -> None:
        signals.hidden.append(args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor)))

    def hidden(_module: nn.Module, _args: Any, result: Any) -> None:
        signals.hidden.append(result if isinstance(result, Tensor) else result[0])

    with ExitStack() as stack:
        handles = [each.register_forward_hook(hidden) for each in parts.blocks]
        if parts.blocks:
            handles.append(parts.blocks[0].register_forward_pre_hook(first_hidden, with_kwargs=True))
        for place in parts.attentions:
            handles.append(place["output"].register_forward_hook(on_output))
            if place["norm"] is not None:
                handles.append(place["norm"].register_forward_hook(lambda _m, _a, y: signals.attended.append(y)))
            if kind:
                handles += _cut_off(place["queries"], {} if kind == "map" else place["values"])
        for handle in handles:
            stack.callback(handle.remove)
        stack.enter_context(Watch(on_map, on_context))
        signals.output = call(parts.model, batch)
    return signals


def _cut_off(*sources: dict[nn.Module, Tensor]) -> list[Any]:
    """Stop the gradient at the inputs of these layers, where it comes from the given outputs."""
    masks: dict[nn.Module, Tensor] = {}
    for each in sources:
        for module, mask in each.items():
            masks[module] = masks[module] | mask if module in masks else mask
    handles = []
    for module, mask in masks.items():
        if bool(mask.all()):
            handles.append(module.register_forward_pre_hook(lambda _m, args: (args[0].detach(), *args[1:])))
        else:

            def hook(layer: nn.Module, args: Any, result: Tensor, mask: Tensor = mask) -> Tensor:
                return torch.where(mask, layer.forward(args[0].detach()), result)

            handles.append(module.register_forward_hook(hook))
    return handles
