"""When a setting does something. It depends on the methods, on how the model is given, and on other settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.calibrate.batches import is_text
from tersor.calibrate.images import is_images
from tersor.methods.method import BlockMethod, Method, ModelMethod, PackedMethod

if TYPE_CHECKING:
    from tersor.compress.settings import Settings


@dataclass(frozen=True)
class Asked:
    """What decides which settings do something."""

    settings: Settings
    methods: Sequence[Method]  # of all steps and rules
    by_name: bool  # whether the model is given by its name, or as a module in memory


@dataclass(frozen=True)
class Condition:
    """When a setting does something."""

    holds: Callable[[Asked], bool]
    counts_for: str  # what the user reads, after "it counts for"


def _any_block_method(asked: Asked, wanted: Callable[[BlockMethod], bool] = lambda method: True) -> bool:
    return any(isinstance(each, BlockMethod) and wanted(each) for each in asked.methods)


def _images(asked: Asked) -> bool:
    given = asked.settings.calibration
    return isinstance(given, str | Path) and is_images(given)


BLOCKS = Condition(_any_block_method, "methods that go block by block")
PACKING = Condition(
    lambda asked: _any_block_method(asked, lambda each: each.quantization() is not None), "methods that pack weights"
)
STATISTICS = Condition(
    lambda asked: _any_block_method(asked, lambda each: each.needs_samples),
    "methods that go block by block and look at samples",
)
PACKED = Condition(
    lambda asked: any(isinstance(each, PackedMethod) for each in asked.methods), "methods that tune a packed model"
)
LAYERS = Condition(
    lambda asked: any(not isinstance(each, ModelMethod) or each.takes_layers for each in asked.methods),
    "methods that work on single layers",
)
SAMPLES = Condition(
    lambda asked: asked.settings.calibration is not None or any(each.needs_samples for each in asked.methods),
    "methods that look at samples, and beside calibration",
)
TEXT = Condition(
    lambda asked: not _images(asked) and is_text(asked.settings.calibration),
    "samples that are text",
)
DRAWN = Condition(
    lambda asked: isinstance(asked.settings.calibration, str | Path | None),
    "samples that are drawn from a file or folder",
)
BY_NAME = Condition(lambda asked: asked.by_name, "a model given by name")
OUT = Condition(lambda asked: asked.settings.out is not None, "a result that is kept in out")
