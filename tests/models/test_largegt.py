"""LargeGT beyond its golden cases: properties of codebook and tokens, neighbours sampled within two hops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import tersor.models
from tersor.data.large_graph import Neighbours, hop_features, hop_tokens, power_law_graph, sample_nodes
from tersor.errors import TersorError
from tersor.models.graph.largegt import VectorQuantizer

SMALL = {"num_nodes": 40, "in_channels": 6, "hidden_channels": 8, "out_channels": 3, "global_dim": 4,
         "num_centroids": 5, "sample_node_len": 4}  # fmt: skip
# 0 is joined to 1 and 2, 2 to 3, 3 to 4; 5 has no edge
PATHS = torch.tensor([[0, 1, 0, 2, 2, 3, 3, 4], [1, 0, 2, 0, 3, 2, 4, 3]])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("largegt", **SMALL).double().eval()


def test_without_decay_a_code_becomes_the_mean_of_its_vectors() -> None:
    torch.manual_seed(0)
    codebook, x = VectorQuantizer(4, 3, decay=0.0).double(), torch.randn(50, 6, dtype=torch.float64)
    index = codebook.train().update(x)
    z = nn.functional.batch_norm(x, None, None, training=True)
    for code in index.unique():
        torch.testing.assert_close(codebook._embedding[code], z[index == code].mean(0), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_only_shares_of_codes_count_and_not_their_numbers_or_the_order_of_tokens(model: nn.Module) -> None:
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in model.example_inputs(3).items()}
    expected, layer = model(**inputs), model.convs[0]
    order = torch.tensor([3, 0, 4, 1, 2])
    layer.vq._embedding_output.copy_(layer.vq._embedding_output[order])
    layer.c_idx.copy_(order.argsort()[layer.c_idx.long()])
    torch.testing.assert_close(model(**inputs), expected)
    layer.c_idx = layer.c_idx.repeat(2)
    torch.testing.assert_close(model(**inputs), expected)
    inputs["seq"] = inputs["seq"][:, torch.cat((torch.tensor([0]), 1 + torch.randperm(11)))]
    torch.testing.assert_close(model(**inputs), expected)


@torch.no_grad()
def test_a_code_without_nodes_is_left_out(model: nn.Module) -> None:
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in model.example_inputs(1).items()}
    layer = model.convs[0]
    layer.c_idx[layer.c_idx == 2] = 0
    expected = model(**inputs)
    layer.vq._embedding_output[2] += 100
    torch.testing.assert_close(model(**inputs), expected)


@pytest.mark.parametrize("nodes", [[0, 7, 9], [4, 4, 5]], ids=["different", "one of them twice"])
def test_training_assigns_codes_and_keeps_their_counts(model: nn.Module, nodes: list[int]) -> None:
    model.train()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in model.example_inputs(3).items()}
    layer = model.convs[0]
    before = layer.c_idx.clone()
    for _ in range(3):
        model(**{**inputs, "batch_idx": torch.tensor(nodes)})
        assert layer.counts().equal(layer.c_idx.long().bincount(minlength=5))
    others = torch.ones(40, dtype=torch.bool).index_fill(0, torch.tensor(nodes), value=False)
    assert layer.c_idx[others].equal(before[others])
    layer.c_idx.fill_(1)  # by someone else: counted again
    assert layer.counts().tolist() == [0, 40, 0, 0, 0]


def test_sampled_nodes_are_the_target_and_different_entries_of_its_two_hops() -> None:
    graph, random = Neighbours.of(PATHS, 6), np.random.default_rng(0)
    lists = {0: [1, 2, 0, 3], 1: [0, 1, 2], 2: [0, 3, 1, 2, 4], 3: [2, 4, 0, 3], 4: [3, 2, 4]}
    seen: dict[int, set[int]] = {node: set() for node in lists}
    for _ in range(40):
        for node, row in zip(lists, sample_nodes(graph, np.arange(5), 4, random).tolist(), strict=True):
            assert row[0] == node
            assert len(set(row[1:])) == 3
            seen[node] |= set(row[1:])
    assert seen == {node: set(entries) for node, entries in lists.items()}
    few = sample_nodes(graph, [1, 5], 9, random)
    assert few[0].tolist() == [1, 0, 1, 2, 0, 1, 2, 0, 1]  # the list in order, again and again
    assert few[1, 0] == 5  # without neighbours: any nodes
    assert few[1].max() < 6


def test_hubs_are_thinned_to_a_choice_of_their_neighbours() -> None:
    spokes = torch.arange(1, 1001)
    edges = torch.stack((torch.zeros_like(spokes), spokes))
    graph, random = Neighbours.of(torch.cat((edges, edges.flip(0)), 1), 1001), np.random.default_rng(0)
    _, chosen = graph.around(np.array([0, 3]), 10, random)
    assert len(chosen) == 11
    assert len(set(chosen[:10])) == 10
    assert chosen[10] == 0
    assert sample_nodes(graph, [0], 30, random, most=10).unique().numel() <= 12  # ten neighbours, itself


def test_tokens_of_a_node_follow_each_other() -> None:
    x = torch.arange(6.0)[:, None]
    hops = hop_features(Neighbours.of(PATHS, 6), x, 2)
    tokens = hop_tokens(torch.tensor([[5, 0]]), (x, *hops))
    assert tokens[0, :3, 0].tolist() == [5, 5, 5]  # alone: P x = x
    torch.testing.assert_close(tokens[0, 3:, 0], torch.stack((x[0], hops[0][0], hops[1][0]))[:, 0])


def test_refuses_what_cannot_work() -> None:
    graph = Neighbours.of(PATHS, 6)
    with pytest.raises(TersorError, match="nodes 0 to 4"):
        Neighbours.of(PATHS, 4)
    with pytest.raises(TersorError, match="targets are nodes 2 to 6"):
        sample_nodes(graph, [2, 6], 3, np.random.default_rng(0))
    with pytest.raises(TersorError, match="5 rows"):
        hop_features(graph, torch.ones(5, 1), 1)
    with pytest.raises(TersorError, match="40000"):
        tersor.models.create("largegt", **{**SMALL, "num_centroids": 40_000})
    with pytest.raises(TersorError, match="num_layers"):
        tersor.models.create("largegt", **SMALL, num_layers=2)


def test_power_law_graphs_have_the_edges_that_are_asked_for_and_hubs() -> None:
    graph = power_law_graph(3000, 30_000, seed=1)
    assert len(graph) == 3000
    assert len(graph.nodes) == graph.starts[-1] == 30_000
    rows = np.split(graph.nodes, graph.starts[1:-1])
    assert all((np.diff(row) > 0).all() for row in rows)  # sorted, and none twice
    assert graph.nodes.min() >= 0
    assert graph.nodes.max() < 3000
    for degrees in (np.diff(graph.starts), np.bincount(graph.nodes, minlength=3000)):
        assert degrees.max() > 20 * degrees.mean()
        assert np.median(degrees) < 0.7 * degrees.mean()
    # a share of nodes with at least k edges that falls as k^(1 - 2.5)
    large = np.diff(power_law_graph(200_000, 600_000, seed=2).starts)
    shares = [(large >= k).mean() for k in (16, 64)]
    assert np.log(shares[0] / shares[1]) / np.log(4) == pytest.approx(1.5, abs=0.25)
    again = power_law_graph(3000, 30_000, seed=1)
    assert np.array_equal(again.nodes, graph.nodes)
    with pytest.raises(TersorError, match="no power-law graph of 10 nodes, 50 edges"):
        power_law_graph(10, 50)
