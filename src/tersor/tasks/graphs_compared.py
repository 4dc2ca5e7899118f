"""What a compressed graph model lost: its classes, labels or numbers beside the original's, on the nodes or graphs of a file.

classes   accuracy, the share of equal classes, flips, KL(original || other) in nats
labels    the share of a graph's labels that are right, equal ones, flips, the mean squared difference of the logits
numbers   the mean absolute error, the mean squared difference
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.load import load
from tersor.checkpoint.preprocessing import saved_settings
from tersor.checkpoint.source import Openable, open_checkpoint
from tersor.data.graphs import Graph, read_graph
from tersor.devices import DType
from tersor.errors import TersorError
from tersor.evaluate.interval import Estimate, estimate
from tersor.evaluate.measures import kl_of
from tersor.tasks.graph_inputs import class_names
from tersor.tasks.graph_predict import graph_logits
from tersor.tasks.node_classify import check_features, node_logits, numbered_as, saved_config
from tersor.tasks.predict import labels_of


@dataclass(frozen=True)
class GraphsCompared:
    """± over nodes or graphs, of the change paired. Shares are between 0 and 1."""

    of: str  # nodes or graphs
    part: str  # of the file: test, or known where it names no test part
    count: int
    measure: str  # accuracy, right labels or MAE
    score: Estimate
    base_score: Estimate
    change: Estimate
    same: Estimate | None  # share of classes or labels that both give; None of numbers
    harmful_flips: float | None  # the original was right, the other is wrong
    helpful_flips: float | None
    apart: Estimate  # KL of classes in nats, else the mean squared difference

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def graphs_compared(
    model: Openable, against: Openable, data: Path, *, dtype: DType = "auto", device: str = "auto"
) -> GraphsCompared:
    """On the test part of the file, or all that is known where it has none; one model is in memory at a time. Raises TersorError
    where nothing is known, or the two predict unlike things."""
    model, against = open_checkpoint(model), open_checkpoint(against)
    settings = saved_settings(against)
    graph = read_graph(data, saved_config(settings))
    check_features(settings, graph)
    p, q = (_logits(load(each, dtype=dtype, device=device).eval(), graph, settings, data) for each in (against, model))
    if p.shape != q.shape:
        raise TersorError(
            f"the models predict {q.shape[1]} and {p.shape[1]} classes or numbers; --against is the model that was compressed"
        )
    y, kind = graph.y, {torch.int64: "class", torch.bool: "labels"}.get(graph.y.dtype, "numbers")
    if kind == "class":
        y = numbered_as(graph, class_names(labels_of(against.config), p.shape[1]))
    part, rows = _known(graph, y, data)
    of = "nodes" if len(p) == len(graph.x) and graph.batch is None else "graphs"
    return compared(p[rows].double(), q[rows].double(), y[rows], kind=kind, of=of, part=part)


def compared(p: Tensor, q: Tensor, y: Tensor, *, kind: str, of: str, part: str) -> GraphsCompared:
    """p, q: logits or numbers [count, outputs] of the original and the other; y: what is right."""
    if kind == "numbers":
        y = y.reshape(p.shape)
        base, other, same = (p - y).abs(), (q - y).abs(), None
    elif kind == "labels":
        base, other, same = (p > 0) == y, (q > 0) == y, (p > 0) == (q > 0)
    else:
        base, other, same = p.argmax(1) == y, q.argmax(1) == y, p.argmax(1) == q.argmax(1)
    flips = (
        (None, None)
        if same is None
        else (float((base & ~other).double().mean()), float((~base & other).double().mean()))
    )
    return GraphsCompared(
        of=of,
        part=part,
        count=len(p),
        measure={"class": "accuracy", "labels": "right labels", "numbers": "MAE"}[kind],
        score=estimate(other),
        base_score=estimate(base),
        change=estimate(other.double() - base.double()),
        same=None if same is None else estimate(same),
        harmful_flips=flips[0],
        helpful_flips=flips[1],
        apart=estimate(kl_of(p.log_softmax(1), q.log_softmax(1)) if kind == "class" else (p - q).square()),
    )


def _logits(module: nn.Module, graph: Graph, settings: Mapping[str, Any], data: Path) -> Tensor:
    config: Any = module.config
    many = getattr(config, "head", "inductive_node") != "inductive_node"  # LargeGT has no head to choose
    if many != (graph.batch is not None):
        raise TersorError(
            f"{data} is {'one graph' if many else 'many graphs'}, the model predicts {'many' if many else 'one'}"
        )
    found = graph_logits(module, graph) if many else node_logits(module, graph, settings.get("seed", 0))
    if not bool(torch.isfinite(found).all()):
        raise TersorError(
            f"{type(module).__name__} gives results that are not finite; nothing can be compared with them"
        )
    return found


def _known(graph: Graph, y: Tensor, data: Path) -> tuple[str, Tensor]:
    """The rows of the test part whose answer is known, or of all."""
    known = y >= 0 if y.dtype == torch.int64 else torch.isfinite(y.double()).reshape(len(y), -1).all(1)
    test = graph.parts.get("test", torch.zeros(0, dtype=torch.int64))
    for part, rows in (("test", test[known[test]]), ("known", known.nonzero()[:, 0])):
        if len(rows):
            return part, rows
    raise TersorError(f"{data} says of no node or graph what is right, so nothing can be compared")
