"""What a compressed checkpoint says of itself in its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tersor.compress.plan import Plan
from tersor.compress.recipe import Recipe
from tersor.formats.layout import Description, Layout, QuantizationConfig
from tersor.layers.linear_map import embeddings
from tersor.methods.method import BlockMethod
from tersor.version import __version__


def quantization_config(
    model: nn.Module, plan: Plan, recipe: Recipe, layout: Layout, published: Callable[[str], list[str]]
) -> dict[str, Any]:
    """The `quantization_config`: the grids of most layers, the layers that differ, and those that are left as they are. Each
    layer stands under its names on disk and under its module's name, because readers look for one or the other. Empty where the
    format needs no config.

    published: gives the names of a linear map on disk.
    """
    if layout.config is None:
        return {}
    methods = [recipe.method, *plan.methods.values()]
    base = next(grids for each in methods if isinstance(each, BlockMethod) and (grids := each.quantization()))
    modules = dict(model.named_modules())
    dense = _dense_linears(model, plan)  # no other name is known of these

    def names_of(name: str) -> list[str]:
        stems = [] if name in dense else published(name)
        return list(dict.fromkeys([*stems, *([name] if name in modules else [])]))

    tables = {name for name, found in plan.all_linears().items() if isinstance(found, nn.Embedding)}
    changed = {
        stem: grids
        for name, method in plan.methods.items()
        if (grids := method.quantization())
        and grids != base
        and name not in tables  # the plan made sure that a table has the recipe's grids
        for stem in names_of(name)
    }
    other_tables = [name for name in embeddings(model) if tables and name not in tables]
    ignored = [stem for name in dict.fromkeys((*plan.left, *other_tables, *dense)) for stem in names_of(name)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inside = [name for name in plan.left if any(name.startswith(f"{unit.name}.") for unit in plan.blocks)]
    unit = next(unit for unit in plan.blocks if plan.linears[unit.name])
    return layout.config(
        Description(
            grids=base,
            overrides=changed,
            ignored=ignored,
            ignored_in_blocks=[stem for name in inside for stem in names_of(name)],
            in_block=[name.removeprefix(f"{unit.name}.") for name in plan.linears[unit.name]],
            head=any(found is head for found in plan.all_linears().values()),
            embeddings=bool(tables),
            version=__version__,
        )
    )


def described_by(layout: Layout, config: Mapping[str, Any]) -> QuantizationConfig:
    """What a config made here says of each layer."""
    return layout.parse(config) if config else QuantizationConfig(layout.name, bits=0, group_size=-1, sym=True)


def _dense_linears(model: nn.Module, plan: Plan) -> list[str]:
    """Modules that readers take for linear layers and tersor does not, such as the output map inside nn.MultiheadAttention."""
    known = {*plan.left, *plan.all_linears()}
    return [
        name
        for name, each in model.named_modules()
        if name not in known and any(kind.__name__ == "Linear" for kind in type(each).__mro__)
    ]
