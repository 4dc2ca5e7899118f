"""Which experts of a mixture the calibration samples visit while statistics are gathered.

"as-is": those that the router chooses. "top-k:N": the N with the router's largest weights. "all": every token goes to every
expert, and counts there by the router's weight. What a block passes on is always computed as the model does it.

This relies on two things that all mixtures of transformers have in common: a module of the block keeps the number of chosen
experts as `top_k`, and fused experts are called with (hidden states, indices, weights). Some experts are called with the inputs
alone: these have been scaled by the router's weights before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.layers.experts import expert_maps


@dataclass(frozen=True)
class Routing:
    """Which experts of a mixture the samples visit."""

    experts: int | None = None  # how many a token visits; None: as many as the model says; 0: all, by weight


@dataclass
class Rows:
    """How much the rows of an expert's input count."""

    weights: Tensor | None = None  # of the expert that runs now, [tokens]; None: all count in full


def parse_routing(text: str) -> Routing:
    """A Routing from the user's word. Raises TersorError where it is none of the three."""
    if text == "as-is":
        return Routing()
    if text == "all":
        return Routing(0)
    number = text.removeprefix("top-k:")
    if number == text or not number.isdecimal() or int(number) < 1:
        raise TersorError(f"experts={text!r} is not one of as-is, top-k:N (such as top-k:4), all")
    return Routing(int(number))


def check_routing(name: str, block: nn.Module, routing: Routing) -> None:
    """Raise TersorError where the experts of a block that has some cannot be visited like that."""
    if routing.experts is None:
        return
    mixtures, routers = _mixtures(block), _routers(block)
    if not routers:
        raise TersorError(f"no module of {name} keeps the number of experts a token as `top_k`; use --experts as-is")
    if routing.experts == 0 and not mixtures:
        raise TersorError(
            f"the experts of {name} are modules in a list, which are not given the router's weights; use --experts top-k:N"
        )
    if routing.experts and mixtures:
        chosen, count = max(each.top_k for each in routers), min(each.num_experts for each in mixtures)
        if not chosen <= routing.experts <= count:
            raise TersorError(
                f"--experts top-k:{routing.experts}: {name} has {count} experts and sends a token to {chosen}; "
                f"give a number from {chosen} to {count}"
            )


@contextmanager
def routed(block: nn.Module, routing: Routing) -> Iterator[Rows]:
    """Meanwhile the block routes as asked. Yields the weights of the rows that the running expert is called with."""
    rows = Rows()
    mixtures = _mixtures(block) if routing.experts is not None else []
    routers = _routers(block) if routing.experts is not None else []
    before = [router.top_k for router in routers]
    forwards = [each.__dict__.get("forward") for each in mixtures]  # None but where something else has replaced it
    try:
        for router in routers:
            router.top_k = routing.experts or min(each.num_experts for each in mixtures)
        for each in mixtures if routing.experts == 0 else []:
            each.forward = _one_by_one(each, rows)
        yield rows
    finally:
        for router, top_k in zip(routers, before, strict=True):
            router.top_k = top_k
        for each, forward in zip(mixtures, forwards, strict=True):
            each.__dict__.pop("forward", None)
            if forward is not None:
                each.forward = forward


def _one_by_one(mixture: Any, rows: Rows) -> Callable[..., Tensor]:
    """A forward that sums over experts one after another, each on all tokens, so that the weights of its rows are known."""
    forward, count = mixture.forward, mixture.num_experts

    def run(hidden: Tensor, *choice: Tensor, **named: Tensor) -> Any:
        chosen = [*choice, *named.values()]
        if len(chosen) != 2:
            return forward(hidden, *choice, **named)  # its inputs are weighted already
        index, weights = chosen if not chosen[0].is_floating_point() else chosen[::-1]
        every = weights.new_zeros(len(index), count).scatter(1, index, weights)  # [tokens, experts]
        output: Any = 0
        try:
            for n in range(count):
                rows.weights = every[:, n]
                alone = torch.full_like(index[:, :1], n), torch.ones_like(weights[:, :1])
                output = output + forward(hidden, *alone) * every[:, n, None]
        finally:
            rows.weights = None
        return output

    return run


def _mixtures(block: nn.Module) -> list[Any]:
    return [each for each in block.modules() if expert_maps(each)]


def _routers(block: nn.Module) -> list[Any]:
    return [each for each in block.modules() if type(getattr(each, "top_k", None)) is int]
