"""Shapes into tokens and back: autoencoders of closed meshes, trained on clouds and signed distances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tersor.data.shapes import ShapeConfig, load_shapes
from tersor.errors import TersorError
from tersor.models.config import checked_config
from tersor.tasks.task import Sets, Task
from tersor.train.objectives import Batch


def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The model's own losses; target (B, Q) are the signed distances of the query points, negative inside."""
    losses: dict[str, Tensor] = model(batch["points"], batch["query_points"], distances=batch["target"])
    return losses


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    config = checked_config(ShapeConfig, table, "data")
    tokens = getattr(model.config, "num_tokens", 1)
    if config.points < tokens:
        raise TersorError(
            f"the clouds have {config.points} points, the model makes {tokens} tokens of them; raise data.points"
        )
    return Sets(load_shapes(data, config), load_shapes(validation, config) if validation else None)


TASK = Task(objective, load_data)
