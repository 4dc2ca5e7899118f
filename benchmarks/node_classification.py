"""GraphGPS, MPNN+VN and LargeGT on Cora and Citeseer, beside a GCN of torch_geometric trained in the same run.

    TERSOR_DATA=../shared/data python benchmarks/node_classification.py cora citeseer         # some minutes of one core

Planetoid's public split: 20 labelled nodes a class to train on, 500 to validate, 1,000 to test. Features are words, 0 or 1. Test
accuracy in %, at the best validation loss, mean and standard deviation of seeds 0 and 1. "GPTQ": of seed 0, all linear maps in 8
and 4 bits, a grid for each row, calibrated on the graph itself.

All are trained by tersor's trainer with AdamW, weight decay 0.05 and a constant rate. GCN: two layers, 64 wide, dropout 0.5
(Kipf and Welling). MPNN+VN: two GCN layers, the virtual node in the data. Both at 0.01, at most 100 steps of all training
nodes, validated every 5, patience 6. GraphGPS: one layer, GCN beside attention over all nodes, no encodings; the same with
patience 20, attention's dropout 0.5, and 0.8 of the words dropped in each step: without that it learns the training nodes by
heart. LargeGT: 20 sampled nodes, 64 codes, 16 spectral positions, batches of 28 at 0.001 (published: 0.001), 100 epochs,
validated every 5, patience 20. Widths are 64, dropout 0.5; sizes were not tuned. GraphGPS on Citeseer was stopped after seed 0,
which had 55.4.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import DATA, kept_numbers, processor, versions, write_numbers, write_table
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
import tersor.models
from tersor.data.graphs import Graph, read_graph
from tersor.tasks.graph_inputs import SampledNodes, TokenSource, WholeGraph, flat_inputs, samples_neighbours
from tersor.train.config import TrainConfig
from tersor.train.objectives import graph_prediction
from tersor.train.trainer import train, validate

SEEDS = (0, 1)


class GCN(nn.Module):
    """torch_geometric's layers, called as our models are."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.first, self.second = GCNConv(inputs, 64), GCNConv(64, classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = F.dropout(self.first(F.dropout(x, 0.5, self.training), edge_index).relu(), 0.5, self.training)
        return self.second(x, edge_index)


def build(name: str, graph: Graph) -> nn.Module:
    inputs, classes = graph.x.shape[1], graph.width()
    nodes: dict[str, Any] = {
        "node_encoder": "LinearNode",
        "head": "inductive_node",
        "dim_in": inputs,
        "dim_out": classes,
    }
    if name == "GCN":
        return GCN(inputs, classes)
    if name == "GraphGPS":
        gps: dict[str, Any] = {"layer_type": "GCN+Transformer", "layers": 1, "dropout": 0.5, "attn_dropout": 0.5}
        model = tersor.models.create("graphgps", **nodes, **gps)
        model.register_forward_pre_hook(without_words, with_kwargs=True)
        return model
    if name == "MPNN+VN":
        return tersor.models.create(
            "mpnn_vn", **nodes, layer_type="gcnconv", layers_mp=2, dropout=0.5, virtual_node="none"
        )
    sizes = {"num_nodes": len(graph.x), "in_channels": inputs, "out_channels": classes, "hidden_channels": 64}
    return tersor.models.create("largegt", **sizes, global_dim=16, num_centroids=64, sample_node_len=20)


def without_words(model: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """In training most words of each node are hidden."""
    return args, {**inputs, "x": F.dropout(inputs["x"], 0.8, model.training)}


def data_of(model: nn.Module, graph: Graph, seed: int) -> dict[str, Any]:
    if isinstance(model, GCN):
        inputs = {"x": graph.x, "edge_index": graph.edge_index}
    elif samples_neighbours(model):
        source = TokenSource(model.config, graph, seed)
        return {part: SampledNodes(source, nodes, graph.y) for part, nodes in graph.parts.items()}
    else:
        inputs = flat_inputs(model, graph)
    return {part: WholeGraph(inputs, nodes, graph.y) for part, nodes in graph.parts.items()}


def accuracy(model: nn.Module, test: Any) -> float:
    return 100 * validate(model, test, graph_prediction, batch_size=250)["accuracy"]


def quantized(model: nn.Module, sets: dict[str, Any], bits: int) -> float:
    training = sets["train"]
    batch = training.collate([training[n] for n in range(len(training))])
    del batch["target"]
    rows = batch.pop("rows", None)
    assert rows is None or len(rows)
    method = tersor.GPTQ(bits=bits, group_size=-1)
    result = tersor.compress(model.eval(), method, calibration=[batch], format="compressed-tensors")
    return accuracy(result.model, sets["test"])


def measure(graph: Graph, keep: Callable[[dict[str, Any]], None]) -> None:
    """keep: called with all rows whenever one more is done."""
    rows: dict[str, Any] = {}
    for name in ("GCN", "MPNN+VN", "LargeGT", "GraphGPS"):
        found, started = [], time.process_time()
        for seed in SEEDS:
            torch.manual_seed(seed)
            model = build(name, graph)
            sets = data_of(model, graph, seed)
            size = 28 if name == "LargeGT" else len(sets["train"])
            slow = name in ("LargeGT", "GraphGPS")
            steps: dict[str, Any] = {
                "epochs": 100,
                "validate_every": 5 * (len(sets["train"]) // size),
                "patience": 20 if slow else 6,
                "batch_size": size,
                "lr": 0.001 if name == "LargeGT" else 0.01,
            }
            recipe = TrainConfig(**steps, weight_decay=0.05, lr_schedule="constant", seed=seed, device="cpu")
            with tempfile.TemporaryDirectory() as out:
                ran = train(model, sets["train"], objective=graph_prediction, out=out, config=recipe,
                            validation=sets["validation"])  # fmt: skip
            found.append(accuracy(model, sets["test"]))
            if seed == 0:
                first, sets_of_first = model, sets
            print(
                name,
                seed,
                f"{found[-1]:.1f}",
                f"best step {ran.best_step}",
                f"{time.process_time() - started:.0f} s",
                flush=True,
            )
        seconds = (time.process_time() - started) / len(SEEDS)
        row = {"mean": statistics.mean(found), "spread": statistics.stdev(found), "seconds": seconds, "first": found[0]}
        if name != "GCN":
            row |= {str(bits): quantized(first, sets_of_first, bits) for bits in (8, 4)}
        print(name, row, flush=True)
        rows[name] = row
        keep(rows)


def table(results: dict[str, Any]) -> str:
    described = (__doc__ or "").strip()
    lines = ["# Classes of nodes", "", described[described.index("Planetoid") :], ""]
    for title, rows in results.items():
        lines += [
            f"## {title.capitalize()}",
            "",
            "| model | test accuracy | seconds of training | seed 0 | GPTQ, 8 bits | GPTQ, 4 bits |",
        ]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for name, row in rows["rows"].items():
            bits = " | ".join(f"{row[b]:.1f}" if b in row else "" for b in ("8", "4"))
            label = "GCN, torch_geometric" if name == "GCN" else name
            lines += [
                f"| {label} | {row['mean']:.1f} ± {row['spread']:.1f} | {row['seconds']:.0f} | {row['first']:.1f} | {bits} |"
            ]
        lines += ["", f"{rows['machine']}", ""]
    return "\n".join([*lines, "`python benchmarks/node_classification.py cora citeseer`", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", nargs="*", default=["cora"], help="cora, citeseer")
    chosen = parser.parse_args().graphs
    torch.set_num_threads(1)
    for name in chosen:
        started = time.process_time()

        def keep(rows: dict[str, Any], name: str = name, started: float = started) -> None:
            machine = (
                f"{(time.process_time() - started) / 60:.1f} minutes of one processor core, "
                f"{processor()}, {platform.system()}; {versions()}."
            )
            results = kept_numbers("node_classification")
            results[name] = {"rows": rows, "machine": machine}
            write_numbers("node_classification", results)
            write_table("node_classification", table(results))

        graph = read_graph(DATA / "graphs" / f"{name}.npz")
        measure(replace(graph, x=(graph.x > 0).float()), keep)


if __name__ == "__main__":
    main()
