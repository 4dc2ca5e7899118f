"""Attention within each graph with fewer heads, over fewer nodes (GTSP: Liu et al., "Exploring Sparsity in Graph Transformers").

A linear map scores the nodes, s = w x + b; attention then runs over the `token_ratio` of a graph's nodes that score highest.
While training, Gumbel noise is added to the scores, and the choice passes the gradient of y = softmax(log softmax(s) + noise)
straight through.

    chosen    ⌈ratio · n⌉ of the n nodes of a graph; the others take no part, neither as queries nor as keys, and get 0. What a
              graph gets does not depend on what else is in the batch, and products are saved
    masked    (published) of the L columns to which the batch is padded, padding included, ⌊ratio · L⌋ and always the last;
              the others become zero vectors that are keys still, and noise is drawn in eval mode too. Nothing is saved

With no heads left the output is 0, and only the residual path beside remains.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.drop_path import DropPath
from tersor.layers.exchange import exchangeable
from tersor.layers.straight_through import straight_through


@exchangeable
class PrunedGraphAttention(nn.Module):
    """In the place of GraphGPS' attention: x [G, n, c] padded, real [G, n] -> [G, n, c].

    heads: how many are left, of width head_dim. token_ratio: 1 for all nodes, which need no scores. masked: as published.
    dropout: of attention's weights; drop_path: how often a node skips the branch; both only while training.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        *,
        token_ratio: float = 1.0,
        masked: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.token_ratio, self.masked = heads, head_dim, token_ratio, masked
        self.dropout, self.drop_path = dropout, DropPath(drop_path)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if heads:
            self.in_proj = nn.Linear(channels, 3 * heads * head_dim, **made)
            self.out_proj = nn.Linear(heads * head_dim, channels, **made)
        self.score = nn.Linear(channels, 1, **made) if heads and token_ratio < 1 else None

    def describe(self) -> dict[str, Any]:
        return {
            "heads": self.heads,
            "head_dim": self.head_dim,
            "token_ratio": self.token_ratio,
            "masked": self.masked,
            "drop_path": self.drop_path.rate,
        }

    @classmethod
    def in_place_of(cls, original: nn.Module, **described: Any) -> PrunedGraphAttention:
        projection, dropout = getattr(original, "in_proj", None), getattr(original, "dropout", None)
        if not isinstance(projection, nn.Linear) or not isinstance(dropout, float | int):
            raise TersorError(f"a {type(original).__name__} is no attention of GraphGPS, whose place this one takes")
        weight = projection.weight
        return cls(weight.shape[1], dropout=dropout, device=weight.device, dtype=weight.dtype, **described)

    def forward(self, x: Tensor, real: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            raise TersorError("pruned graph attention takes no attention bias")
        if self.heads == 0:
            return torch.zeros_like(x)
        if self.score is None:
            y = self.attend(x, real)
        elif self.masked:
            y = self.attend(self.mask_tokens(x), real)
        else:
            index, there, weight = self.choose_tokens(x, real)
            index = index[..., None].expand(-1, -1, x.shape[-1])
            y = self.attend(x.gather(1, index) * weight[..., None], there) * there[..., None]
            y = torch.zeros_like(x).scatter(1, index, y)
        kept: Tensor = self.drop_path(y.flatten(0, 1))
        return kept.view_as(x)

    def attend(self, x: Tensor, real: Tensor) -> Tensor:
        """Multi-head attention between those tokens of x [G, k, c] that are real."""
        q, k, v = rearrange(self.in_proj(x), "g n (three h d) -> three g h n d", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, real[:, None, None], self.dropout if self.training else 0.0)
        projected: Tensor = self.out_proj(rearrange(y, "g h n d -> g n (h d)"))
        return projected

    def mask_tokens(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """As published: x [G, L, c] with zeros for what is not kept. noise [G, L]: draws of Exponential(1), if not new ones."""
        assert self.score is not None
        noise = torch.empty_like(x[..., 0]).exponential_() if noise is None else noise
        y = (self.score(x).squeeze(-1).log_softmax(-1) - noise.log()).softmax(-1)
        kept = y.topk(int(x.shape[1] * self.token_ratio)).indices
        hard = torch.zeros_like(y).scatter(1, kept, 1.0)
        mask = straight_through(hard, y)
        mask = torch.cat((mask[:, :-1], torch.ones_like(mask[:, -1:])), 1)
        return x * mask[..., None]

    def choose_tokens(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen nodes' places [G, k], which of these count [G, k] (small graphs have fewer), and 1 for each with the
        gradient of y. x [G, n, c], real [G, n]."""
        assert self.score is not None
        logits = self.score(x).squeeze(-1).masked_fill(~real, -torch.inf).log_softmax(-1)
        if self.training:
            logits = logits - torch.empty_like(logits).exponential_().log()
        counts = kept_nodes(real.sum(-1), self.token_ratio)
        index = logits.topk(int(counts.max())).indices
        there = torch.arange(index.shape[1], device=x.device) < counts[:, None]
        y = logits.softmax(-1).gather(1, index)
        return index, there, straight_through(torch.ones_like(y), y)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, token_ratio={self.token_ratio}, masked={self.masked}"


def kept_nodes(nodes: Tensor, ratio: float) -> Tensor:
    """How many of each graph's nodes attention runs over where they are chosen: ⌈ratio · nodes⌉."""
    return (nodes * ratio - 1e-6).ceil().long().clamp(min=1)
