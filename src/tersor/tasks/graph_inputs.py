"""What a model of graphs is given of a graph: checked against its config, with the encodings that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tersor.data.graph_encodings import (
    electrostatic_encoding,
    heat_kernel_encoding,
    laplacian_eigenpairs,
    random_walk_encoding,
)
from tersor.data.graphs import Graph
from tersor.data.large_graph import Neighbours, hop_features, hop_tokens, sample_nodes, spectral_positions
from tersor.data.seeding import mixed_seed
from tersor.data.virtual_node import add_virtual_node
from tersor.errors import TersorError

MOST_NODES = 20_000  # of a graph with encodings, which are computed with dense matrices
MOST_NEIGHBOURS = 1000  # of a node, beyond which LargeGT's samples are thinned at random
Inputs = dict[str, Tensor]


def samples_neighbours(model: Any) -> bool:
    """Whether the model is given sampled tokens of single nodes (LargeGT), and not whole graphs."""
    return hasattr(model.config, "sample_node_len")


def flat_inputs(model: Any, graph: Graph) -> Inputs:
    """x, edge_index, edge_attr, batch and the statistics of encodings, as GraphGPS takes them."""
    config = model.config
    kind, *encodings = config.node_encoder.split("+")
    encodings = [kind, *encodings] if hasattr(config, f"posenc_{kind}") else encodings
    batch = torch.zeros(len(graph.x), dtype=torch.int64) if graph.batch is None else graph.batch
    inputs = {
        "x": _raw(graph.x, kind, _columns(model, "atom", config.node_types), "node"),
        "edge_index": graph.edge_index,
        "edge_attr": _raw(graph.edge_attr, config.edge_encoder, _columns(model, "bond", config.edge_types), "edge"),
        "batch": batch,
    }
    found: dict[str, list[Tensor]] = {}
    counts = batch.bincount()
    if encodings and int(counts.max()) > MOST_NODES:
        raise TersorError(
            f"{', '.join(encodings)} of a graph with {int(counts.max())} nodes: at most {MOST_NODES} are encoded; "
            "--set model.node_encoder without encodings"
        )
    first = 0
    of_edge = batch[graph.edge_index[0]]
    for number, n in enumerate(counts.tolist() if encodings else ()):
        edges = graph.edge_index[:, of_edge == number] - first
        first += n
        for name in encodings:
            for key, value in _statistics(name, getattr(config, f"posenc_{name}"), edges, n).items():
                found.setdefault(key, []).append(value)
    inputs |= {key: torch.cat(values) for key, values in found.items()}
    return with_virtual_node(inputs) if graph.batch is None and has_virtual_node(model) else inputs


def has_virtual_node(model: Any) -> bool:
    """Whether the model expects a virtual node in the data: MPNN+VN's form C."""
    return getattr(model.config, "virtual_node", "") == "none"


def with_virtual_node(inputs: Inputs) -> Inputs:
    """One graph's inputs with one node more: the last one, joined to all others."""
    made = add_virtual_node(inputs["x"], inputs["edge_index"], inputs["edge_attr"])
    one = {name: torch.cat((value, value.new_zeros(1, *value.shape[1:]))) for name, value in inputs.items()
           if name not in ("x", "edge_index", "edge_attr")}  # fmt: skip
    return one | {"x": made.x, "edge_index": made.edge_index, "edge_attr": made.edge_attr}


def _statistics(name: str, encoding: Any, edges: Tensor, n: int) -> Inputs:
    if name == "RWSE":
        return {"pestat_RWSE": random_walk_encoding(edges, n, range(1, encoding.statistics + 1))}
    if name == "HKdiagSE":
        return {"pestat_HKdiagSE": heat_kernel_encoding(edges, n, range(1, encoding.statistics + 1))}
    if name == "ElstaticSE":
        return {"pestat_ElstaticSE": electrostatic_encoding(edges, n)}
    values, vectors = laplacian_eigenpairs(edges, n, encoding.max_freqs)
    return {"EigVals": values, "EigVecs": vectors} if name == "LapPE" else {"eigvals_sn": values, "eigvecs_sn": vectors}


def _columns(model: Any, of: str, types: int) -> list[int]:
    """How many categories the model knows of each column of features."""
    lists = [part for name, part in model.named_modules() if name.endswith(f"{of}_embedding_list")]
    return [embedding.num_embeddings for part in lists for embedding in part] or [types]


def _raw(values: Tensor, kind: str, types: list[int], what: str) -> Tensor:
    """Features as an encoder takes them: numbers, or categories. Without features of edges there is category 0 alone."""
    if kind not in ("Atom", "Bond") and not kind.startswith("TypeDict"):
        return values
    values = values if values.shape[1] else values.new_zeros(len(values), len(types))
    for column, count in zip(values.T, types, strict=True):
        if len(column) and not (column.min() >= 0 and column.max() < count and bool((column == column.round()).all())):
            raise TersorError(
                f"{what}s have categories {column.min():g} to {column.max():g}, the model takes whole numbers 0 to {count - 1}; "
                f"--set model.{what}_encoder=Linear{what.capitalize()} takes numbers"
            )
    return values.long() if kind in ("Atom", "Bond") else values[:, 0].long()


def check_sizes(model: Any, graph: Graph, path: object) -> None:
    """Raise TersorError, naming all options to set, where the model's sizes are not the graph's."""
    config, told, wanted = model.config, [], {}
    features, edge_features, outputs = graph.x.shape[1], graph.edge_attr.shape[1], graph.width()
    kind = "classes" if graph.y.dtype == torch.int64 else "targets"
    if samples_neighbours(model):
        sizes = {"num_nodes": (len(graph.x), "nodes"), "in_channels": (features, "features a node")}
        sizes["out_channels"] = (outputs, kind)
    else:
        sizes = {"dim_out": (outputs, kind)}
        parts = config.node_encoder.split("+")
        if parts[0] == "LinearNode" or hasattr(config, f"posenc_{parts[0]}"):
            sizes["dim_in"] = (features, "features a node")
        elif features != {"Atom": 9}.get(parts[0], 1):
            told.append(f"{features} features a node (model: {parts[0]})")
            wanted["node_encoder"] = "+".join(["LinearNode", *parts[1:]])
            sizes["dim_in"] = (features, "features a node")
        if config.edge_encoder == "LinearEdge":
            sizes["dim_edge"] = (edge_features, "features an edge")
        elif edge_features not in (0, 3 if config.edge_encoder == "Bond" else 1):
            told.append(f"{edge_features} features an edge (model: {config.edge_encoder})")
            wanted |= {"edge_encoder": "LinearEdge", "dim_edge": str(edge_features)}
        if config.edge_encoder == "LinearEdge" and not edge_features:
            del sizes["dim_edge"]
            told.append("no features of edges (model: LinearEdge)")
            wanted["edge_encoder"] = "TypeDictEdge"
        head = "inductive_node" if graph.batch is None else "graph"
        if (config.head == "inductive_node") != (graph.batch is None):
            told.append(f"{graph.kind}s to predict (model: head {config.head})")
            wanted["head"] = head
        if graph.batch is None and getattr(config, "virtual_node", "") == "updating":
            told.append("a single graph, of which BatchNorm cannot train an updating virtual node")
            wanted["virtual_node"] = "none"  # the node is in the data then
    for name, (found, what) in sizes.items():
        has = getattr(config, name)
        # more outputs than classes do no harm
        if has != found and not (name in ("dim_out", "out_channels") and kind == "classes" and has > found):
            told.append(f"{found} {what} (model: {has})")
            wanted[name] = str(found)
    if told:
        settings = " ".join(f"--set model.{name}={value}" for name, value in wanted.items())
        raise TersorError(f"{path} has {', '.join(told)}; {settings}")


class WholeGraph(Dataset[Inputs]):
    """Item i: the i-th node that is asked for. A batch is the whole graph, and the numbers of the nodes that are meant."""

    def __init__(self, inputs: Inputs, nodes: Tensor, y: Tensor) -> None:
        self.inputs, self.nodes, self.y = inputs, nodes, y
        self.validated_at_once = max(1, len(nodes))

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, index: int) -> Inputs:
        node = self.nodes[index]
        return {"rows": node, "target": self.y[node]}

    def collate(self, items: list[Inputs]) -> Inputs:
        return self.inputs | {name: torch.stack([item[name] for item in items]) for name in items[0]}


class SampledNodes(Dataset[Inputs]):
    """Item i: the i-th node that is asked for. A batch is these nodes' tokens, sampled anew in every epoch."""

    def __init__(self, source: TokenSource, nodes: Tensor, y: Tensor) -> None:
        self.source, self.nodes, self.y, self.epoch = source, nodes, y, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, index: int) -> Inputs:
        return {"node": self.nodes[index]}

    def collate(self, items: list[Inputs]) -> Inputs:
        nodes = torch.stack([item["node"] for item in items])
        return self.source.inputs(nodes, self.epoch) | {"target": self.y[nodes]}


class TokenSource:
    """LargeGT's inputs of any nodes of a graph: features, those of two hops, and a fixed embedding, computed once."""

    def __init__(self, config: Any, graph: Graph, seed: int) -> None:
        self.length, self.seed = config.sample_node_len, seed
        self.graph = Neighbours.of(graph.edge_index, len(graph.x))
        self.features = (graph.x, *hop_features(self.graph, graph.x, 2))
        self.positions = spectral_positions(self.graph, config.global_dim, seed=seed)

    def inputs(self, nodes: Tensor, epoch: int = 0) -> Inputs:
        random = np.random.default_rng(mixed_seed(self.seed, epoch, int(nodes[0])))
        ids = sample_nodes(self.graph, nodes, self.length, random, most=MOST_NEIGHBOURS)
        seq = hop_tokens(ids, self.features)
        return {"seq": seq, "x": self.features[0][nodes], "pos_enc": self.positions[nodes], "batch_idx": nodes}


class ManyGraphs(Dataset[Inputs]):
    """Item i: the i-th graph that is asked for; a batch is flat, as torch_geometric's are."""

    def __init__(self, model: Any, inputs: Inputs, graphs: Tensor, y: Tensor) -> None:
        self.graphs, self.y, self.virtual = graphs, y, has_virtual_node(model)
        counts = inputs["batch"].bincount()
        ends = counts.cumsum(0)
        order = inputs["batch"][inputs["edge_index"][0]].argsort(stable=True)  # edges, by their graphs
        edges = inputs["edge_index"][:, order]
        edge_ends = inputs["batch"][edges[0]].bincount(minlength=len(counts)).cumsum(0)
        self.nodes = [slice(int(end - count), int(end)) for end, count in zip(ends, counts, strict=True)]
        begins = torch.cat((edge_ends.new_zeros(1), edge_ends[:-1]))
        self.edges = [slice(int(a), int(b)) for a, b in zip(begins, edge_ends, strict=True)]
        self.inputs = inputs | {"edge_index": edges, "edge_attr": inputs["edge_attr"][order]}

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, index: int) -> Inputs:
        graph = int(self.graphs[index])
        nodes, edges = self.nodes[graph], self.edges[graph]
        one = {
            name: value[nodes]
            for name, value in self.inputs.items()
            if name not in ("edge_index", "edge_attr", "batch")
        }
        one["edge_index"] = self.inputs["edge_index"][:, edges] - nodes.start
        one["edge_attr"] = self.inputs["edge_attr"][edges]
        return (with_virtual_node(one) if self.virtual else one) | {"target": self.y[graph]}

    @staticmethod
    def collate(items: list[Inputs]) -> Inputs:
        sizes = torch.tensor([len(item["x"]) for item in items])
        starts = sizes.cumsum(0) - sizes
        edges = [item["edge_index"] + start for item, start in zip(items, starts, strict=True)]
        names = [name for name in items[0] if name not in ("edge_index", "target")]
        return {
            **{name: torch.cat([item[name] for item in items]) for name in names},
            "edge_index": torch.cat(edges, 1),
            "batch": torch.repeat_interleave(torch.arange(len(items)), sizes),
            "target": torch.stack([item["target"] for item in items]),
        }


def class_names(labels: Mapping[int, str], count: int) -> list[str]:
    return [labels.get(number, f"class {number}") for number in range(count)]
