"""Todyformer: no code is published, so the fact sheet's properties are what it is held to."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tersor.models
from tersor.data.dynamic_graphs import EventStream, LinkBatches
from tersor.errors import TersorError
from tersor.evaluate.link_prediction import edge_targets, link_scores
from tersor.models.graph.todyformer import pack, patch_of, slots_of, unpack
from tersor.train.average_precision import average_precision
from tersor.train.objectives import link_prediction

SMALL: dict[str, Any] = {"node_dim": 4, "edge_dim": 2, "hidden_dim": 16, "time_dim": 8, "layers": 2, "patches": 4,
                         "dropout": 0.0}  # fmt: skip


def build(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("todyformer", **{**SMALL, **config}).double().eval()


def window(events: int = 30, nodes: int = 9, **more: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "edge_index": torch.randint(nodes, (2, events)),
        "time": torch.rand(events, dtype=torch.float64).cumsum(0),
        "x": torch.randn(nodes, 4, dtype=torch.float64),
        "edge_attr": torch.randn(events, 2, dtype=torch.float64),
        "query": torch.randint(nodes, (2, 5)),
        **more,
    }


@pytest.mark.parametrize(("events", "patches"), [(30, 4), (7, 7), (100, 1), (3, 8), (65, 32)])
def test_patches_are_a_partition_in_order(events: int, patches: int) -> None:
    patch = patch_of(events, patches)
    assert (patch.diff() >= 0).all()
    sizes = patch.bincount(minlength=patches)
    assert sizes.sum() == events
    assert sizes.max() - sizes.min() <= 1


def test_packing_and_unpacking_are_inverse_and_tokens_are_in_order_of_time() -> None:
    edges = window()["edge_index"]
    slots = slots_of(edges, patch_of(30, 4), 12, 4)  # nodes 9 to 11 have no event
    tokens = torch.randn(len(slots.node), 3)
    packed, there = pack(tokens, slots)
    assert torch.equal(unpack(packed, slots), tokens)
    assert there.sum() == len(tokens)
    assert packed.shape[0] == len(edges.unique())
    for node in range(9):
        met = patch_of(30, 4)[(edges == node).any(0)].unique()
        assert slots.patch[slots.node == node].tolist() == met.tolist()
        assert slots.place[slots.node == node].tolist() == list(range(len(met)))
    assert torch.equal(slots.node[slots.ends], edges)


@torch.no_grad()
def test_what_lies_in_absent_slots_counts_for_nothing() -> None:
    model, slots = build(), slots_of(window()["edge_index"], patch_of(30, 4), 9, 4)
    tokens = torch.randn(len(slots.node), 16, dtype=torch.float64)
    attend = model.blocks[0]["global"]
    (zeros, there), (filled, _) = pack(tokens, slots), pack(tokens, slots, fill=1e6)
    assert not there.all()
    assert torch.equal(unpack(attend(filled, there), slots), unpack(attend(zeros, there), slots))


@torch.no_grad()
@pytest.mark.parametrize("readout", ["last", "mean"])
def test_one_patch_without_the_global_part_is_message_passing(readout: str) -> None:
    """Node by node, from the weights alone."""
    model, inputs = build(patches=1, use_global=False, readout=readout), window(12)
    h = inputs["x"] @ model.embed.weight.T
    age = inputs["time"][-1] - inputs["time"]
    phi = (age[:, None] * model.time.weight + model.time.bias).cos()
    events = torch.cat((inputs["edge_attr"], phi), 1)
    for block in model.blocks:
        layer, y, new = block["local"], block["local"].norm(h), h.clone()
        for v in range(9):
            around = [(int(a), i) for i, (b, a) in enumerate(inputs["edge_index"].T) if int(b) == v]
            around += [(int(b), i) for i, (b, a) in enumerate(inputs["edge_index"].T) if int(a) == v]
            if not around:
                continue
            W = torch.cat((layer.kv.weight, layer.kv_event.weight), 1)  # of [h_u; e; phi]
            kv = torch.stack([W @ torch.cat((y[u], events[i])) + layer.kv.bias for u, i in around])
            q, k, v_ = layer.q(y[v]).view(2, 8), kv[:, :16].view(-1, 2, 8), kv[:, 16:].view(-1, 2, 8)
            shares = (torch.einsum("hc,ehc->eh", q, k) / 8**0.5).softmax(0)
            message = torch.einsum("eh,ehc->hc", shares, v_).flatten()
            new[v] = h[v] + layer.out(message)
            new[v] = new[v] + layer.mlp(new[v])
        h = new
    torch.testing.assert_close(model.nodes(**{k: v for k, v in inputs.items() if k != "query"}), model.norm(h))


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"position": "time"}, {"position": "none", "alternate": False},
                                    {"readout": "mean", "pair": "product"}, {"use_global": False}])  # fmt: skip
def test_times_may_be_shifted_and_nodes_renamed(config: dict[str, Any]) -> None:
    model, inputs = build(**config), window()
    expected = model(**inputs)
    torch.testing.assert_close(model(**{**inputs, "time": inputs["time"] + 1000}), expected)
    order = torch.randperm(9)
    renamed = {**inputs, "x": inputs["x"][order]}
    for name in ("edge_index", "query"):
        renamed[name] = order.argsort()[inputs[name]]
    torch.testing.assert_close(model(**renamed), expected)


@torch.no_grad()
def test_every_option_changes_what_is_computed() -> None:
    inputs = window()
    results = [build(**config)(**inputs) for config in (
        {}, {"position": "time"}, {"position": "none"}, {"alternate": False}, {"readout": "mean"}, {"patches": 1},
        {"use_global": False}, {"pair": "product"}, {"heads": 4})]  # fmt: skip
    for n, one in enumerate(results):
        assert not any(torch.allclose(one, other) for other in results[:n])


def stream_of(rows: Any, nodes: int, features: Any = None) -> EventStream:
    src, dst, when = (np.array(column) for column in zip(*rows, strict=True))
    more = {} if features is None else {"features": np.asarray(features, np.float32)}
    return EventStream(src, dst, when.astype(np.float64), nodes, **more)


@torch.no_grad()
def test_nothing_of_the_future_is_seen() -> None:
    """What happens at the time of a batch's first event or later, or is changed then, does not change its predictions."""
    random = np.random.default_rng(0)
    when = np.sort(random.integers(0, 60, 120))  # with many ties
    rows = list(zip(random.integers(0, 10, 120), random.integers(10, 20, 120), when, strict=True))
    features = random.standard_normal((120, 2))
    begin = 71
    while when[begin] != when[begin - 1]:  # an event of the same time stands before the batch
        begin += 1
    batches = LinkBatches(stream_of(rows, 20, features), window=50, batch=10, node_dim=4, begin=begin)
    changed_rows, changed_features = list(rows), features.copy()
    for n in range(120):
        if when[n] >= when[begin]:
            changed_features[n] = 99
            if not begin <= n < begin + 10:
                changed_rows[n] = (int(random.integers(10)), int(random.integers(10, 20)), when[n])
    changed = LinkBatches(stream_of(changed_rows, 20, changed_features), window=50, batch=10, node_dim=4, begin=begin)
    changed.destinations = batches.destinations
    assert changed_rows != rows
    model = build().float()
    (one, other) = ({k: v for k, v in each[0].items() if k != "target"} for each in (batches, changed))
    assert len(one["time"]) == 50
    assert one["time"].max() < when[begin]
    assert torch.equal(model(**one), model(**other))


def first_colours(nodes: int, fillers: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Nodes meet a hub once with a colour, then `fillers` times without; the colour of each is asked for."""
    random = torch.Generator().manual_seed(seed)
    colour = torch.randint(2, (nodes,), generator=random)
    rounds = [torch.randperm(nodes, generator=random) for _ in range(1 + fillers)]
    who = torch.cat(rounds)
    attr = torch.zeros(len(who), 2)
    attr[:nodes] = F.one_hot(colour, 2)[rounds[0]].float()
    edges = torch.stack((who, torch.full_like(who, nodes)))
    inputs = {"edge_index": edges, "time": torch.arange(len(who)).float(), "x": torch.zeros(nodes + 1, 0),
              "edge_attr": attr, "query": torch.arange(nodes)}  # fmt: skip
    return inputs, colour


@pytest.mark.parametrize(("use_global", "learns"), [(True, True), (False, False)])
def test_the_first_of_many_events_is_found_by_the_global_part_alone(use_global: bool, learns: bool) -> None:
    torch.manual_seed(0)
    config = {"node_dim": 0, "head": "node", "use_global": use_global, "patches": 8, "layers": 2, "time_dim": 4}
    model = tersor.models.create("todyformer", **{**SMALL, **config})
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(80):
        inputs, colour = first_colours(24, 7, step)
        F.cross_entropy(model.train()(**inputs), colour).backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs, colour = first_colours(400, 7, 1000)
    right = (model.eval()(**inputs).argmax(1) == colour).float().mean()
    assert right > 0.95 if learns else right < 0.6


@pytest.mark.parametrize(("reach", "learns"), [(80, True), (28, False)])
def test_an_edge_that_recurs_is_found_where_the_window_reaches_it(reach: int, learns: bool) -> None:
    """Forty sources take turns to meet one of five destinations each, all of which every window holds."""
    period, order = 40, np.random.default_rng(0).permutation(40) % 5
    stream = stream_of([(n % period, period + order[n % period], n) for n in range(1600)], period + 5)
    settings: dict[str, Any] = {"window": reach, "batch": 20, "node_dim": 32}
    torch.manual_seed(0)
    config = {**SMALL, "node_dim": 32, "edge_dim": 0, "pair": "product", "patches": 2, "layers": 1, "hidden_dim": 64}
    model = tersor.models.create("todyformer", **config)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    training = LinkBatches(stream, begin=100, end=1400, **settings)
    for epoch in range(4):
        training.set_epoch(epoch)
        for step in range(len(training)):
            link_prediction(model.train(), training[step])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    test = LinkBatches(stream, begin=1400, **settings)
    found = average_precision(link_scores(model, test), edge_targets(test))
    assert found > 0.95 if learns else found < 0.7


@torch.no_grad()
def test_time_grows_no_faster_than_the_window() -> None:
    model = build().float()

    def seconds(events: int) -> float:
        nodes = events // 8
        inputs = {"edge_index": torch.randint(nodes, (2, events)), "time": torch.arange(events).float(),
                  "x": torch.randn(nodes, 4), "edge_attr": torch.randn(events, 2),
                  "query": torch.zeros(2, 1, dtype=torch.int64)}  # fmt: skip
        taken = []
        for _ in range(4):
            start = time.process_time()
            model(**inputs)
            taken.append(time.process_time() - start)
        return min(taken)

    assert seconds(32_000) < 8 * seconds(8_000)  # four times the work; quadratic would be sixteen times


def test_a_window_without_events_leaves_raw_features() -> None:
    model = build()
    empty = window(0)
    torch.testing.assert_close(model.nodes(**{k: v for k, v in empty.items() if k != "query"}),
                               model.norm(model.embed(empty["x"])))  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"edge_index": torch.full((2, 30), 9)}, "nodes 9 to 9, x has nodes 0 to 8"),
        ({"x": torch.zeros(9, 3)}, r"x \[nodes, 4\].*not \[9, 3\]"),
        ({"edge_attr": None}, "edge_attr.*none"),
        ({"time": torch.arange(30).flip(0)}, "event 1 is at time 28, before event 0 at 29"),
    ],
)
def test_says_what_is_wrong_with_a_window(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(TersorError, match=named):
        build()(**window(**changed))


def test_refuses_what_cannot_work() -> None:
    for config, named in (({"heads": 3}, "heads"), ({"position": "rotary"}, "'rotary'"), ({"patches": 0}, "patches")):
        with pytest.raises(TersorError, match=named):
            build(**config)
