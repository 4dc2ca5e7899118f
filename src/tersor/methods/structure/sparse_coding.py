"""Sparse coding for DSFormer (arXiv 2312.13211): blocks W [b, p, q] as S D, S [b, p, k] with s numbers in every row, D [b, k, q].

Everything works on all blocks of a matrix at once. No code was published; that coding is by orthogonal matching pursuit and the
basis by least squares is the abstract's form, filled in by us.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.layers.dense_sparse import largest

MOST_ROUNDS = 8  # of a pursuit; more numbers than this are chosen several at a time
RIDGE = 1e-9  # of the largest diagonal entry, so that systems with equal basis vectors can be solved


def code(W: Tensor, D: Tensor, s: int) -> Tensor:
    """S [b, p, k] with s numbers in every row that bring S D close to W [b, p, q]: orthogonal matching pursuit.

    In each round, the basis vectors most similar to the rest of a row are added (one, or s / 8 where s is above 8), and all
    numbers of the row are fitted again by least squares. Of equal ones the first is added.
    """
    b, p, _ = W.shape
    k = D.shape[1]
    norms = D.norm(dim=-1).clamp(min=1e-30)
    gram, target = D @ D.mT, W @ D.mT  # [b, k, k], [b, p, k]
    chosen = torch.zeros(b, p, k, dtype=torch.bool, device=W.device)
    S = W.new_zeros(b, p, k)
    rounds = min(s, MOST_ROUNDS)
    for n in range(rounds):
        count = s * (n + 1) // rounds - s * n // rounds
        likeness = ((target - S @ gram) / norms[:, None]).abs().masked_fill(chosen, -1.0)
        chosen.scatter_(-1, largest(likeness, count), True)
        S = fit_rows(gram, target, chosen, s * (n + 1) // rounds)
    return S


def fit_rows(gram: Tensor, target: Tensor, chosen: Tensor, count: int) -> Tensor:
    """S [b, p, k] with the least squared error among those with numbers at `chosen` alone, `count` in every row.
    gram: D Dᵀ [b, k, k], target: W Dᵀ [b, p, k]."""
    b, p, k = target.shape
    places = chosen.nonzero()[:, 2].view(b, p, count)
    S = torch.zeros_like(target)
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).amax(-1)
    eye = torch.eye(count, dtype=target.dtype, device=target.device)
    at_once = max(1, 2**24 // (b * count * count))
    for start in range(0, p, at_once):
        rows = places[:, start : start + at_once]  # [b, r, count]
        wide = gram.gather(1, rows.flatten(1)[..., None].expand(-1, -1, k)).view(*rows.shape, k)  # [b, r, count, k]
        normal = wide.gather(-1, rows[:, :, None].expand(-1, -1, count, -1)) + ridge[:, None, None, None] * eye
        wanted = target[:, start : start + at_once].gather(-1, rows)
        found = torch.linalg.solve(normal, wanted[..., None]).squeeze(-1)
        S[:, start : start + at_once].scatter_(-1, rows, found)
    return S


def fit_basis(W: Tensor, S: Tensor, D: Tensor) -> Tensor:
    """D [b, k, q] with unit rows and the least ‖W - S D‖. A vector that no row uses becomes the row of W with the largest
    error."""
    gram = S.mT @ S
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-30)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    found = torch.linalg.solve(gram + ridge[:, None, None] * eye, S.mT @ W)
    unused = ~(S != 0).any(1)  # [b, k]
    if unused.any():
        worst = (W - S @ found).norm(dim=-1).argsort(dim=-1, descending=True, stable=True)  # [b, p]
        rank = (unused.cumsum(-1) - 1).clamp(min=0) % W.shape[1]
        rows = worst.gather(1, rank)[..., None].expand(-1, -1, W.shape[-1])
        found = torch.where(unused[..., None], W.gather(1, rows), found)
    lengths = found.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 0, found / lengths.clamp(min=1e-30), D)


def learn(W: Tensor, k: int, s: int, rounds: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """S [b, p, k] and D [b, k, q] for W [b, p, q], k at most p, in float64. It starts from k random rows, then codes and fits
    the basis in turn. Returns the best of all rounds."""
    W = W.double()
    b, p, q = W.shape
    order = torch.stack([torch.randperm(p, generator=chance)[:k] for _ in range(b)])
    D = W.gather(1, order.to(W.device)[..., None].expand(-1, -1, q))
    D = D / D.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    best_S, best_D = code(W, D, s), D
    best = (W - best_S @ best_D).square().sum((1, 2))
    S = best_S
    for _ in range(rounds):
        D = fit_basis(W, S, D)
        S = code(W, D, s)
        error = (W - S @ D).square().sum((1, 2))
        better = (error < best)[:, None, None]
        best_S, best_D, best = (
            torch.where(better, S, best_S),
            torch.where(better, D, best_D),
            torch.minimum(error, best),
        )
    return best_S, best_D


def support(Z: Tensor, D: Tensor, s: int) -> Tensor:
    """The s entries of every row of Z [b, p, k] with the largest |z| times the length of its basis vector, so that the scale
    that S and D share does not matter: bool [b, p, k]. Of equal ones the first count."""
    places = largest((Z.abs() * D.norm(dim=-1)[:, None]).detach(), s)
    return torch.zeros_like(Z, dtype=torch.bool).scatter(-1, places, True)


def project(Z: Tensor, D: Tensor, s: int) -> Tensor:
    """Z with all but its support set to 0."""
    return Z * support(Z, D, s)
