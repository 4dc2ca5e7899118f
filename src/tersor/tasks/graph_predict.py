"""Classes, labels or numbers of whole graphs, and of a graph's nodes where the model's head gives one row a node."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.data.graphs import NODES, PARTS, Graph, read_graph
from tersor.errors import TersorError
from tersor.files import replacing
from tersor.progress import Progress, silent
from tersor.tasks import node_classify
from tersor.tasks.graph_inputs import ManyGraphs, check_sizes, class_names, flat_inputs
from tersor.tasks.node_classify import NodeClasses, check_features, graph_config, saved_config, settings_of
from tersor.tasks.task import Sets, Task, name_of
from tersor.train.objectives import graph_prediction

BLOCK = 64  # graphs at a time


@dataclass(frozen=True)
class GraphTable:
    """How many graphs were predicted, and the file that says what."""

    path: Path
    table: Path
    graphs: int

    def line(self) -> str:
        return f"{self.path}: {self.graphs} graphs; {self.table}"

    def as_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "table": str(self.table), "graphs": self.graphs}


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    config = graph_config(validation, table)
    graph = read_graph(data, config)
    check_sizes(model, graph, data)
    if model.config.head == "inductive_node":
        return node_classify.load_data(model, data, validation, table)
    used = torch.cat([graph.parts[part] for part in PARTS if part in graph.parts])
    if graph.y.dtype == torch.int64 and (graph.y[used] < 0).any():
        raise TersorError(f"{data}: graph {int(used[graph.y[used] < 0][0])} has no label, but a part that it is of")
    inputs = flat_inputs(model, graph)
    sets = [
        ManyGraphs(model, inputs, graph.parts[part], graph.y) if len(graph.parts.get(part, ())) else None
        for part in PARTS
    ]
    if sets[0] is None:
        raise TersorError(f"{data} has no graphs to train on")
    kind = {torch.int64: "class", torch.bool: "labels"}.get(graph.y.dtype, "numbers")
    preprocessing = settings_of(config) | {"features": graph.x.shape[1], "target": kind}
    return Sets(sets[0], sets[1], sets[2], preprocessing=preprocessing, labels=graph.classes)


@torch.no_grad()
def predict(
    module: nn.Module,
    path: Path,
    *,
    settings: Mapping[str, Any],
    labels: Mapping[int, str],
    out: Path | None,
    reference: Path | None,
    progress: Progress = silent,
) -> GraphTable | NodeClasses:
    assert out is not None
    config: Any = module.config
    if config.head == "inductive_node":
        return node_classify.predict(module, path, settings=settings, labels=labels, out=out, reference=reference)
    graph = read_graph(path, saved_config(settings))
    if graph.batch is None:
        raise TersorError(f"{path} is one graph, the model predicts many; their nodes need `graph` (batch in an .npz)")
    check_features(settings, graph)
    logits = graph_logits(module, graph)
    names = class_names(labels, logits.shape[1])
    kind = settings.get("target", "numbers")
    file = out / f"{name_of(path)}_graphs.csv"
    called = graph.names or tuple(map(str, range(graph.count)))
    with replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as text:
        rows = csv.writer(text, lineterminator="\n")
        if kind == "class":
            shares, numbers = logits.softmax(1).max(1)
            rows.writerow(("graph", "class", "probability"))
            pairs = zip(called, numbers.tolist(), shares.tolist(), strict=True)
            rows.writerows((name, names[number], f"{share:.4f}") for name, number, share in pairs)
        else:
            shown = logits.sigmoid() if kind == "labels" else logits
            rows.writerow(("graph", *names))
            rows.writerows((name, *(f"{x:.6g}" for x in row)) for name, row in zip(called, shown.tolist(), strict=True))
    return GraphTable(path, file, graph.count)


def graph_logits(module: nn.Module, graph: Graph) -> Tensor:
    """[graphs, outputs] of many graphs that were read as the model wants them."""
    first = next(module.parameters())
    data = ManyGraphs(module, flat_inputs(module, graph), torch.arange(graph.count), torch.zeros(graph.count))
    results = []
    for numbers in torch.split(torch.arange(graph.count), BLOCK):
        batch = data.collate([data[int(number)] for number in numbers])
        del batch["target"]
        there = {k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}
        results.append(module(**there).float().cpu())
    return torch.cat(results)


TASK = Task(
    graph_prediction,
    load_data,
    predict,
    frozenset({".npz"}),
    marker=NODES,
    writes=("_graphs.csv", "_nodes.csv"),
    normalises=False,
    evaluated_on="graph",
)
