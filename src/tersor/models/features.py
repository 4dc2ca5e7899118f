"""A vision model as a backbone: the maps of its stages in place of its answer, as timm's `features_only` gives them.

    backbone = tersor.models.create("smt_t", features_only=True, out_indices=(1, 2, 3))
    maps = backbone(image)                         # [(B, C, H, W), ...], one for each chosen stage
    backbone.feature_info.channels()               # [128, 256, 512]
    backbone.feature_info.reduction()              # [8, 16, 32], pixels of the image to one of the map

It serves every model whose `features(input)` returns maps. Channels and reductions are measured, by one run of the model on its
own example; modules that get no gradient in it (the head, the last norm) are removed, so every parameter left learns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError


@dataclass(frozen=True)
class Stage:
    """One map of a backbone."""

    index: int  # among all maps of the model, from 0
    channels: int
    reduction: int  # pixels of the image, to a side, for one place of the map


class FeatureInfo(tuple[Stage, ...]):
    """The stages of a backbone's maps, in their order."""

    def channels(self) -> list[int]:
        return [each.channels for each in self]

    def reduction(self) -> list[int]:
        return [each.reduction for each in self]


class Backbone(nn.Module):
    """image (B, C, H, W) -> the chosen maps [(B, channels, about H / reduction, about W / reduction), ...]; clips likewise.

    model: is taken over, and loses the modules that its maps do not need. out_indices: the maps wanted, negative ones counted
    from the end; None: all. Raises TersorError where the model has no maps, or no map of that index.
    """

    def __init__(self, model: nn.Module, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.model = model
        maps, image = _measured(model)
        chosen = range(len(maps)) if out_indices is None else out_indices
        in_range = isinstance(chosen, Sequence) and all(
            isinstance(each, int) and -len(maps) <= each < len(maps) for each in chosen
        )
        if not chosen or not in_range:
            told = tuple(chosen) if isinstance(chosen, list | tuple) else repr(chosen)
            raise TersorError(
                f"out_indices {told}: {type(model).__name__} has {len(maps)} maps, 0 to {len(maps) - 1}; give a list of numbers"
            )
        places = [each % len(maps) for each in chosen]
        self.feature_info = FeatureInfo(
            Stage(index, maps[index].shape[1], _reduction(image, maps[index])) for index in places
        )

    def forward(self, *inputs: Tensor, **named: Tensor) -> list[Tensor]:
        """The model's own input: `image`, or `clip`."""
        maps: list[Tensor] = self.model.features(*inputs, *named.values())  # type: ignore[operator]
        return [maps[each.index] for each in self.feature_info]

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.model.example_inputs(batch_size)  # type: ignore[operator]
        return found


def _measured(model: Any) -> tuple[list[Tensor], Tensor]:
    """The maps of the model's example, and that example. What does not bear on them is removed from the model."""
    was_training = model.training
    with torch.random.fork_rng(), torch.enable_grad():
        example = list(model.example_inputs(1).values())
        image = example[0]
        maps = model.eval().features(image) if len(example) == 1 and hasattr(model, "features") else None
        model.train(was_training)
        if not isinstance(maps, list) or any(each.dim() < 4 for each in maps):
            raise TersorError(
                f"features_only: {type(model).__name__} has no stages whose maps it could give; shvit, smt and others have"
            )
        learning = [each for each in model.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(sum(each.sum() for each in maps), learning, allow_unused=True)
    used = {id(each) for each, gradient in zip(learning, gradients, strict=True) if gradient is not None}
    _remove_unused(model, used)
    return [each.detach() for each in maps], image


def _remove_unused(module: nn.Module, used: set[int]) -> None:
    """Remove the modules below that have no parameter in `used`, by id; not those in lists, whose places count."""
    for name, child in list(module.named_children()):
        parameters = list(child.parameters())
        if parameters and not any(id(each) in used for each in parameters):
            if not isinstance(module, nn.Sequential | nn.ModuleList):
                delattr(module, name)
        else:
            _remove_unused(child, used)


def _reduction(image: Tensor, found: Tensor) -> int:
    """Strides are powers of two; maps of sides that they do not divide are rounded up or down."""
    return int(2 ** round(math.log2(image.shape[-1] / found.shape[-1])))
