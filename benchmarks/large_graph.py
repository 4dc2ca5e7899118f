"""LargeGT on graphs of 0.1, 1 and 10 million nodes: neighbour sampling, training steps and memory.

    OMP_NUM_THREADS=1 python benchmarks/large_graph.py --write       kept in benchmarks/results/large_graph.md and .json
    ... --quick                 10,000 nodes alone: whether it runs, not what it is worth

tersor.data.large_graph generates power-law graphs (exponent 2.5) with ten directed edges a node, and 16 random features. Hop
features are computed once. Then batches of 64 random nodes: 50 nodes are drawn of each one's neighbours within two edges (at
most 64 of each node's edges are looked at) and their 150 tokens gathered; LargeGT (width 64, 1,024 codes, 16 random positions)
makes a training step. Seconds of processor time, one thread, medians of 15 batches; each size in a process of its own, whose peak
memory is shown. Labels are random: this says nothing of accuracy.

Peer: torch_geometric's NeighborLoader samples by pyg-lib or torch-sparse, which PyPI has no wheels of for this torch, so that it
does not run. DGL 2.1.0 samples here instead (its sampler in C++; its graphbolt does not load with this torch and is left out): 10
neighbours, then 5 of each, 60 nodes at most. That is another draw than LargeGT's, which lists the nodes within two edges, each
once, and draws among all of them. The features of the nodes are gathered in both, three rows a node by LargeGT. A cell is empty
where DGL was not installed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import kept_numbers, machine, refuse_to_keep_quick, write_numbers, write_table
from torch import Tensor
from torch.nn import functional as F

import tersor.models
from tersor.data.large_graph import Neighbours, hop_features, hop_tokens, power_law_graph, sample_nodes

SIZES, DEGREE, WIDTH, BATCH, LENGTH, MOST, TURNS = (100_000, 1_000_000, 10_000_000), 10, 16, 64, 50, 64, 15


def timed(task: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    result = task()
    return result, time.process_time() - started


def gigabytes() -> float:
    """The most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(nodes: int) -> dict[str, Any]:
    torch.manual_seed(0)
    graph, generated = timed(lambda: power_law_graph(nodes, DEGREE * nodes))
    found: dict[str, Any] = {
        "nodes": nodes,
        "edges": len(graph.nodes),
        "generated": generated,
        "memory of graph": gigabytes(),
    }
    found["most edges"] = int(np.diff(graph.starts).max())
    x = torch.empty(nodes, WIDTH)
    for start in range(0, nodes, 1 << 20):
        x[start : start + (1 << 20)].normal_()
    hops, found["hops"] = timed(lambda: hop_features(graph, x, 2))
    found["memory of hops"] = gigabytes()
    sizes: dict[str, Any] = {"in_channels": WIDTH, "hidden_channels": 64, "out_channels": 10, "global_dim": 16}
    model = tersor.models.create("largegt", num_nodes=nodes, num_centroids=1024, sample_node_len=LENGTH, **sizes)
    optimizer, random = torch.optim.AdamW(model.parameters(), 1e-3), np.random.default_rng(0)
    times: dict[str, list[float]] = {"sampling": [], "step": []}

    def step(seq: Tensor, batch: Tensor) -> None:
        loss = F.cross_entropy(model(seq, x[batch], torch.randn(BATCH, 16), batch), torch.randint(10, (BATCH,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for turn in range(TURNS + 1):
        batch = torch.from_numpy(random.integers(nodes, size=BATCH))
        started = time.process_time()
        seq = hop_tokens(sample_nodes(graph, batch, LENGTH, random, most=MOST), (x, *hops))
        between = time.process_time()
        step(seq, batch)
        if turn:  # the first one warms up, and counts the nodes of each code
            times["sampling"].append(between - started)
            times["step"].append(time.process_time() - between)
    found |= {name: statistics.median(each) for name, each in times.items()}
    found["memory"] = gigabytes()
    found["dgl"] = dgl_seconds(graph, x)
    print(json.dumps(found), flush=True)
    return found


def dgl_seconds(graph: Neighbours, x: torch.Tensor) -> float | None:
    """A batch's sampling and the features of its nodes; None where DGL is not installed."""
    try:
        sys.modules["dgl.graphbolt"] = types.ModuleType("dgl.graphbolt")
        import dgl
    except ImportError:
        return None
    starts, to = torch.from_numpy(graph.starts), torch.from_numpy(graph.nodes.astype(np.int64))
    theirs = dgl.graph(("csc", (starts, to, torch.empty(0, dtype=torch.int64))), num_nodes=len(graph))
    random, times = np.random.default_rng(1), []
    for _ in range(TURNS + 1):
        batch = torch.from_numpy(random.integers(len(graph), size=BATCH))
        started = time.process_time()
        first = dgl.sampling.sample_neighbors(theirs, batch, 10).edges()[0]
        second = dgl.sampling.sample_neighbors(theirs, first.unique(), 5).edges()[0]
        assert len(x[torch.cat((batch, first, second))])
        times.append(time.process_time() - started)
    return statistics.median(times[1:])


def table(rows: list[dict[str, Any]], where: str) -> str:
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    head = ["nodes", "edges", "most edges of a node", "generated, s", "hop features, s", "sampling and tokens, ms a batch",
            "targets a second", "training step, ms", "DGL's sampling, ms a batch",
            "peak memory: graph, hops, all; GB"]  # fmt: skip
    lines = ["# LargeGT on large graphs", "", about, "", "| " + " | ".join(head) + " |", "|" + " ---: |" * len(head)]
    for row in rows:
        theirs = "" if row["dgl"] is None else f"{1000 * row['dgl']:.0f}"
        lines.append(
            f"| {row['nodes']:,} | {row['edges']:,} | {row['most edges']:,} | {row['generated']:.1f} | {row['hops']:.1f} | "
            f"{1000 * row['sampling']:.0f} | {BATCH / row['sampling']:,.0f} | {1000 * row['step']:.0f} | {theirs} | "
            f"{row['memory of graph']:.2f}, {row['memory of hops']:.2f}, {row['memory']:.2f} |"
        )
    if missing := [f"{nodes:,}" for nodes in SIZES if nodes not in {row["nodes"] for row in rows}]:
        lines += ["", f"Not measured yet: {', '.join(missing)} nodes."]
    return "\n".join([*lines, "", where, "`OMP_NUM_THREADS=1 python benchmarks/large_graph.py --write`"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the table")
    parser.add_argument("--size", type=int, help="one graph, in this process")
    asked = parser.parse_args()
    refuse_to_keep_quick(asked)
    if asked.quick or asked.size:
        measure(asked.size or 10_000)
        return
    kept = kept_numbers("large_graph") if asked.write else {}
    rows = {row["nodes"]: row for row in kept.get("rows", [])}
    for nodes in SIZES:
        if nodes not in rows:
            ran = subprocess.run(
                [sys.executable, __file__, "--size", str(nodes)], check=True, capture_output=True, text=True
            )
            rows[nodes] = json.loads(ran.stdout.strip().splitlines()[-1])
            print(ran.stdout.strip(), flush=True)
        if asked.write:
            write_numbers("large_graph", {"rows": list(rows.values())})
            write_table("large_graph", table(list(rows.values()), machine()))


if __name__ == "__main__":
    main()
