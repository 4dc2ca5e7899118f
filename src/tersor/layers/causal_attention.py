"""Causal self-attention with grouped heads, whole sequences or token by token."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

KeysValues = tuple[Tensor, ...]  # keys and values [b, past, kv heads, d], and which past tokens count [b, past]


def attend(
    q: Tensor, k: Tensor, v: Tensor, state: KeysValues | None = None, mask: Tensor | None = None
) -> tuple[Tensor, KeysValues]:
    """q [b, l, heads, d], k, v [b, l, kv heads, d] -> [b, l, heads d], and the state for the tokens that follow.

    Where `mask` [b, l] is False nobody else attends to the token, now or later.
    """
    batch, length = q.shape[:2]
    visible = q.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
    allowed = None
    if state is not None:
        k, v, visible = (torch.cat(pair, 1) for pair in zip(state, (k, v, visible), strict=True))
    if state is not None or mask is not None:
        past = k.shape[1] - length
        earlier = torch.ones(length, k.shape[1], dtype=torch.bool, device=q.device).tril(past)
        allowed = earlier & visible[:, None, None] | earlier.triu(past)  # with the diagonal, so that no row is empty
    Q, K, V = (rearrange(each, "b l h d -> b h l d") for each in (q, k, v))
    Y = F.scaled_dot_product_attention(Q, K, V, attn_mask=allowed, is_causal=allowed is None, enable_gqa=True)
    return rearrange(Y, "b h l d -> b l (h d)"), (k, v, visible)
