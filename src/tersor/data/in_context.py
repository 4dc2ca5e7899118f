"""Regression in context: each sample is a small data set, and the next answer is asked (arXiv 2402.13572).

    x, target = make_in_context("linear", 64, points=11, d=5, seed=0)  # (64, 22, 5), (64, 22, 1)

linear          y = w . x, w ~ N(0, I); tokens x_1, y_1, x_2, ...: y in the first channel, the others 0
sparse          the same with 3 nonzero w
representation  y = w . phi(x), phi a two-layer leaky-ReLU map that is the same for all samples of a `family`
autoregressive  x_{t+1} = A [phi(x_{t+1-q}), ..., phi(x_t)] + noise; tokens x_1, x_2, ...
chain           s_1 = phi_1(x), s_2 = phi_2(s_1), ...; each sample's own layers; tokens x, s_1, ..., s_l, x, ...

x ~ N(0, I). The target is the answer to a token, NaN where nothing is asked. Every x is asked, also the first, whose answer
nobody can know; errors fall with the number of points before. The sizes of phi (width d)
and of A, w (so that answers are about 1) are ours: the paper's generator is not published.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.errors import TersorError

KINDS = ("linear", "sparse", "representation", "autoregressive", "chain")
_NONZERO = 3


def make_in_context(
    kind: str,
    count: int,
    *,
    points: int = 41,
    d: int = 20,
    lags: int = 3,
    layers: int = 3,
    noise: float = 0.0,
    family: int = 0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Tokens (count, L, d) and targets (count, L, d or 1). lags: of the autoregression; layers: of the chain."""
    if kind not in KINDS:
        raise TersorError(f"in-context tasks are {', '.join(KINDS)}, not {kind!r}")
    if min(count, points, d, lags, layers) < 1:
        raise TersorError(
            f"count, points, d, lags and layers are at least 1; they are {(count, points, d, lags, layers)}"
        )
    chance = torch.Generator().manual_seed(seed)
    if kind == "autoregressive":
        return _autoregression(count, points, d, lags, noise, family, chance)
    x = torch.randn(count, points, d, generator=chance)
    if kind == "chain":
        return _chain(x, layers, chance)
    w = torch.randn(count, d, generator=chance)
    if kind == "sparse":
        kept = torch.rand(count, d, generator=chance).argsort(-1) < _NONZERO
        w = w * kept
    features = _representation(x, family) if kind == "representation" else x
    y = torch.einsum("bnd,bd->bn", features, w) / math.sqrt(d)
    return interleave(x, y + noise * torch.randn(y.shape, generator=chance))


def interleave(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, n, d), y (B, n) -> tokens x_1, y_1, ... (B, 2 n, d), and targets (B, 2 n, 1), asked at every x."""
    answers = F.pad(y[..., None], (0, x.shape[-1] - 1))
    asked = torch.stack((y, torch.full_like(y, math.nan)), -1)
    return torch.stack((x, answers), 2).flatten(1, 2), asked.flatten(1)[..., None]


def least_squares(x: Tensor, y: Tensor, *, ridge: float = 1e-6) -> Tensor:
    """x (B, n, d), y (B, n) -> the prediction at each x_k from the pairs before it, (B, n): 0 at first."""
    predictions = [torch.zeros_like(y[:, 0])]
    for k in range(1, x.shape[1]):
        X, Y = x[:, :k].double(), y[:, :k, None].double()
        eye = ridge * torch.eye(x.shape[-1], dtype=torch.float64)
        w = torch.linalg.solve(X.mT @ X + eye, X.mT @ Y)
        predictions.append((x[:, k : k + 1].double() @ w)[:, 0, 0].to(y))
    return torch.stack(predictions, 1)


def _representation(x: Tensor, family: int) -> Tensor:
    """phi(x) = W2 leaky_relu(W1 x), d to d, the same for one family."""
    d = x.shape[-1]
    W1, W2 = torch.randn(2, d, d, generator=torch.Generator().manual_seed(family)) / math.sqrt(d)
    features: Tensor = F.leaky_relu(x @ W1.t()) @ W2.t()
    return features


def _autoregression(
    count: int, points: int, d: int, lags: int, noise: float, family: int, chance: torch.Generator
) -> tuple[Tensor, Tensor]:
    A = torch.randn(count, d, lags * d, generator=chance) / math.sqrt(lags * d)
    states = list(torch.randn(lags, count, d, generator=chance))
    while len(states) < points + 1:
        past = torch.cat([_representation(state, family) for state in states[-lags:]], -1)
        fresh = torch.einsum("bij,bj->bi", A, past) + noise * torch.randn(count, d, generator=chance)
        states.append(
            fresh * math.sqrt(d) / fresh.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        )  # else it dies or explodes
    sequence = torch.stack(states[: points + 1], 1)
    target = sequence[:, 1:].clone()
    target[:, : lags - 1] = math.nan  # drawn, not made by the rule
    return sequence[:, :-1], target


def _chain(x: Tensor, layers: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    d = x.shape[-1]
    steps = [x]
    for _ in range(layers):
        W = torch.randn(len(x), d, d, generator=chance) * math.sqrt(2 / d)
        steps.append(torch.einsum("bij,bnj->bni", W, F.leaky_relu(steps[-1])))
    tokens = torch.stack(steps, 2)  # (B, n, layers + 1, d)
    target = torch.cat((tokens[:, :, 1:], torch.full_like(tokens[:, :, :1], math.nan)), 2)
    return tokens.flatten(1, 2), target.flatten(1, 2)
