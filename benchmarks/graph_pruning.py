"""A graph transformer on Cora with fewer nodes, heads, layers and weights: accuracy against operations.

    TERSOR_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/graph_pruning.py     # results/graph_pruning.md

Cora: one graph of 2,708 papers. The classes of the 1,208 papers outside the public validation and test sets are known while
training; accuracy is over the 1,000 test papers (95 % interval: about +-2.7 points). The model: GraphGPS of 3 layers
GIN+Transformer, width 32, 4 heads, dropout 0.5, 60 steps of training. Every other row starts from it and trains 30 steps more
while it prunes (updates every 2 steps; Adam, 5e-3), "trained on" without pruning. Nothing is chosen by accuracy.

Attention adds nothing measurable on this graph (see "no attention at all"), so the table shows what the axes save and that
pruning them does no harm here, not how much of attention a harder task could spare.

Operations: of the layers, two for each product of a weight that is not 0 and of attention. Weights that are 0 save operations
in this count, but no time. Speed: times faster than the unpruned model in the same run, CPU time, median of 5.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import DATA, machine, speed_ratios, write_table
from torch import Tensor

import tersor
import tersor.models
from tersor.methods.structure.gtsp import GTSP, layer_operations

ROWS: dict[str, dict[str, Any]] = {
    "trained on": {},
    "tokens 0.5": {"tokens": 0.5},
    "tokens 0.25": {"tokens": 0.25},
    "heads 0.5": {"heads": 0.5},
    "heads 0.25": {"heads": 0.25},
    "layers 0.33": {"layers": 0.33},
    "no attention at all": {"layers": 0.0},
    "weights 0.5": {"weights": 0.5},
    "weights 0.25": {"weights": 0.25},
    "tokens 0.7, heads 0.5, weights 0.5": {"tokens": 0.7, "heads": 0.5, "weights": 0.5},
    "tokens 0.5, heads 0.5, weights 0.5": {"tokens": 0.5, "heads": 0.5, "weights": 0.5},
}


def cora() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The training batch, with -100 for papers whose class is not known; all classes; the test papers."""
    with np.load(DATA / "graphs" / "cora.npz") as found:
        arrays = {name: torch.from_numpy(np.asarray(found[name]).astype(np.int64)) for name in found.files}
    counts = arrays["feature_indptr"].diff()
    x = torch.zeros(len(counts), int(arrays["num_features"]))
    x[torch.repeat_interleave(torch.arange(len(counts)), counts), arrays["feature_indices"]] = 1.0
    target = arrays["labels"].clone()
    target[torch.cat((arrays["valid_index"], arrays["test_index"]))] = -100
    batch = {
        "x": x / x.sum(1, keepdim=True).clamp(min=1),
        "edge_index": arrays["edge_index"],
        "edge_attr": torch.zeros(arrays["edge_index"].shape[1], 1),
        "batch": torch.zeros(len(x), dtype=torch.long),
        "target": target,
    }
    return batch, arrays["labels"], arrays["test_index"]


def main() -> None:
    batch, labels, test = cora()
    inputs = {name: value for name, value in batch.items() if name != "target"}

    def accuracy(model: Any) -> float:
        with torch.no_grad():
            return 100 * float((model(**inputs)[test].argmax(-1) == labels[test]).float().mean())

    def trained(model: Any, epochs: int, **options: Any) -> Any:
        method = GTSP(epochs=epochs, update_frequency=2, lr=5e-3, **options)
        return tersor.compress(model, method, calibration=[batch], format=None).model

    torch.manual_seed(0)
    start: Any = tersor.models.create(
        "graphgps",
        node_encoder="LinearNode",
        edge_encoder="LinearEdge",
        layer_type="GIN+Transformer",
        dim_in=batch["x"].shape[1],
        layers=3,
        dim_hidden=32,
        dropout=0.5,
        head="inductive_node",
        dim_out=7,
    )
    models = {"original": trained(start, 60)}
    for name, options in ROWS.items():
        models[name] = trained(models["original"], 30, **options)
        print(name, f"{accuracy(models[name]):.1f}", flush=True)
    speeds = speed_ratios({name: lambda m=m: m(**inputs) for name, m in models.items()}, turns=5)
    operations = {name: sum(layer_operations(m, [batch]).values()) for name, m in models.items()}
    lines = [
        "| what is kept | operations | parameters not 0 | accuracy % | speed |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, model in models.items():
        share = f"{100 * operations[name] / operations['original']:.0f}%"
        alive = f"{sum(int((p != 0).sum()) for p in model.layers.parameters()) / 1000:.1f} k"
        lines.append(f"| {name} | {share} | {alive} | {accuracy(model):.1f} | {speeds[name]:.2f} |")
    described = (__doc__ or "").strip()
    heading = ["# Pruning a graph transformer on Cora", "", described[described.index("Cora: one") :], ""]
    write_table(
        "graph_pruning",
        "\n".join([*heading, *lines, "", machine(), "`OMP_NUM_THREADS=1 python benchmarks/graph_pruning.py`", ""]),
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
