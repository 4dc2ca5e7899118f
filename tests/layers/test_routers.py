"""Routers are told by what stands beside the experts, whatever they are called."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from tersor.layers.routers import router_maps

WIDE, EXPERTS = 32, 6


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.up, self.down = nn.Parameter(torch.zeros(EXPERTS, 16, WIDE)), nn.Parameter(torch.zeros(EXPERTS, WIDE, 16))


class Counting(nn.Module):
    """Experts whose products cannot be seen, which say how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.total_experts = EXPERTS


def layer(experts: nn.Module, **others: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(block=nn.Sequential(OrderedDict(**others, many=experts))))


def linear(outputs: int, inputs: int = WIDE) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def listed() -> nn.ModuleList:
    return nn.ModuleList(linear(WIDE) for _ in range(EXPERTS))


def test_one_output_an_expert_is_a_router_beside_each_kind_of_experts() -> None:
    for experts in (Stacked(), Counting(), listed(), nn.ModuleDict({f"e{n}": each for n, each in enumerate(listed())})):
        assert router_maps(layer(experts, chooser=linear(EXPERTS))) == {"block.chooser"}


def test_a_small_network_is_one_with_all_its_maps() -> None:
    network = nn.Sequential(linear(8), nn.GELU(), linear(EXPERTS + 1, 8))  # one more for an expert that does nothing
    assert router_maps(layer(Stacked(), chooser=network)) == {"block.chooser.0", "block.chooser.2"}


def test_the_weight_of_a_shared_expert_is_kept() -> None:
    assert router_maps(layer(Stacked(), weigh=linear(1), shared=linear(WIDE))) == {"block.weigh"}


def test_what_else_stands_beside_experts_is_none() -> None:
    attention = nn.Sequential(OrderedDict(q=linear(EXPERTS), k=linear(EXPERTS), o=linear(WIDE)))
    shared = nn.Sequential(linear(EXPERTS), nn.GELU(), linear(WIDE, EXPERTS))
    as_wide = nn.Sequential(OrderedDict(q=linear(EXPERTS, EXPERTS), o=linear(EXPERTS, EXPERTS)))
    assert router_maps(layer(Stacked(), attention=attention, shared=shared, narrow=linear(EXPERTS - 1))) == set()
    assert router_maps(layer(Stacked(), attention=as_wide)) == set()


def test_models_without_experts_have_none() -> None:
    layers = nn.ModuleList(nn.Sequential(linear(64), linear(WIDE, 64)) for _ in range(2))
    assert router_maps(nn.ModuleDict({"layers": layers, "norm": nn.LayerNorm(WIDE)})) == set()
