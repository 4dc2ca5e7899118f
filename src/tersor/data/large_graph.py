"""One large graph for LargeGT: neighbours in compressed rows, hop features, and the sampled tokens of target nodes.

    graph = Neighbours.of(edge_index, num_nodes)
    hops = hop_features(graph, x, 2)                          # once: [P x, P^2 x]
    ids = sample_nodes(graph, targets, 50, random)            # each epoch anew; [B, 50]
    seq = hop_tokens(ids, (x, *hops))                         # [B, 150, in]

    graph = power_law_graph(10_000_000, 100_000_000)          # to try it on

`Neighbours` holds two integer arrays, which may be memory-mapped files; so may x and its hops. Sampling needs memory only
in proportion to the neighbours of the targets' neighbours, at most B (1 + most) most entries where `most` is given,
and the hop features a block of rows at a time beside their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.errors import TersorError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Neighbours:
    """Row i: the sorted different nodes to which an edge leads from node i."""

    starts: Ints  # [N + 1]
    nodes: NDArray[np.integer]  # [E]

    @classmethod
    def of(cls, edge_index: Tensor, num_nodes: int) -> Neighbours:
        source, target = edge_index.cpu().numpy()
        if len(source) and not 0 <= edge_index.min() <= edge_index.max() < num_nodes:
            low, high = int(edge_index.min()), int(edge_index.max())
            raise TersorError(f"edge_index names nodes {low} to {high}, the graph has {num_nodes}")
        keys = np.unique(source.astype(np.int64) * num_nodes + target)
        counts = np.bincount(keys // max(num_nodes, 1), minlength=num_nodes)
        return cls(np.concatenate(([0], np.cumsum(counts))), keys % max(num_nodes, 1))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def around(self, rows: Ints, most: int | None, random: np.random.Generator) -> tuple[Ints, Ints]:
        """(which of `rows`, neighbour) for all their edges; of a row with more than `most` neighbours, `most` at random."""
        first = self.starts[rows]
        counts = self.starts[rows + 1] - first
        if most is not None and (counts > most).any():
            kept, wide = np.minimum(counts, most), np.flatnonzero(counts > most)
            owner, place = _counted(kept)
            place += first[owner]
            begins = np.cumsum(kept) - kept
            for row in wide:  # the hubs
                chosen = np.sort(random.choice(counts[row], most, replace=False))
                place[begins[row] : begins[row] + most] = first[row] + chosen
            return owner, self.nodes[place].astype(np.int64)
        owner, place = _counted(counts)
        return owner, self.nodes[place + first[owner]].astype(np.int64)


def power_law_graph(num_nodes: int, num_edges: int, *, exponent: float = 2.5, seed: int = 0) -> Neighbours:
    """Exactly num_edges different directed edges, drawn at random; the share of nodes with k edges out, and of those with k
    in, falls as k^-exponent. Ends are drawn with weights (rank + 1)^(-1 / (exponent - 1)), ranks of a node out and in
    independent. Memory: about 30 bytes an edge at most.
    """
    if not 1 <= num_edges <= num_nodes * num_nodes // 4 or not exponent > 2:
        raise TersorError(
            f"there is no power-law graph of {num_nodes} nodes, {num_edges} edges and exponent {exponent}"
        )
    random = np.random.default_rng(seed)
    ranks = [random.permutation(num_nodes) for _ in range(2)]
    power = 1 / (1 - 1 / (exponent - 1))  # of u in [0, 1): the inverse of the weights' sum
    keys = np.empty(0, np.int64)
    while len(keys) < num_edges:
        missing = (num_edges - len(keys)) * 11 // 10 + 100
        drawn = np.empty(len(keys) + missing, np.int64)
        drawn[: len(keys)] = keys
        for start in range(len(keys), len(drawn), 1 << 22):
            count = min(1 << 22, len(drawn) - start)
            ends = [rank[(num_nodes * random.random(count) ** power).astype(np.int64)] for rank in ranks]
            drawn[start : start + count] = ends[0] * num_nodes + ends[1]
        drawn.sort()
        keys = drawn[np.concatenate(([True], drawn[1:] != drawn[:-1]))]
        del drawn
    keys = np.delete(keys, random.choice(len(keys), len(keys) - num_edges, replace=False))
    counts = np.zeros(num_nodes, np.int64)
    nodes: NDArray[np.integer] = np.empty(num_edges, np.int32 if num_nodes < 2**31 else np.int64)
    for start in range(0, num_edges, 1 << 22):
        part = keys[start : start + (1 << 22)]
        counts += np.bincount(part // num_nodes, minlength=num_nodes)
        nodes[start : start + (1 << 22)] = part % num_nodes
    return Neighbours(np.concatenate(([0], np.cumsum(counts))), nodes)


def hop_features(graph: Neighbours, x: Tensor, hops: int, *, block: int = 1 << 18) -> list[Tensor]:
    """P x, ..., P^hops x with P = D^-1/2 (A + I) D^-1/2, D of A + I: [N, ...] each. `block`: rows at a time."""
    if len(x) != len(graph):
        raise TersorError(f"x has {len(x)} rows, the graph {len(graph)} nodes")
    scale = torch.from_numpy(np.diff(graph.starts) + 1).to(x.dtype).rsqrt()
    columns = scale[:, None]
    results: list[Tensor] = []
    for _ in range(hops):
        propagated = torch.empty_like(x)
        for start in range(0, len(graph), block):
            rows = np.arange(start, min(start + block, len(graph)))
            owner, nodes = graph.around(rows, None, np.random.default_rng())
            there = torch.from_numpy(nodes)
            total = x[start : start + block] * columns[start : start + block]
            total = total.index_add(0, torch.from_numpy(owner), x[there] * columns[there])
            propagated[start : start + block] = total * columns[start : start + block]
        results.append(x := propagated)
    return results


def sample_nodes(
    graph: Neighbours, targets: Tensor | Ints, length: int, random: np.random.Generator, *, most: int | None = None
) -> Tensor:
    """[B, length]: each target, then length - 1 nodes drawn without replacement from the list of its neighbours and of
    the nodes two edges away (itself and neighbours may be among the latter). A shorter list is repeated in order; where
    there is none, any nodes of the graph. `most`: neighbours of a node beyond so many are first thinned at random.
    """
    rows = np.asarray(targets, np.int64)
    if length < 1:
        raise TersorError(f"a sequence of nodes has a length of at least 1, not {length}")
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(graph):
        raise TersorError(f"targets are nodes {rows.min()} to {rows.max()}, the graph has {len(graph)}")
    owner1, hop1 = graph.around(rows, most, random)
    between, hop2 = graph.around(hop1, most, random)
    keys = np.unique(owner1[between] * len(graph) + hop2)  # A A has each node once
    owner = np.concatenate((owner1, keys // len(graph)))
    nodes = np.concatenate((hop1, keys % len(graph)))
    counts = np.bincount(owner, minlength=len(rows))
    # Within a target: in random order if there are enough to choose from, else in the list's.
    enough = counts[owner] >= length - 1
    order = np.lexsort((np.where(enough, random.random(len(owner)), np.arange(len(owner))), owner))
    drawn = random.integers(len(graph), size=(len(rows), length - 1))
    some = counts > 0
    first = np.cumsum(counts) - counts
    places = first[some, None] + np.arange(length - 1) % counts[some, None]
    drawn[some] = nodes[order][places]
    return torch.from_numpy(np.concatenate((rows[:, None], drawn), 1))


def hop_tokens(ids: Tensor, features: Sequence[Tensor]) -> Tensor:
    """ids [B, K], features (x, P x, P^2 x) [N, in] -> [B, 3K, in]: the features of a node follow each other."""
    return torch.stack([each[ids] for each in features], 2).flatten(1, 2)


def spectral_positions(graph: Neighbours, width: int, *, seed: int = 0, rounds: int = 30) -> Tensor:
    """[N, width]: a fixed embedding of nodes, the eigenvectors of P that vary least along edges, each of variance 1.

    By subspace iteration, so that memory and time grow with the edges alone. Zeros beyond the N-th. Signs are arbitrary.
    """
    kept = min(width, len(graph))
    Q = torch.randn(len(graph), kept, generator=torch.Generator().manual_seed(seed))
    for _ in range(rounds):
        Q = torch.linalg.qr(Q + hop_features(graph, Q, 1)[0])[0]  # P + I has no negative eigenvalues
    values, vectors = torch.linalg.eigh(Q.T @ hop_features(graph, Q, 1)[0])
    Q = Q @ vectors[:, values.argsort(descending=True)]
    return torch.nn.functional.pad(Q * len(graph) ** 0.5, (0, width - kept))


def _counted(counts: Ints) -> tuple[Ints, Ints]:
    """counts (2, 0, 3) -> which (0 0 2 2 2) and the place in it (0 1 0 1 2)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
