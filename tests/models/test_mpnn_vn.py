"""MPNN+VN beyond its golden cases: reach, graphs by themselves, linear attention by a virtual node, DeepSets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.data.virtual_node import add_virtual_node
from tersor.errors import TersorError
from tersor.models.graph.encoders import sum_at

GPS = {"node_encoder": "TypeDictNode", "layer_type": "CustomGatedGCN+DSVN", "layers": 2, "dim_hidden": 16}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "updating": ("mpnn_vn", {"head": "inductive_node", "layers_mp": 3, "dim_inner": 16, "vn_pooling": "mean"}),
    "gine": ("mpnn_vn", {"layer_type": "gineconv", "head": "inductive_node", "layers_mp": 2, "dim_inner": 16,
                         "vn_residual": True, "residual": False}),
    "gcn": ("mpnn_vn", {"layer_type": "gcnconv", "head": "inductive_node", "layers_mp": 2, "dim_inner": 16}),
    **{f"deepsets {kind}": ("graphgps", {**GPS, "head": "inductive_node",
                                         "dsvn": {"reduction": kind, "nonlinear": "elu", "n_layers": 2}})
       for kind in ("mean", "sum", "max", "min")},
}  # fmt: skip


def build(form: str) -> nn.Module:
    torch.manual_seed(0)
    system, config = FORMS[form]
    model = tersor.models.create(system, **config).eval()
    for name, parameter in model.named_parameters():
        if "virtualnode_embedding" in name:
            nn.init.normal_(parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_graph_counts_for_itself_and_its_nodes_have_no_order(form: str) -> None:
    model = build(form)
    inputs = model.example_inputs(2)
    y = model(**inputs)
    first = inputs["batch"] == 0
    edges = first[inputs["edge_index"][0]]
    order = torch.randperm(int(first.sum()))
    own = {"x": inputs["x"][first][order], "edge_index": order.argsort()[inputs["edge_index"][:, edges]],
           "edge_attr": inputs["edge_attr"][edges], "batch": inputs["batch"][first]}  # fmt: skip
    torch.testing.assert_close(model(**own), y[first][order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_node_reaches_every_other_of_its_graph_without_edges(form: str) -> None:
    model = build(form).double()
    x = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    batch = torch.tensor([0] * 5 + [1] * 4)
    edge_index, edges = torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 16, dtype=torch.float64)
    if hasattr(model, "nodes"):
        y = model.nodes(x, edge_index, edges, batch)
    else:
        y = x
        for layer in model.layers:
            y, _ = layer(y, edge_index, edges, batch)
    reached = torch.stack([torch.autograd.grad(row.square().sum(), x, retain_graph=True)[0].abs().amax(1) for row in y])
    same = batch[:, None] == batch
    assert not reached[~same].any()
    if form in ("deepsets max", "deepsets min"):  # one node of the graph is the largest or smallest of a channel
        assert (reached * same).count_nonzero() > len(y)
    else:
        assert reached[same].all()


def test_one_virtual_node_computes_linear_attention() -> None:
    """Node -> virtual node: the sums of vec(f(k) v^T) and f(k); virtual node -> nodes: both, that every q reads."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 7, 4, dtype=torch.float64)
    f_q, f_k = (nn.functional.elu(t) + 1 for t in (q, k))
    attention = (f_q @ f_k.T) @ v / (f_q @ f_k.T).sum(1, keepdim=True)

    none = torch.zeros(2, 0, dtype=torch.long)
    graph = add_virtual_node(torch.cat(((f_k[:, :, None] * v[:, None]).flatten(1), f_k), 1), none, none[0])
    source, target = graph.edge_index[:, graph.edge_type == 1]
    state = graph.x + sum_at(target, graph.x[source], 8)
    source, target = graph.edge_index[:, graph.edge_type == 2]
    read = sum_at(target, state[source], 8)[:7]
    by_node = torch.einsum("nf,nfd->nd", f_q, read[:, :16].view(7, 4, 4)) / (f_q * read[:, 16:]).sum(1, keepdim=True)
    torch.testing.assert_close(by_node, attention, rtol=1e-6, atol=1e-6)


def test_a_virtual_node_alone_replaces_all_edges() -> None:
    x, edge_index, edge_attr = torch.ones(3, 2), torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 1)
    graph = add_virtual_node(x, edge_index, edge_attr, keep_edges=False)
    assert graph.edge_index.tolist() == [[0, 1, 2, 3, 3, 3], [3, 3, 3, 0, 1, 2]]
    assert graph.edge_type.tolist() == [1, 1, 1, 2, 2, 2]
    assert not graph.edge_attr.any()


def bad_graphs() -> list[tuple[dict[str, Tensor], str]]:
    x, edges, attributes = torch.ones(3, 1), torch.tensor([[0], [1]]), torch.ones(1, 1)
    return [
        ({"x": x, "edge_index": edges + 2, "edge_attr": attributes}, "nodes 2 to 3"),
        ({"x": x, "edge_index": edges, "edge_attr": attributes[:0]}, "edge_attr 0 rows"),
        ({"x": x[:0], "edge_index": edges[:, :0], "edge_attr": attributes[:0]}, "without nodes"),
    ]


@pytest.mark.parametrize(("graph", "named"), bad_graphs())
def test_refuses_graphs_that_cannot_be(graph: dict[str, Tensor], named: str) -> None:
    with pytest.raises(TersorError, match=named):
        add_virtual_node(**graph)


@pytest.mark.parametrize(
    ("config", "named"),
    [({"layer_type": "gin"}, "'gin'"), ({"virtual_node": "yes"}, "'yes'"), ({"layers_mp": 0}, "layers_mp")],
)
def test_refuses_what_cannot_work(config: dict[str, Any], named: str) -> None:
    with pytest.raises(TersorError, match=named):
        tersor.models.create("mpnn_vn", **config)
