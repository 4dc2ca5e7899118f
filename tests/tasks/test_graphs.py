"""Graphs: from a user's files to the classes of nodes, and to what is predicted of whole graphs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tersor
from tersor.data.graphs import Graph, GraphConfig, graph_of, read_graph
from tersor.data.large_graph import Neighbours, spectral_positions
from tersor.models import create
from tersor.tasks.graph_inputs import ManyGraphs, WholeGraph, flat_inputs
from tersor.train.config import TrainConfig
from tersor.train.objectives import graph_prediction
from tersor.train.trainer import train, validate

pytest.importorskip("torch_geometric", reason="graph models need torch_geometric")
GPS = ["node_encoder=LinearNode", "head=inductive_node", "layer_type=GCN+Transformer", "dim_in=6", "dim_out=3",
       "layers=1", "dim_hidden=16", "n_heads=2"]  # fmt: skip
MPNN = ["node_encoder=LinearNode", "head=inductive_node", "layer_type=gcnconv", "dim_in=6", "dim_out=3", "layers_mp=2",
        "dim_inner=16", "virtual_node=none"]  # fmt: skip
LARGE = ["num_nodes=90", "in_channels=6", "out_channels=3", "hidden_channels=16", "global_dim=4", "num_centroids=8",
         "sample_node_len=6", "ff_dropout=0.1"]  # fmt: skip
MODELS = {"graphgps": GPS, "mpnn_vn": MPNN, "largegt": LARGE}


def communities(nodes: int = 90, seed: int = 0) -> tuple[Any, Any, Any]:
    """Features [N, 6] that say little, edges [2, E] that mostly stay within one of three groups, groups [N]."""
    random = np.random.default_rng(seed)
    group = np.arange(nodes) % 3
    x = random.uniform(0, 1, (nodes, 6))
    x[np.arange(nodes), group] += 0.5
    pairs = random.integers(nodes, size=(2, 12 * nodes))
    kept = (group[pairs[0]] == group[pairs[1]]) | (random.uniform(size=12 * nodes) < 0.05)
    return x, pairs[:, kept & (pairs[0] != pairs[1])], group


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The communities as tables: nodes n0, n1, ... with labels red, green, blue; a third of each part."""
    x, edges, group = communities()
    made = tmp_path / "mygraph"
    made.mkdir()
    lines = ["id,split,label," + ",".join("abcdef")]
    for n in range(90):
        split = ("train", "val", "test")[n // 30]
        lines.append(f"n{n},{split},{('red', 'green', 'blue')[group[n]]}," + ",".join(f"{v:.4f}" for v in x[n]))
    (made / "nodes.csv").write_text("\n".join(lines) + "\n")
    (made / "edges.csv").write_text("src,dst\n" + "".join(f"n{a},n{b}\n" for a, b in edges.T))
    return made


def settings(name: str) -> list[str]:
    return [text for each in MODELS[name] for text in ("--set", f"model.{each}")]


def compared_here(folder: Path, data: Path, tersor_command: Callable[..., Any]) -> dict[str, Any]:
    """The model `run` in 3 bits beside itself, and itself beside itself."""
    how = ("--against", folder / "run", "--data", data, "--device", "cpu", "--json")
    same = json.loads(tersor_command("eval", folder / "run", *how).out)
    assert same["change"]["mean"] == same["apart"]["mean"] == 0
    assert same["score"] == same["base_score"]
    tersor.compress(folder / "run", tersor.RTN(bits=3, group_size=-1), out=folder / "rounded", device="cpu")
    ran = tersor_command("eval", folder / "rounded", *how)
    assert ran.status == 0, ran.err
    told: dict[str, Any] = json.loads(ran.out)
    assert told["apart"]["mean"] > 0
    assert told["score"]["mean"] - told["base_score"]["mean"] == pytest.approx(told["change"]["mean"])
    shown = tersor_command("eval", folder / "rounded", *how[:-1])
    assert told["measure"] in shown.out
    return told


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trained_on_tables_classifies_nodes_of_tables(
    name: str, folder: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    how = ("--epochs", "60", "--batch-size", "30", "--lr", "0.01", "--device", "cpu", "--json")
    ran = tersor_command("train", name, "--data", folder, "--out", run, *settings(name), *how)
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["test"]["accuracy"] > 0.8
    ran = tersor_command("predict", run, folder, "--out", tmp_path / "said", "--json")
    assert ran.status == 0, ran.err
    (told,) = json.loads(ran.out)
    assert told["accuracy"].keys() == {"train", "validation", "test"}
    assert told["accuracy"]["test"] > 0.8
    assert set(told["classes"]) == {"red", "green", "blue"}
    with open(told["table"], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["node"] for row in rows] == [f"n{n}" for n in range(90)]
    truth = ["red", "green", "blue"] * 30
    right = np.mean([row["class"] == wanted for row, wanted in zip(rows[60:], truth[60:], strict=True)])
    assert right == pytest.approx(told["accuracy"]["test"])
    assert all(1 / 3 < float(row["probability"]) <= 1 for row in rows)

    found = compared_here(tmp_path, folder, tersor_command)
    assert (found["of"], found["part"], found["count"]) == ("nodes", "test", 30)
    assert found["base_score"]["mean"] == pytest.approx(told["accuracy"]["test"])

    lines = (folder / "nodes.csv").read_text().splitlines()  # another graph, without labels or parts
    other = tmp_path / "other"
    other.mkdir()
    kept = [",".join([line.split(",")[0], *line.split(",")[3:]]) for line in lines[:61]]
    (other / "nodes.csv").write_text("\n".join(kept) + "\n")
    edges = [
        line
        for line in (folder / "edges.csv").read_text().splitlines()[1:]
        if all(int(n[1:]) < 60 for n in line.split(","))
    ]
    (other / "edges.csv").write_text("src,dst\n" + "\n".join(edges) + "\n")
    ran = tersor_command("predict", run, other / "nodes.csv", "--out", tmp_path / "said", "--csv")
    assert ran.status == 0, ran.err
    assert len((tmp_path / "said" / "nodes_nodes.csv").read_text().splitlines()) == 61


def test_tables_and_arrays_are_the_same_graph(folder: Path, tmp_path: Path) -> None:
    x, edges, group = communities()
    np.savez(tmp_path / "g.npz", x=np.round(x, 4), edge_index=edges, y=group, train_index=np.arange(30),
             valid_index=np.arange(30, 60), test_index=np.arange(60, 90))  # fmt: skip
    tables, arrays = read_graph(folder), read_graph(tmp_path / "g.npz")
    assert torch.equal(tables.x, arrays.x)
    assert torch.equal(tables.edge_index, arrays.edge_index)
    assert tables.classes == ("blue", "green", "red")
    assert torch.equal(tables.y, 2 - arrays.y)
    assert {part: nodes.tolist() for part, nodes in tables.parts.items()} == {
        part: nodes.tolist() for part, nodes in arrays.parts.items()
    }
    assert torch.allclose(arrays.x.sum(1), torch.ones(90))
    there = {(int(a), int(b)) for a, b in arrays.edge_index.T}
    assert len(there) == arrays.edge_index.shape[1]
    assert (
        there
        == {(b, a) for a, b in there}
        == {(int(a), int(b)) for a, b in edges.T} | {(int(b), int(a)) for a, b in edges.T}
    )
    raw = read_graph(tmp_path / "g.npz", GraphConfig(undirected=False, normalize=False))
    assert torch.equal(raw.edge_index, torch.from_numpy(edges))
    assert raw.x[0, 0].item() == pytest.approx(round(x[0, 0], 4))


def test_without_parts_the_known_labels_are_split_by_chance() -> None:
    x, edges, group = communities()
    y = torch.from_numpy(group).index_fill(0, torch.arange(40), -1)
    bare = Graph(torch.from_numpy(x).float(), torch.from_numpy(edges), y, torch.zeros(edges.shape[1], 0))
    from tersor.data.graphs import prepared

    parts = prepared(bare, GraphConfig(train=0.5, validation=0.2)).parts
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [25, 10, 15]
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(40, 90))
    again = prepared(bare, GraphConfig(train=0.5, validation=0.2, seed=1)).parts
    assert parts["train"].tolist() != again["train"].tolist()


def test_torch_geometrics_data_pass_straight_in(tmp_path: Path) -> None:
    from torch_geometric.data import Data

    x, edges, group = communities()
    masks = {f"{part}_mask": torch.arange(90) // 30 == n for n, part in enumerate(("train", "val", "test"))}
    data = Data(x=torch.from_numpy(x).float(), edge_index=torch.from_numpy(edges), y=torch.from_numpy(group), **masks)
    graph = graph_of(data)
    assert graph.parts["test"].tolist() == list(range(60, 90))
    assert torch.equal(graph_of([data]).x, graph.x)
    torch.manual_seed(0)
    model = create("mpnn_vn", **dict(_option(each) for each in MPNN))
    inputs = flat_inputs(model, graph)
    training, test = (WholeGraph(inputs, graph.parts[part], graph.y) for part in ("train", "test"))
    recipe = TrainConfig(epochs=25, batch_size=30, lr=0.01, device="cpu")
    train(model, training, objective=graph_prediction, out=tmp_path / "run", config=recipe)
    assert validate(model, test, graph_prediction)["accuracy"] > 0.8


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, int(value) if value.isdigit() else value


def test_cora_is_read_and_learned(data: Path, tmp_path: Path, tersor_command: Callable[..., Any]) -> None:
    cora = read_graph(data / "graphs" / "cora.npz")
    assert cora.x.shape == (2708, 1433)
    assert cora.edge_index.shape == (2, 10556)
    assert [len(cora.parts[part]) for part in ("train", "validation", "test")] == [140, 500, 1000]
    usual = ("train", "mpnn_vn", "--data", data / "graphs" / "cora.npz", "--out", tmp_path / "run", "--device", "cpu")
    ran = tersor_command(*usual)
    assert ran.status == 2
    assert ran.err.count("\n") == 1
    said = ran.err.partition("; ")[2].split()  # all that has to be set, at once
    assert set(said) == {
        "--set",
        "model.dim_out=7",
        "model.node_encoder=LinearNode",
        "model.dim_in=1433",
        "model.head=inductive_node",
        "model.virtual_node=none",
    }
    small = ("--set", "model.layer_type=gcnconv", "--set", "model.layers_mp=2", "--set", "model.dim_inner=16")
    ran = tersor_command(*usual, *said, *small, "--epochs", "40", "--batch-size", "140", "--lr", "0.02", "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["test"]["accuracy"] > 0.5


def many_graphs(count: int = 60) -> dict[str, Any]:
    """Rings and stars of five to nine nodes."""
    random, xs, edges, batch, kind = np.random.default_rng(0), [], [], [], []
    start = 0
    for g in range(count):
        n, ring = int(random.integers(5, 10)), g % 2
        nodes = np.arange(n)
        there = np.stack((nodes, (nodes + 1) % n)) if ring else np.stack((np.zeros(n - 1, int), nodes[1:]))
        edges.append(there + start)
        xs.append(np.ones((n, 1)))
        batch += [g] * n
        kind.append(ring)
        start += n
    return {
        "x": np.concatenate(xs),
        "edge_index": np.concatenate(edges, 1),
        "batch": np.array(batch),
        "y": np.array(kind),
    }


@pytest.mark.parametrize("kind", ["class", "number", "labels"])
def test_whole_graphs_are_predicted(kind: str, tmp_path: Path, tersor_command: Callable[..., Any]) -> None:
    arrays = many_graphs()
    sizes = np.bincount(arrays["batch"])
    if kind == "number":
        arrays["y"] = sizes / 4.0
    elif kind == "labels":
        arrays["y"] = np.stack((arrays["y"] == 1, sizes > 7), 1)
    np.savez(tmp_path / "g.npz", **arrays)
    outputs = {"class": 2, "number": 1, "labels": 2}[kind]
    model = ("mpnn_vn", "--set", "model.layers_mp=2", "--set", "model.dim_inner=16", "--set", f"model.dim_out={outputs}",
             "--set", "model.pooling=add", "--set", "model.layer_type=gineconv")  # fmt: skip
    how = ("--epochs", "40", "--batch-size", "12", "--lr", "0.01", "--device", "cpu", "--json")
    ran = tersor_command("train", *model, "--data", tmp_path / "g.npz", "--out", tmp_path / "run", *how)
    assert ran.status == 0, ran.err
    test = json.loads(ran.out)["test"]
    assert test["loss"] < 0.25 if kind == "number" else test["accuracy"] > 0.8
    ran = tersor_command("predict", tmp_path / "run", tmp_path / "g.npz", "--out", tmp_path / "said", "--json")
    assert ran.status == 0, ran.err
    (told,) = json.loads(ran.out)
    assert told["graphs"] == 60
    rows = list(csv.reader(Path(told["table"]).read_text().splitlines()))
    assert rows[0] == {"class": ["graph", "class", "probability"], "number": ["graph", "class 0"],
                       "labels": ["graph", "class 0", "class 1"]}[kind]  # fmt: skip
    told = compared_here(tmp_path, tmp_path / "g.npz", tersor_command)
    assert (told["of"], told["part"]) == ("graphs", "test")
    assert told["measure"] == {"class": "accuracy", "number": "MAE", "labels": "right labels"}[kind]
    assert (told["same"] is None) == (kind == "number")
    if kind == "number":
        error = np.abs(np.array([float(row[1]) for row in rows[1:]]) - arrays["y"]).mean()
        assert error < 0.25
    elif kind == "class":
        assert np.mean([row[1] == f"class {y}" for row, y in zip(rows[1:], arrays["y"], strict=True)]) > 0.8


def test_tables_of_many_graphs_and_their_batches(tmp_path: Path) -> None:
    arrays = many_graphs(4)
    nodes = ["id,graph,f", *(f"v{n},g{g},{n}" for n, g in enumerate(arrays["batch"]))]
    (tmp_path / "nodes.csv").write_text("\n".join([nodes[0], *nodes[:0:-1]]) + "\n")  # in any order
    (tmp_path / "edges.csv").write_text("src,dst,w\n" + "".join(f"v{a},v{b},{a}\n" for a, b in arrays["edge_index"].T))
    (tmp_path / "graphs.csv").write_text("graph,split,size\n" + "".join(f"g{g},train,{g}.5\n" for g in (3, 1, 0, 2)))
    graph = read_graph(tmp_path, GraphConfig(undirected=False))
    assert graph.y[:, 0].tolist() == [0.5, 1.5, 2.5, 3.5]
    assert graph.classes == ("size",)
    assert torch.equal(graph.x[graph.edge_index[0], 0], graph.edge_attr[:, 0])
    model = create("mpnn_vn", node_encoder="LinearNode", edge_encoder="LinearEdge", dim_inner=8, layers_mp=1)
    data = ManyGraphs(model, flat_inputs(model, graph), torch.tensor([2, 0]), graph.y)
    batch = data.collate([data[0], data[1]])
    assert batch["target"][:, 0].tolist() == [2.5, 0.5]
    assert batch["batch"].tolist() == sorted(batch["batch"].tolist())
    assert torch.equal(batch["x"][batch["edge_index"][0], 0], batch["edge_attr"][:, 0])
    model = create("mpnn_vn", node_encoder="LinearNode", edge_encoder="LinearEdge", virtual_node="none")
    joined = ManyGraphs(model, flat_inputs(model, graph), torch.tensor([2]), graph.y)[0]
    n, edges = len(data[0]["x"]), data[0]["edge_index"].shape[1]
    assert len(joined["x"]) == n + 1  # the virtual node of form C
    assert joined["edge_index"].shape[1] == edges + 2 * n
    assert joined["edge_index"][:, edges:].amax(0).tolist() == [n] * (2 * n)


def test_positions_span_the_smoothest_eigenvectors() -> None:
    _, edges, _ = communities()
    both = torch.from_numpy(np.concatenate((edges, edges[::-1]), 1))
    graph = Neighbours.of(both, 90)
    A = torch.eye(90, dtype=torch.float64)
    A[both[0], both[1]] = 1
    scale = A.sum(1).rsqrt()
    _, vectors = torch.linalg.eigh(scale[:, None] * A * scale)
    found = spectral_positions(graph, 3, rounds=200).double() / 90**0.5
    torch.testing.assert_close(found @ found.T, vectors[:, -3:] @ vectors[:, -3:].T, rtol=0, atol=1e-3)
    assert (spectral_positions(graph, 95)[:, 90:] == 0).all()


NODES, EDGES = "id,label,f,g\na,x,1,2\nb,y,3,4\nc,x,5,6\n", "src,dst\na,b\nb,c\n"


@pytest.mark.parametrize(
    ("nodes", "edges", "said"),
    [
        (NODES, "src,dst\na,z\n", "row 2: dst is 'z', which no node is called"),
        (NODES, "src,dst\n", "the graph has no edges"),
        ("id,label,f,g\na,x,1,2\n", "src,dst\na,a\n", "the graph has 1 node, a graph model needs at least two"),
        (NODES.replace("3,4", "nan,4"), EDGES, "feature 0 of node 1 is nan"),
        (NODES.replace("3,4", "3,many"), EDGES, "row 3: g is 'many', not a number"),
        (NODES.replace("b,y", "a,y"), EDGES, "two nodes have the id 'a'"),
        (NODES.replace("3,4", "3"), EDGES, "row 3: 3 columns, 4 in the header"),
        (NODES.replace("id,label", "id,split"), EDGES, "says split 'x'"),
        ("", EDGES, "is empty"),
        (NODES, "from,to\na,b\n", "src is not among them"),
    ],
)
def test_bad_tables_get_one_line(nodes: str, edges: str, said: str, tmp_path: Path, tersor_command: Any) -> None:
    (tmp_path / "nodes.csv").write_text(nodes)
    (tmp_path / "edges.csv").write_text(edges)
    ran = tersor_command("train", "largegt", "--data", tmp_path, "--out", tmp_path / "run", *settings("largegt"))
    assert ran.status == 2
    assert said in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"edge_index": np.array([[0, 1], [1, 90]])}, "an edge names node 90, the graph has nodes 0 to 89"),
        ({"edge_index": np.array([[0, -1], [1, 2]])}, "an edge names node -1"),
        ({"edge_index": np.zeros((2, 0), int)}, "the graph has no edges"),
        ({"edge_index": np.zeros((2, 3))}, "edge_index is float64"),
        ({"x": np.full((90, 6), np.inf)}, "feature 0 of node 0 is inf"),
        ({"x": np.ones(90)}, "x is [90] of float64; numbers in 2 dimensions"),
        ({"y": np.zeros(7, int)}, "there are 90 nodes, but 7 labels"),
        ({"y": np.zeros(90)}, "labels are float64; whole numbers are classes"),
        ({"y": np.full(90, -1)}, "no nodes with labels to train on"),
        ({"train_index": np.array([95])}, "the train part names node 95, there are 90"),
        ({"edge_attr": np.ones((3, 1))}, "edge_attr 3 rows"),
        ({"batch": np.arange(90)[::-1].copy()}, "in ascending order"),
        ({"batch": np.repeat(np.arange(30), 3), "y": np.zeros(30, int)}, "holds 30 graphs to predict"),
        ({"y": np.zeros((90, 2), int)}, "classes have one dimension"),
        ({"y": np.array(3)}, "labels are a single value"),
        ({"train_mask": np.ones((90, 2), bool)}, "train_mask is [90, 2]"),
    ],
)
def test_bad_arrays_get_one_line(changed: dict[str, Any], said: str, tmp_path: Path, tersor_command: Any) -> None:
    x, edges, group = communities()
    np.savez(tmp_path / "g.npz", **{"x": x, "edge_index": edges, "y": group} | changed)
    ran = tersor_command(
        "train", "largegt", "--data", tmp_path / "g.npz", "--out", tmp_path / "run", *settings("largegt")
    )
    assert ran.status == 2
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_what_does_not_fit_the_model_is_said_with_the_way_out(tmp_path: Path, tersor_command: Any) -> None:
    x, edges, group = communities()
    np.savez(tmp_path / "g.npz", x=x, edge_index=edges, y=group)
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    usual = ("--out", tmp_path / "run")
    for name, more, said in (
        ("largegt", (), "--set model.num_nodes=90 --set model.in_channels=6"),
        (
            "graphgps_zinc",
            (),
            "--set model.node_encoder=LinearNode+RWSE --set model.head=inductive_node --set model.dim_out=3 --set model.dim_in=6",
        ),
        ("graphgps", (*settings("graphgps"), "--set", "data.train=2"), "shares of 2"),
        ("graphgps", (*settings("graphgps"), "--validation", tmp_path / "g.npz"), "leave --validation out"),
        (
            "graphgps",
            (*settings("graphgps"), "--set", "model.dim_out=2"),
            "3 classes (model: 2); --set model.dim_out=3",
        ),
    ):
        ran = tersor_command("train", name, "--data", tmp_path / "g.npz", *usual, *more)
        assert ran.status == 2
        assert said in ran.err
        assert ran.err.count("\n") == 1
    ran = tersor_command("train", "largegt", "--data", tmp_path / "bad.npz", *usual)
    assert "no .npz file of arrays" in ran.err
