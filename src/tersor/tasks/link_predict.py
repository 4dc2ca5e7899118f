"""Link prediction: which pairs of nodes meet next, from a file of events; binary cross-entropy with false pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.data.dynamic_graphs import LinkBatches, read_events, split_stream
from tersor.errors import TersorError
from tersor.models.config import checked_config
from tersor.tasks.task import Sets, Task
from tersor.train.objectives import link_prediction


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    window: int = 4096  # events that are seen of the past
    batch: int = 200  # events in a row that are predicted from one window
    negatives: str = "random"  # or "historical": false pairs are such as have met
    hidden: float = 0.0  # share of nodes that training does not see
    seed: int = 0


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    if validation is not None:
        raise TersorError("a stream of events has a validation part of its own; leave --validation out")
    config = checked_config(LinkConfig, table, "data")
    stream = read_events(data)
    wanted, found = model.config.edge_dim, stream.features.shape[1]
    if wanted != found:
        raise TersorError(
            f"{data} has {found} numbers an event, the model takes {wanted}; --set model.edge_dim={found}"
        )
    if model.config.head != "link":
        raise TersorError(f"the model's head is {model.config.head!r}; pairs need --set model.head=link")
    parts = split_stream(stream, hidden=config.hidden, seed=config.seed)
    shared: dict[str, Any] = {
        "window": config.window,
        "batch": config.batch,
        "node_dim": model.config.node_dim,
        "negatives": config.negatives,
        "seed": config.seed,
    }
    validating, testing = (LinkBatches(stream, begin=a, end=b, **shared) for a, b in (parts.validation, parts.test))
    return Sets(LinkBatches(parts.train, **shared), validating, testing, preprocessing={"window": config.window})


TASK = Task(link_prediction, load_data, kept=("window",), normalises=False)
