"""Continuous integrate-and-fire, CIF: frames with weights become one vector a token (Dong and Xu, arXiv 1905.11235).

    embeds, peaks = integrate_and_fire(hidden, alphas)                 # one prefix sum; threshold 1
    embeds, peaks, state = fire_in_steps(hidden, alphas)               # frame by frame; state goes into the next call

hidden (B, T, D), alphas (B, T) >= 0. Weights add up over time; where the sum reaches the threshold, a token fires. The
frame is then split: one part completes this token, the rest begins the next:

    emb_j = sum over its frames of (part of alpha_t) h_t               each token's parts add up to the threshold

embeds (B, N, D), N = round(sum of alphas) of the longest row or `length`; rows with fewer tokens end in zeros. peaks
(B, T): the sum so far, before the token is taken off. At most one token fires a frame.

The sum of scaled weights reaches an integer only up to rounding. It may end at 6.9999995, and then the last token is zero, here
as in the published code. Sums are in float64, so half precision does not move the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unfired:
    """What a stream carries on: weight (B,) and vector (B, D) of the token that has not fired yet."""

    weight: Tensor
    vector: Tensor


def integrate_and_fire(hidden: Tensor, alphas: Tensor, *, length: int | None = None) -> tuple[Tensor, Tensor]:
    S = alphas.cumsum(1, dtype=torch.float64).to(alphas.dtype)  # (B, T)
    whole = S.floor()
    fired = whole > torch.cat((torch.zeros_like(whole[:, :1]), whole[:, :-1]), 1)
    peaks = fired + S - whole
    before_split = (alphas[..., None] * hidden).cumsum(1) - (S - whole)[..., None] * hidden  # up to and with this token
    up_to = _fired_rows(before_split, fired, _length(alphas, length))
    embeds = up_to - torch.cat((torch.zeros_like(up_to[:, :1]), up_to[:, :-1]), 1)
    real = torch.arange(embeds.shape[1], device=fired.device) < fired.sum(1, keepdim=True)
    return embeds * real[..., None], peaks


def fire_in_steps(
    hidden: Tensor, alphas: Tensor, *, threshold: float = 1.0, length: int | None = None, state: Unfired | None = None
) -> tuple[Tensor, Tensor, Unfired]:
    weight = alphas.new_zeros(len(alphas)) if state is None else state.weight
    vector = torch.zeros_like(hidden[:, 0]) if state is None else state.vector
    peaks, frames = [], []
    for h, a in zip(hidden.unbind(1), alphas.unbind(1), strict=True):
        peak = weight + a
        fires = peak >= threshold
        here = torch.where(fires, threshold - weight, a)
        vector = vector + here[:, None] * h
        peaks.append(peak)
        frames.append(vector)
        vector = torch.where(fires[:, None], (a - here)[:, None] * h, vector)
        weight = torch.where(fires, peak - threshold, peak)
    sums = torch.stack(peaks, 1)
    fired = sums >= threshold
    if length is None and state is not None:  # in a stream, the weights of this call do not say how many tokens fire
        length = int(fired.sum(1).max())
    return _fired_rows(torch.stack(frames, 1), fired, _length(alphas, length)), sums, Unfired(weight, vector)


def _length(alphas: Tensor, length: int | None) -> int:
    return int(alphas.sum(1).round().max()) if length is None else length


def _fired_rows(rows: Tensor, fired: Tensor, length: int) -> Tensor:
    """rows (B, T, D) where `fired`, moved to the front: (B, length, D), then zeros."""
    place = torch.where(fired, fired.cumsum(1) - 1, length).clamp(max=length)  # the others go into one spare row
    kept = rows * fired[..., None]
    moved = kept.new_zeros(len(rows), length + 1, rows.shape[2])
    return moved.scatter_add(1, place[..., None].expand_as(kept), kept)[:, :length]
