"""A virtual node as a part of the data: one more node of a graph, joined to all others (LRGB's `VN-...` data sets)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tersor.errors import TersorError


class WithVirtualNode(NamedTuple):
    x: Tensor  # [N + 1, ...]: the last row is the virtual node's, zeros
    edge_index: Tensor  # [2, E + 2N]: the graph's, node -> virtual, virtual -> node
    edge_attr: Tensor  # [E + 2N, ...]: zeros for the new ones
    edge_type: Tensor  # [E + 2N]: 0, 1, 2


def add_virtual_node(x: Tensor, edge_index: Tensor, edge_attr: Tensor, *, keep_edges: bool = True) -> WithVirtualNode:
    """Of one graph, before it is batched. keep_edges=False is the published `PureVN`: only the virtual node's edges.

    The encoders see category 0 in every column of the new node and edges, and the node takes part in pooling.
    """
    n = len(x)
    if not n:
        raise TersorError("a graph without nodes gets no virtual node; leave it out of the data")
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < n:
        low, high = int(edge_index.min()), int(edge_index.max())
        raise TersorError(f"edge_index names nodes {low} to {high}, the graph has nodes 0 to {n - 1}")
    if edge_index.shape[1] != len(edge_attr):
        raise TersorError(f"edge_index has {edge_index.shape[1]} edges, edge_attr {len(edge_attr)} rows")
    if not keep_edges:
        edge_index, edge_attr = edge_index[:, :0], edge_attr[:0]
    nodes = torch.arange(n, device=x.device)
    virtual = torch.full_like(nodes, n)
    added = torch.stack((torch.cat((nodes, virtual)), torch.cat((virtual, nodes))))
    counts = torch.tensor([edge_index.shape[1], n, n], device=x.device)
    return WithVirtualNode(
        torch.cat((x, x.new_zeros(1, *x.shape[1:]))),
        torch.cat((edge_index, added), 1),
        torch.cat((edge_attr, edge_attr.new_zeros(2 * n, *edge_attr.shape[1:]))),
        torch.repeat_interleave(torch.arange(3, device=x.device), counts),
    )
