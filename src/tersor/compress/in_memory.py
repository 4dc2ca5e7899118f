"""A module in memory as the source of a walk. The other source is `LazyModel`, a checkpoint that is loaded part by part."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tersor.checkpoint.lazy_model import LazyModel
from tersor.layers.experts import stored_name
from tersor.layers.linear_map import matrix_shape, packable_maps


class InMemory:
    """Answers what a walk asks of a `LazyModel`; there is nothing to load."""

    checkpoint = None

    def __init__(self, module: nn.Module) -> None:
        self.module, self.maps = module, packable_maps(module)
        first = next(module.parameters())
        self.dtype = self.stored_dtype = first.dtype
        self.device = first.device

    def load(self, module: nn.Module) -> None:
        pass

    def release(self, module: nn.Module) -> None:
        pass

    def load_rest(self, units: Iterable[nn.Module]) -> None:
        pass

    def published(self, linear: str) -> list[str]:
        return [stored_name(linear, self.maps[linear])]

    def named_pieces(self, linear: str) -> list[tuple[str, int]]:
        """Empty for a model of transformers: it looks for whole stacks under the module's own names."""
        known = not hasattr(self.module, "base_model_prefix")
        return [(name, matrix_shape(self.maps[linear])[0]) for name in self.published(linear) if known]


Source = LazyModel | InMemory
