"""Minimum word error rate training for models that give all tokens at once (Paraformer, arXiv 2206.08317).

    paths = sample_paths(log_probs, count=4)                       # (B, P, N): the best tokens, at random the second best
    loss = mwer_loss(log_probs, lengths, reference, reference_lengths, paths=paths).mean()

    loss = sum_i P(y_i) (W(y_i) - mean W)         P: path probabilities normalised over the P paths of a sample

W is the edit distance to the reference in tokens. The loss is zero where all paths are equally wrong; its gradient makes
paths better than the mean likelier. The paper drops each best token with probability 1/2; its code is not published.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_paths(log_probs: Tensor, *, count: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """log_probs (B, N, V) -> token ids (B, count, N)."""
    B, N, _ = log_probs.shape
    best, second = log_probs.detach().topk(2, -1).indices.unbind(-1)  # (B, N) each
    dropped = torch.rand(B, count, N, generator=generator).to(log_probs.device) < 0.5
    return torch.where(dropped, second[:, None], best[:, None])


def mwer_loss(
    log_probs: Tensor,
    lengths: Tensor,
    reference: Tensor,
    reference_lengths: Tensor,
    *,
    paths: Tensor,
    ignored: tuple[int, ...] = (0, 1, 2),  # blank, start and end do not count as words
) -> Tensor:
    """(B,). log_probs (B, N, V), paths (B, P, N); positions from `lengths` on do not count."""
    N = log_probs.shape[1]
    real = torch.arange(N, device=lengths.device) < lengths[:, None]  # (B, N)
    scores = log_probs[:, None].expand(-1, paths.shape[1], -1, -1).gather(-1, paths[..., None])[..., 0]  # (B, P, N)
    share = (scores * real[:, None]).sum(-1).softmax(1)  # (B, P)
    wrong = torch.tensor(
        [
            [edit_distance(_words(path[:n], ignored), _words(words[:m], ignored)) for path in sample]
            for sample, n, words, m in zip(
                paths.tolist(), lengths.tolist(), reference.tolist(), reference_lengths.tolist(), strict=True
            )
        ]
    ).to(share)
    return (share * (wrong - wrong.mean(1, keepdim=True))).sum(1)


def edit_distance(a: list[int], b: list[int]) -> int:
    """Insertions, deletions and replacements from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def _words(tokens: list[int], ignored: tuple[int, ...]) -> list[int]:
    return [token for token in tokens if token not in ignored]
