"""Todyformer on a stream with planted structure, beside EdgeBank.

    python benchmarks/link_prediction.py                              # about ten minutes of one core

The stream is tersor.data.dynamic_graphs.planted_stream: 200 nodes, 30,000 events, 100 pairs that recur, 100 that meet in bursts.
The first 70 % of the events train, the last 15 % test, without a tenth of the nodes, which training never sees: "inductive" are
the test events with such a node, "transductive" the others. False pairs are any destination ("random"), or pairs that have met
before and do not meet now ("historical"); a model is trained for either kind. Average precision in %, over all test events.

Todyformer: 64 wide, 2 blocks, 16 patches, windows of 2,000 events, random vectors of 32 numbers as nodes, pair="product"; AdamW
2e-3, 8 epochs, cosine. "local only" is the same without its global part. EdgeBank remembers all pairs, or those of the window.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from common import machine, write_table

import tersor.models
from tersor.data.dynamic_graphs import LinkBatches, StreamParts, planted_stream, split_stream
from tersor.evaluate.link_prediction import edge_targets, edgebank, link_scores
from tersor.train.average_precision import average_precision
from tersor.train.config import TrainConfig
from tersor.train.objectives import link_prediction
from tersor.train.trainer import train

WINDOW, EPOCHS = 2000, 8
MODEL: dict[str, Any] = {
    "node_dim": 32,
    "hidden_dim": 64,
    "time_dim": 64,
    "layers": 2,
    "patches": 16,
    "pair": "product",
}
RECIPE = TrainConfig(epochs=EPOCHS, batch_size=1, lr=2e-3, max_grad_norm=1.0, device="cpu", log_every=50)


def batches(parts: StreamParts, negatives: str, *, inductive: bool) -> LinkBatches:
    begin, end = parts.test
    only = parts.inductive() if inductive else ~parts.inductive()
    return LinkBatches(
        parts.whole,
        window=WINDOW,
        node_dim=MODEL["node_dim"],
        begin=begin,
        end=end,
        negatives=negatives,
        only=only,
    )


def trained(parts: StreamParts, negatives: str, **changed: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = tersor.models.create("todyformer", **{**MODEL, **changed})
    training = LinkBatches(parts.train, window=WINDOW, node_dim=MODEL["node_dim"], negatives=negatives)
    started = time.process_time()

    def show(what: str, done: int, total: int) -> None:
        print(negatives, changed, f"{done}/{total} {what} {time.process_time() - started:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as out:
        train(model, training, objective=link_prediction, out=out, config=RECIPE, progress=show)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    parts = split_stream(planted_stream(events=30_000))
    rows: dict[str, list[str]] = {}
    for negatives in ("random", "historical"):
        models = {
            "Todyformer": trained(parts, negatives),
            "Todyformer, local only": trained(parts, negatives, use_global=False),
        }
        for inductive in (False, True):
            test = batches(parts, negatives, inductive=inductive)
            target = edge_targets(test)
            scores = {name: link_scores(model, test) for name, model in models.items()}
            scores["EdgeBank, all events"] = edgebank(test)
            scores["EdgeBank, the window"] = edgebank(test, memory=WINDOW)
            for name, found in scores.items():
                rows.setdefault(name, []).append(f"{100 * average_precision(found, target):.1f}")
            print(negatives, inductive, {name: cells[-1] for name, cells in rows.items()}, flush=True)
    described = (__doc__ or "").strip()
    lines = ["# Link prediction on a planted stream", "", described[described.index("The stream is") :], ""]
    lines += ["| | random, transductive | random, inductive | historical, transductive | historical, inductive |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines += [
        "",
        f"{(time.process_time() - started) / 60:.1f} minutes of one core, {machine()}.",
    ]
    lines += ["`python benchmarks/link_prediction.py`", ""]
    write_table("link_prediction", "\n".join(lines))


if __name__ == "__main__":
    main()
