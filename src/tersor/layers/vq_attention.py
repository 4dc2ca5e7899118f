"""Softmax attention over quantised keys in linear time, and the codebook that quantises them (Transformer-VQ, LongVQ).

    index = nearest(k, codebook)                             # (B, L, D), (S, D) -> (B, L)
    y, state = causal_vq_attention(q, k_hat, v, index, codebook, bias, block=128)
    y = vq_attention(q, k_hat, v, index, codebook, bias, block=128, valid=valid)

Every key is replaced by its codeword k_hat. Keys with one codeword have one score, so that all of them are one term,

    y_t = sum_s exp(q_t C_s) U_s / sum_s exp(q_t C_s) N_s,    U_s, N_s: sum of values and number of the keys at codeword s

exactly softmax attention, in O(L S) instead of O(L^2). Near keys are treated one by one, because each gets a bias by its
distance. In causal attention these are the keys of the query's block of `block` positions and of the block before; without
causality also those of the block behind. U is held as a mean, U / N, and log N is added to the score, so that neither grows.

The far terms pass no gradient to keys, because codewords have none; the near ones do, through `straight_through`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.layers.straight_through import straight_through


@dataclass(frozen=True)
class VQState:
    """What causal attention remembers: for far positions a mean value and a count per codeword; near positions as they are."""

    position: int  # of the next token
    count: Tensor  # (B, S)
    mean: Tensor  # (B, S, Dv)
    k: Tensor  # (B, near, D), quantised
    v: Tensor  # (B, near, Dv)
    index: Tensor  # (B, near), the codewords


def nearest(k: Tensor, codebook: Tensor) -> Tensor:
    """k (..., D) and codewords (S, D) -> the number of the nearest (...), int64."""
    distance = codebook.square().sum(-1) - 2 * k.detach() @ codebook.T  # + |k|^2, the same for all
    return distance.argmin(-1)


def empty_state(q: Tensor, v: Tensor, codes: int) -> VQState:
    """Before the first token of q (B, L, D), v (B, L, Dv)."""
    none = torch.zeros(q.shape[0], 0, dtype=torch.int64, device=q.device)
    return VQState(0, *_empty(v, codes), q[:, :0], v[:, :0], none)


def causal_vq_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    codebook: Tensor,
    bias: Tensor,
    *,
    block: int,
    state: VQState | None = None,
) -> tuple[Tensor, VQState]:
    """q, k (B, L, D) with k = codebook[index], v (B, L, Dv), bias (2 block,) by distance 0, 1, ... -> y (B, L, Dv), and the
    state after the last position. The tokens may come in pieces of any lengths."""
    state = state or empty_state(q, v, len(codebook))
    outputs, begin, length = [], 0, q.shape[1]
    while begin < length:
        if state.position % block == 0:
            state = _folded(state, block)
        end = min(length, begin + block - state.position % block)
        near = VQState(
            state.position + end - begin,
            state.count,
            state.mean,
            torch.cat((state.k, k[:, begin:end]), 1),
            torch.cat((state.v, v[:, begin:end]), 1),
            torch.cat((state.index, index[:, begin:end]), 1),
        )
        i = torch.arange(end - begin, device=q.device)[:, None] + state.k.shape[1]
        distance = i - torch.arange(near.k.shape[1], device=q.device)  # (m, near)
        added = bias[distance.clamp_min(0)].masked_fill(distance < 0, float("-inf"))
        outputs.append(_attend(q[:, begin:end], near.k, near.v, added, codebook, near.count, near.mean))
        state, begin = near, end
    return torch.cat(outputs, 1), state


def vq_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    codebook: Tensor,
    bias: Tensor,
    *,
    block: int,
    valid: Tensor | None = None,
) -> Tensor:
    """Without causality: bias (4 block - 1,) by t - t' + 2 block - 1; valid (B, L): False where a key is not seen."""
    L = q.shape[1]
    present = torch.ones(q.shape[:2], device=q.device, dtype=torch.bool) if valid is None else valid
    pieces = [(begin, min(L, begin + block)) for begin in range(0, L, block)]
    count, mean = _empty(v, len(codebook))
    for begin, end in pieces:
        count, mean = _add(count, mean, v[:, begin:end], index[:, begin:end], present[:, begin:end])
    outputs = []
    for begin, end in pieces:
        low, high = max(0, begin - block), min(L, end + block)
        near_v, near_index, near_present = v[:, low:high], index[:, low:high], present[:, low:high]
        one_hot = _one_hot(near_index, len(codebook), near_present, mean.dtype)
        far_count = count - one_hot.sum(1)
        far_sum = count[..., None] * mean - one_hot.transpose(1, 2) @ near_v.to(mean.dtype)
        far_mean = far_sum / far_count.clamp_min(1)[..., None]
        distance = torch.arange(begin, end, device=q.device)[:, None] - torch.arange(low, high, device=q.device)
        added = bias[distance + 2 * block - 1] + torch.zeros_like(near_present[:, None], dtype=bias.dtype)
        added = added.masked_fill(~near_present[:, None], float("-inf"))
        outputs.append(_attend(q[:, begin:end], k[:, low:high], near_v, added, codebook, far_count, far_mean))
    return torch.cat(outputs, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, codebook: Tensor, count: Tensor, mean: Tensor) -> Tensor:
    """q (B, m, D) over near keys (B, near, D) and codewords (S, D): (B, m, Dv)."""
    near = q @ k.transpose(1, 2) + bias  # (B, m, near)
    far = q @ codebook.T + count.log()[:, None]  # (B, m, S); a codeword without keys has -inf
    weights = torch.cat((near.to(far.dtype), far), -1).softmax(-1)
    y: Tensor = weights[..., : k.shape[1]].to(v.dtype) @ v + (weights[..., k.shape[1] :] @ mean).to(v.dtype)
    return y


def _folded(state: VQState, block: int) -> VQState:
    """At the start of a block: the older of the two near blocks becomes far."""
    if state.k.shape[1] <= block:
        return state
    old = state.k.shape[1] - block
    seen = torch.ones_like(state.index[:, :old], dtype=torch.bool)
    count, mean = _add(state.count, state.mean, state.v[:, :old], state.index[:, :old], seen)
    return VQState(state.position, count, mean, state.k[:, old:], state.v[:, old:], state.index[:, old:])


def _empty(v: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """No keys yet. In float32 at least, because 16 bits do not count keys exactly."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    return v.new_zeros(v.shape[0], codes, dtype=dtype), v.new_zeros(v.shape[0], codes, v.shape[-1], dtype=dtype)


def _add(count: Tensor, mean: Tensor, v: Tensor, index: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Count and mean value of each codeword's keys, after adding more keys."""
    one_hot = _one_hot(index, count.shape[1], present, mean.dtype)
    more = one_hot.sum(1)  # (B, S)
    total = count + more
    moved = one_hot.transpose(1, 2) @ v.to(mean.dtype) - more[..., None] * mean
    return total, mean + moved / total.clamp_min(1)[..., None]


def _one_hot(index: Tensor, codes: int, present: Tensor, dtype: torch.dtype) -> Tensor:
    return F.one_hot(index, codes).to(dtype) * present[..., None]


class Codebook(nn.Module):
    """S codewords (S, D) that follow the keys by moving averages; none of them has a gradient.

        N_s <- g N_s + (1 - g) count_s,   m_s <- g m_s + (1 - g) sum_s,   C_s = m_s / N_s

    count and sum are those of a training batch's keys at codeword s. A codeword that is hardly used any more (N_s below
    `dead`; at first, all) is placed on a random key of the batch before its keys are assigned.
    """

    def __init__(self, codes: int, d: int, *, decay: float = 0.99, dead: float = 0.01) -> None:
        super().__init__()
        self.decay, self.dead = decay, dead
        self.register_buffer("count", torch.zeros(codes))
        self.register_buffer("total", torch.zeros(codes, d))
        self.register_buffer("codewords", torch.randn(codes, d) / d**0.5)
        self.count: Tensor
        self.total: Tensor
        self.codewords: Tensor

    def forward(self, k: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """k (B, L, D) -> codewords with k's gradient (B, L, D), their numbers (B, L), and the codebook (S, D) that was used: in
        training it moves on afterwards.

        present (B, L): False where a key is padding, which does not move the codebook.
        """
        seen = slice(None) if present is None else present.flatten()
        if self.training:
            keys = k.detach().flatten(0, 1)[seen]
            self.reseed(keys)
        codewords = self.codewords.to(k.dtype, copy=True)  # what this pass uses
        index = nearest(k, codewords)
        if self.training:
            self.update(keys, index.flatten()[seen])
        return straight_through(codewords[index], k), index, codewords

    @torch.no_grad()
    def reseed(self, keys: Tensor) -> None:
        """Codewords without keys go to random ones of keys (n, D), with the count of one key."""
        dead = self.count < self.dead
        chosen = keys[torch.randint(len(keys), (len(dead),), device=keys.device)].to(self.codewords.dtype)
        self.codewords.copy_(torch.where(dead[:, None], chosen, self.codewords))
        self.total.copy_(torch.where(dead[:, None], chosen, self.total))
        self.count.copy_(torch.where(dead, torch.ones_like(self.count), self.count))

    @torch.no_grad()
    def update(self, keys: Tensor, index: Tensor) -> None:
        """keys (n, D), index (n,)."""
        one_hot = F.one_hot(index, len(self.count)).to(self.total.dtype)
        self.count.lerp_(one_hot.sum(0), 1 - self.decay)
        self.total.lerp_(one_hot.T @ keys.to(self.total.dtype), 1 - self.decay)
        self.codewords.copy_(self.total / self.count[:, None])
