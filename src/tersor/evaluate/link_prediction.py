"""Which pairs will meet: average precision of a model and of EdgeBank, a memory of the pairs that have met.

    scores = link_scores(model, batches)                        # batches: tersor.data.dynamic_graphs.LinkBatches
    average_precision(scores, edge_targets(batches))            # of tersor.train.average_precision
    average_precision(edgebank(batches), edge_targets(batches))

EdgeBank (Poursafaei et al., NeurIPS 2022, arXiv 2207.10128) has no parameters: a pair scores 1 if it has met before the
batch, with `memory` within so many events before it; else 0.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tersor.data.dynamic_graphs import LinkBatches


@torch.no_grad()
def link_scores(model: nn.Module, batches: LinkBatches) -> Tensor:
    """The logits of all batches' pairs, one after another."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    found = []
    for index in range(len(batches)):
        inputs = {name: value.to(device) for name, value in batches[index].items() if name != "target"}
        found.append(model(**inputs).float().cpu())
    model.train(was_training)
    return torch.cat(found)


def edge_targets(batches: LinkBatches) -> Tensor:
    """1 where the pair meets, in the order of `link_scores`."""
    return torch.cat([torch.from_numpy(batches.pairs(index).target) for index in range(len(batches))])


def edgebank(batches: LinkBatches, memory: int | None = None) -> Tensor:
    """EdgeBank's scores, in the same order. memory: how many events it reaches back; None: all."""
    stream, scores = batches.stream, []
    keys = stream.src * stream.num_nodes + stream.dst
    for index in range(len(batches)):
        pairs = batches.pairs(index)
        begin = 0 if memory is None else max(0, pairs.known - memory)
        met: NDArray[np.bool_] = np.isin(pairs.src * stream.num_nodes + pairs.dst, keys[begin : pairs.known])
        scores.append(torch.from_numpy(met.astype(np.float32)))
    return torch.cat(scores)
