"""Classes of a graph's nodes: cross-entropy, and for a user's own graph the class of every node in a table.

LargeGT samples neighbours of the nodes of a batch; GraphGPS and MPNN+VN with head=inductive_node see the whole graph in
each step (tersor.tasks.graph_predict hands it over to here). MPNN+VN has its virtual node in the data then.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.data.graphs import NODES, PARTS, Graph, GraphConfig, read_graph
from tersor.errors import TersorError
from tersor.files import replacing
from tersor.models.config import checked_config
from tersor.progress import Progress, silent
from tersor.tasks.graph_inputs import (
    SampledNodes,
    TokenSource,
    WholeGraph,
    check_sizes,
    class_names,
    flat_inputs,
    samples_neighbours,
)
from tersor.tasks.task import Sets, Task, name_of
from tersor.train.objectives import graph_prediction

BLOCK = 256  # nodes at a time, where neighbours are sampled


@dataclass(frozen=True)
class NodeClasses:
    """Which classes the nodes of a graph have."""

    path: Path
    table: Path  # says which node has which class
    names: tuple[str, ...]  # the commonest class first
    shares: tuple[float, ...]  # of the nodes, in the order of `names`
    accuracy: Mapping[str, float]  # of the parts whose labels the graph's files hold

    def line(self) -> str:
        told = ", ".join(f"{name} {100 * share:.1f}%" for name, share in zip(self.names, self.shares, strict=True))
        right = "".join(f"; {part} accuracy {100 * share:.1f}%" for part, share in self.accuracy.items())
        return f"{self.path}: {told}{right}; {self.table}"

    def as_dict(self) -> dict[str, Any]:
        files = {"path": str(self.path), "table": str(self.table)}
        return files | {"classes": list(self.names), "shares": list(self.shares), "accuracy": dict(self.accuracy)}


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    config = graph_config(validation, table)
    graph = _one_graph(data, config)
    check_sizes(model, graph, data)
    if graph.y.dtype != torch.int64 or not len(graph.parts["train"]):
        raise TersorError(f"{data} has no nodes with labels to train on")
    for part in PARTS:
        numbers = graph.parts.get(part, torch.zeros(0, dtype=torch.int64))
        if (graph.y[numbers] < 0).any():
            raise TersorError(f"{data}: node {int(numbers[graph.y[numbers] < 0][0])} of the {part} part has no label")
    if samples_neighbours(model):
        source = TokenSource(model.config, graph, config.seed)
        make: Any = lambda nodes: SampledNodes(source, nodes, graph.y)  # noqa: E731
    else:
        inputs = flat_inputs(model, graph)
        make = lambda nodes: WholeGraph(inputs, nodes, graph.y)  # noqa: E731
    sets = [make(graph.parts[part]) if len(graph.parts.get(part, ())) else None for part in PARTS]
    preprocessing = settings_of(config) | {"features": graph.x.shape[1]}
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
) -> NodeClasses:
    assert out is not None
    graph = _one_graph(path, saved_config(settings))
    check_features(settings, graph)
    logits = node_logits(module, graph, settings.get("seed", 0))
    shares, numbers = logits.softmax(1).max(1)
    names = class_names(labels, logits.shape[1])
    file = out / f"{name_of(path)}_nodes.csv"
    called = graph.names or tuple(map(str, range(len(graph.x))))
    with replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as text:
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("node", "class", "probability"))
        rows.writerows(
            (node, names[number], f"{share:.4f}")
            for node, number, share in zip(called, numbers.tolist(), shares.tolist(), strict=True)
        )
    found, counts = torch.unique(numbers, return_counts=True)
    order = counts.argsort(descending=True, stable=True).tolist()
    common = tuple(names[int(found[n])] for n in order)
    return NodeClasses(
        path, file, common, tuple(float(counts[n]) / len(numbers) for n in order), _accuracy(graph, numbers, names)
    )


def node_logits(module: nn.Module, graph: Graph, seed: int = 0) -> Tensor:
    """[N, classes] of a graph that was read as the model wants it."""
    first, config = next(module.parameters()), module.config
    if not samples_neighbours(module):
        return _moved(module, flat_inputs(module, graph), first)[: len(graph.x)]  # without a virtual node's row
    source = TokenSource(config, graph, seed)
    return torch.cat(
        [_moved(module, source.inputs(nodes), first) for nodes in torch.split(torch.arange(len(graph.x)), BLOCK)]
    )


def _moved(module: nn.Module, inputs: Mapping[str, Tensor], first: Tensor) -> Tensor:
    there = {k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    result: Tensor = module(**there)
    return result.float().cpu()


def _accuracy(graph: Graph, numbers: Tensor, names: list[str]) -> dict[str, float]:
    """Of each part of the graph's files; its classes are matched with the model's by name, where both have names."""
    if graph.y.dtype != torch.int64:
        return {}
    y = numbered_as(graph, names)
    right = {}
    for part, nodes in graph.parts.items():
        known = nodes[graph.y[nodes] >= 0]
        if len(known):
            right[part] = float((numbers[known] == y[known]).float().mean())
    return right


def numbered_as(graph: Graph, names: list[str]) -> Tensor:
    """The graph's classes by the numbers of the model's, which are called `names`; -2 where it has none of the name."""
    if not graph.classes:
        return graph.y
    ours = {name: n for n, name in enumerate(names)}
    turned = torch.tensor([ours.get(name, -2) for name in graph.classes] + [-1])
    return turned[graph.y]


def _one_graph(path: Path, config: GraphConfig) -> Graph:
    graph = read_graph(path, config)
    if graph.batch is not None:
        raise TersorError(f"{path} holds {graph.count} graphs to predict, the model classifies the nodes of one")
    return graph


def graph_config(validation: Path | None, table: Mapping[str, Any]) -> GraphConfig:
    if validation is not None:
        raise TersorError("a graph says itself which part is for validation; leave --validation out")
    return checked_config(GraphConfig, table, "data")


def settings_of(config: GraphConfig) -> dict[str, Any]:
    """What predictions on other graphs need to know."""
    return {"undirected": config.undirected, "normalize": config.normalize, "seed": config.seed}


def saved_config(settings: Mapping[str, Any]) -> GraphConfig:
    known = {field.name for field in dataclasses.fields(GraphConfig)}
    return checked_config(GraphConfig, {k: v for k, v in settings.items() if k in known}, "preprocessor_config.json")


def check_features(settings: Mapping[str, Any], graph: Graph) -> None:
    wanted = settings.get("features", graph.x.shape[1])
    if graph.x.shape[1] != wanted:
        raise TersorError(f"the graph has {graph.x.shape[1]} features a node, the model was trained with {wanted}")


TASK = Task(
    graph_prediction,
    load_data,
    predict,
    frozenset({".npz"}),
    marker=NODES,
    writes=("_nodes.csv",),
    normalises=False,
    evaluated_on="graph",
)
