"""Streams of events: a user's file, planted structure, what a batch may see, and EdgeBank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tersor.data.dynamic_graphs import EventStream, LinkBatches, planted_stream, read_events, split_stream
from tersor.errors import TersorError
from tersor.evaluate.link_prediction import edge_targets, edgebank
from tersor.train.average_precision import average_precision


def test_a_file_with_names_and_numbers_is_read(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("time,src,amount,dst\n1,ann,2.5,bob\n1,bob,-1,cat\n4,ann,0,cat\n")
    stream = read_events(tmp_path / "e.csv")
    assert stream.names == ("ann", "bob", "cat")
    assert stream.src.tolist() == [0, 1, 0]
    assert stream.dst.tolist() == [1, 2, 2]
    assert stream.time.tolist() == [1, 1, 4]
    assert stream.features[:, 0].tolist() == [2.5, -1, 0]
    (tmp_path / "bare.csv").write_text("7,9,1\n9,7,2\n")
    assert read_events(tmp_path / "bare.csv").num_nodes == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("src,dst,time\n0,1,5\n1,0,3\n", "event 1 is at time 3, before event 0 at 5; sort the events by time"),
        ("src,dst,time\n0,1,nan\n", "row 2: time is 'nan', not a number"),
        ("src,dst,time,w\n0,1,1,x\n", "row 2: w is 'x', not a number"),
        ("src,dst\n0,1\n", "2 columns, 3 are expected"),
        ("from,to,when\n0,1,2\n", "src, dst, time is not among them"),
        ("src,dst,time\n0,1,1\n0,1\n", "row 3: 2 columns, 3 in the first row"),
        ("src,dst,time\n", "holds no events"),
        ("", "holds no events"),
    ],
)
def test_says_in_one_line_what_is_wrong_with_a_file(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "e.csv").write_text(text)
    with pytest.raises(TersorError, match=said) as caught:
        read_events(tmp_path / "e.csv")
    assert "\n" not in str(caught.value)


def test_says_what_is_wrong_with_arrays() -> None:
    ids = np.arange(3)
    for arguments, said in (
        ((ids, ids + 1, ids * 1.0, 3), "dst names nodes 1 to 3, the stream has 3"),
        ((ids, ids, np.array([0, np.inf, 1]), 3), "event 1: time is not finite"),
        ((ids, ids[:2], ids * 1.0, 3), "2 entries of dst"),
    ):
        with pytest.raises(TersorError, match=said):
            EventStream(*arguments)
    with pytest.raises(TersorError, match="3 nodes, 0 events"):
        planted_stream(nodes=3, events=0)


def test_the_planted_structure_is_there() -> None:
    stream = planted_stream(nodes=60, events=20_000, pairs=40, seed=3)
    assert len(stream) == 20_000
    shares = np.bincount(stream.kind, minlength=3) / len(stream)
    assert np.abs(shares - (0.45, 0.45, 0.1)).max() < 0.05
    assert stream.time[-1] == pytest.approx(20_000, rel=0.1)  # a unit from one event to the next
    assert stream.src.max() < 30 <= stream.dst.min()
    keys = stream.src * 60 + stream.dst

    def gaps(kind: int) -> list[Any]:
        mine = stream.kind == kind
        return [np.diff(stream.time[mine & (keys == key)]) for key in np.unique(keys[mine])]

    alone = [each for each in gaps(0) if len(each) > 20]
    steady = [each.std() / each.mean() for each in alone]
    assert np.median(steady) < 0.1
    bursts = np.concatenate(gaps(1))
    assert np.median(bursts) < 10 < 300 < bursts.max()


def test_hidden_nodes_are_not_trained_on_and_parts_follow_each_other() -> None:
    parts = split_stream(planted_stream(events=4000), hidden=0.2)
    assert parts.hidden.sum() == pytest.approx(40, abs=2)
    assert not parts.hidden[parts.train.src].any()
    assert not parts.hidden[parts.train.dst].any()
    assert parts.train.time[-1] <= parts.whole.time[parts.validation[0]]
    assert parts.validation[1] == parts.test[0]
    assert 0.1 < parts.inductive()[parts.test[0] :].mean() < 0.7


@pytest.mark.parametrize("negatives", ["random", "historical"])
def test_false_pairs_are_such_and_follow_from_seed_and_epoch(negatives: str) -> None:
    stream = planted_stream(nodes=60, events=3000, pairs=40)
    batches = LinkBatches(stream, window=300, batch=100, node_dim=3, begin=2000, negatives=negatives)
    seen = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        seen.append(batches.pairs(4))
    assert np.array_equal(seen[0].dst, seen[2].dst)
    assert not np.array_equal(seen[0].dst, seen[1].dst)
    keys = seen[0].src * 60 + seen[0].dst
    past = stream.src[: seen[0].known] * 60 + stream.dst[: seen[0].known]
    if negatives == "historical":
        assert np.isin(keys[100:], past).all()
        assert not np.isin(keys[100:], keys[:100]).any()
    else:
        assert (keys[100:] != keys[:100]).all()
        assert np.array_equal(seen[0].src[100:], seen[0].src[:100])
    assert batches[4]["x"].shape[1] == 3
    assert torch.equal(batches[4]["x"], batches[4]["x"])


def test_average_precision_is_that_of_the_definition() -> None:
    target = torch.tensor([1.0, 0, 1, 0, 0])
    assert average_precision(torch.tensor([5.0, 4, 3, 2, 1]), target) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(torch.zeros(5), target) == pytest.approx(2 / 5)  # one threshold
    assert average_precision(torch.tensor([1.0, 1, 0, 0, 0]), target) == pytest.approx((1 / 2 + 2 / 5) / 2)
    with pytest.raises(TersorError, match="at least one true pair"):
        average_precision(torch.zeros(3), torch.zeros(3))


def test_edgebank_knows_what_has_met_before_and_nothing_else() -> None:
    src, dst = np.array([0, 1, 0, 0, 1]), np.array([2, 3, 3, 2, 3])
    stream = EventStream(src, dst, np.array([0.0, 1, 2, 2, 5]), 4)
    batches = LinkBatches(stream, window=9, batch=2, begin=2)
    pairs = batches.pairs(0)
    assert pairs.known == 2
    scores = edgebank(batches)
    assert scores[:2].tolist() == [0, 1]  # 0-3 has not met yet, 0-2 has
    assert scores[4].item() == 1
    assert edgebank(batches, memory=1)[:2].tolist() == [0, 0]
    chance = LinkBatches(planted_stream(events=4000), window=1, begin=3000)
    historical = LinkBatches(planted_stream(events=4000), window=1, begin=3000, negatives="historical")
    assert average_precision(edgebank(chance), edge_targets(chance)) > 0.85
    assert average_precision(edgebank(historical), edge_targets(historical)) < 0.55


def test_a_todyformer_trains_on_a_file_of_events(tmp_path: Path, tersor_command: Callable[..., Any]) -> None:
    stream = planted_stream(nodes=20, events=600, pairs=10)
    rows = [f"u{a},i{b},{t:.3f}" for a, b, t in zip(stream.src, stream.dst, stream.time, strict=True)]
    (tmp_path / "e.csv").write_text("src,dst,time\n" + "\n".join(rows) + "\n")
    sizes = ["hidden_dim=16", "time_dim=8", "layers=1", "patches=4", "node_dim=8", 'pair="product"']
    usual = ["train", "todyformer", "--data", tmp_path / "e.csv", "--device", "cpu", "--batch-size", "1"]
    usual += [text for each in sizes for text in ("--set", f"model.{each}")]
    quick = ("--epochs", "1", "--set", "data.window=60", "--set", "data.batch=40", "--json")
    ran = tersor_command(*usual, "--out", tmp_path / "run", *quick)
    assert ran.status == 0, ran.err
    told = json.loads(ran.out)
    assert told["validation"].keys() == told["test"].keys() == {"loss", "ap"}
    assert told["steps"] == 11
    assert 0.3 < told["test"]["loss"] < 1.5  # a mean over batches
    assert 0.3 < told["test"]["ap"] <= 1
    for more, said in (
        (("--batch-size", "2"), "2 windows do not go into one step; --batch-size 1"),
        (("--set", "model.edge_dim=3"), "0 numbers an event, the model takes 3; --set model.edge_dim=0"),
        (("--set", "data.negatives=all"), "not 'all'"),
        (("--set", "data.window=0"), "window of 0"),
    ):
        ran = tersor_command(*usual, "--out", tmp_path / "other", *quick, *more)
        assert ran.status == 2
        assert said in ran.err
        assert ran.err.count("\n") == 1
