"""Statistics of the inputs that the linear maps of one block see, gathered by running the block on every sample."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.hessian import Hessian
from tersor.calibrate.lockstep import Call
from tersor.calibrate.routing import Rows
from tersor.errors import NotFiniteError
from tersor.layers.experts import ExpertCalls, ExpertMap
from tersor.layers.linear_map import LinearMap, columns_of, input_matrix, window_of


def kind_of(name: str) -> str:
    """A layer's name without its numbers: the same for all blocks and all experts."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def is_expert(name: str) -> bool:
    """Whether a layer is one of the many experts of a mixture (`mlp.experts.7.down_proj`, `mlp.experts.down_proj.7`)."""
    return re.search(r"(^|\.)experts?\.([^.]+\.)?\d+(\.|$)", name) is not None


@dataclass(frozen=True)
class CallOrder:
    """In which order a block calls its linear maps."""

    groups: list[list[str]]  # names in the order of their calls; maps with the same input are one group
    once: bool  # whether no map is called twice in a pass


def call_order(linears: Mapping[str, LinearMap], calls: Sequence[Call]) -> CallOrder:
    """The order in which a block calls its linear maps.

    Experts whose names differ only in their number count as one kind, so all experts' first maps share a group. Maps that no call
    reaches form the last group.
    """
    groups: list[list[str]] = []
    group_of_kind: dict[str, list[str]] = {}
    seen: Counter[str] = Counter()
    previous: list[Any] = [None]  # kept alive, so that a later tensor cannot be mistaken for it

    def note(name: str, x: Tensor) -> None:
        seen[name] += 1
        if seen[name] == 1:
            kind = kind_of(name) if is_expert(name) else name
            if kind not in group_of_kind:
                if previous[0] is not x:
                    groups.append([])
                group_of_kind[kind] = groups[-1]
            group_of_kind[kind].append(name)
        previous[0] = x

    once = True
    for call in calls:
        seen_before = set(seen)
        seen.clear()
        seen.update(dict.fromkeys(seen_before, 1))
        with watch_inputs(linears, note):
            call.run()
        once = once and all(count <= (2 if name in seen_before else 1) for name, count in seen.items())
        if len(seen) == len(linears):
            break
    unreached: list[str] = []
    for name in linears:
        if name not in seen:
            group_of_kind.get(kind_of(name), unreached).append(name)
    place = {name: n for n, name in enumerate(linears)}  # the order of experts would depend on the samples
    ordered = [sorted(group, key=lambda name: place[name]) for group in groups]
    return CallOrder([*ordered, unreached] if unreached else ordered, once)


class _Enough(Exception):  # noqa: N818
    """A pass has given its last statistic, so the rest of the block need not run."""


def gather_hessians(
    linears: Mapping[str, LinearMap],
    calls: Sequence[Call],
    rows: Rows,
    *,
    once: bool,
    dtype: torch.dtype = torch.float32,
    original: Original | None = None,
) -> dict[str, Hessian]:
    """The Hessian of each linear map over all calls. Maps that are called with one tensor (queries, keys, values) share one,
    and so do convolutions that read the same windows of it. A map that no call reaches has a Hessian of zeros.

    rows: how much an expert's rows count (see `routing.py`). once: no map is called twice in a pass, so a pass may end after the
    last map. original: what the inputs are compared with. Raises NotFiniteError, naming module and sample, where an input is not
    finite.
    """
    hessians: dict[str, Hessian] = {}
    owner: dict[str, str] = {}  # for each map, the first of those that share its Hessian
    previous: tuple[str, Any] = ("", None)
    reached: set[str] = set()
    together = 1  # how many samples the running call holds
    theirs: dict[str, list[Tensor]] = {}  # the inputs of the original's maps in that call

    def note(name: str, x: Tensor) -> None:
        nonlocal previous
        if name not in owner:
            alike = previous[1] is x and window_of(linears[previous[0]]) == window_of(linears[name])
            owner[name] = owner[previous[0]] if alike else name
            if owner[name] == name:
                hessians[name] = Hessian(columns_of(linears[name]), device=x.device, dtype=dtype)
        if owner[name] == name:
            matrix, samples = input_matrix(linears[name], x)
            hessians[name].add(matrix, samples if x.dim() > 2 else together, _weights(linears[name], rows))
            if original is not None and not is_expert(name):
                exact = theirs[name].pop(0) if theirs.get(name) else matrix
                # Where a model dropped other tokens, rows do not correspond, and count as equal.
                hessians[name].compare(exact if exact.shape == matrix.shape else matrix, matrix)
        previous = (name, x)
        reached.add(name)
        if once and len(reached) == len(linears):
            raise _Enough

    for n, call in enumerate(calls):
        theirs = {} if original is None else original.inputs(linears, n, once=once)
        reached.clear()
        previous, together = ("", None), len(call.numbers)
        with watch_inputs(linears, note), suppress(_Enough):
            call.run()
    for name, hessian in hessians.items():
        if not bool(torch.isfinite(hessian.total).all()):
            raise NotFiniteError(_where_not_finite(name, linears[name], calls))
    return {
        name: hessians[owner[name]] if name in owner else Hessian(columns_of(module), dtype=dtype)
        for name, module in linears.items()
    }


@dataclass(frozen=True)
class Original:
    """A block as it was."""

    module: nn.Module
    weights: Mapping[str, Tensor]
    calls: Sequence[Call | None]  # one for each call of the compressed model; None: its samples took another path

    def inputs(self, linears: Mapping[str, LinearMap], n: int, *, once: bool) -> dict[str, list[Tensor]]:
        """The inputs of each map [tokens, columns] in call n, in order. Experts are left out, because the router may choose other
        tokens for them."""
        maps = {name: each for name, each in linears.items() if not is_expert(name)}
        found: dict[str, list[Tensor]] = {}
        previous: tuple[str, Any] = ("", None)

        def note(name: str, x: Tensor) -> None:
            nonlocal previous
            alike = previous[1] is x and window_of(maps[previous[0]]) == window_of(maps[name])
            # A copy, because a model may go on to change its tensor in place.
            seen = found[previous[0]][-1] if alike else input_matrix(maps[name], x)[0].clone()
            found.setdefault(name, []).append(seen)
            previous = (name, x)
            if once and len(found) == len(maps):
                raise _Enough

        call = self.calls[n]
        if call is not None and maps:
            with self.weights_in_place(), watch_inputs(maps, note), suppress(_Enough):
                call.run()
        return found

    @contextmanager
    def weights_in_place(self) -> Iterator[None]:
        """Meanwhile the block computes as it did at first."""
        parameters = dict(self.module.named_parameters())
        now = {name: each.data for name, each in parameters.items()}
        try:
            for name, each in parameters.items():
                each.data = self.weights[name]
            yield
        finally:
            for name, each in parameters.items():
                each.data = now[name]


def gather_means(
    experts: Mapping[str, ExpertMap], calls: Sequence[Call], rows: Rows, dtype: torch.dtype
) -> dict[str, Hessian]:
    """One Hessian for each kind of expert, over the tokens of all experts of that kind."""
    means = {
        kind_of(name): Hessian(columns_of(each), device=each.weight.device, dtype=dtype)
        for name, each in experts.items()
    }

    def note(name: str, x: Tensor) -> None:
        means[kind_of(name)].add(*input_matrix(experts[name], x), _weights(experts[name], rows))

    with watch_inputs(experts, note):
        for call in calls:
            call.run()
    return means


def _weights(module: LinearMap, rows: Rows) -> Tensor | None:
    return rows.weights if isinstance(module, ExpertMap) else None


@contextmanager
def watch_inputs(linears: Mapping[str, LinearMap], note: Any) -> Iterator[None]:
    """Call note(name, input) whenever a linear map is about to run."""

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(name, args[0] if args else next(iter(kwargs.values())))

        return before

    modules = {name: each for name, each in linears.items() if isinstance(each, nn.Module)}
    experts = {name: each for name, each in linears.items() if isinstance(each, ExpertMap)}
    with ExitStack() as hooks, ExpertCalls(experts, note) if experts else nullcontext():
        for name, each in modules.items():
            hooks.enter_context(each.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield


def _where_not_finite(name: str, module: LinearMap, calls: Sequence[Call]) -> str:
    found: list[int] = []
    for call in calls:

        def look(_: str, x: Tensor, numbers: tuple[int, ...] = call.numbers) -> None:
            finite = torch.isfinite(x).flatten(1).all(1).tolist()
            if not all(finite):
                found.append(numbers[finite.index(False) if len(finite) == len(numbers) else 0])

        with watch_inputs({name: module}, look):
            call.run()
        if found:
            return f"the input of {name} is not finite (NaN or Inf) in calibration sample {found[0]}"
    return f"the Hessian of {name} overflowed although its inputs are finite; use --dtype float32"
