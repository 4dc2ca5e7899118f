"""Positional and structural encodings of a graph, computed once per graph before training (GraphGPS' statistics).

edge_index [2, E] holds every undirected edge in both directions; A is its adjacency matrix, D = diag(degrees).

    random_walk_encoding          diag((D^-1 A)^k): how likely a walk of k steps is back
    laplacian_eigenpairs          the smallest eigenvalues and their eigenvectors of D - A, or normalised
    heat_kernel_encoding          diag(exp(-t (D - A))) without the constant part
    electrostatic_encoding        ten statistics of the potentials of unit charges

All are dense, in double precision, and returned in float32: meant for graphs of up to some thousand nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.errors import TersorError

_NORMS = ("L1", "L2", "abs-max")


def random_walk_encoding(edge_index: Tensor, num_nodes: int, times: Sequence[int]) -> Tensor:
    """[N, len(times)]. A node without edges stays nowhere: zeros."""
    adjacency = _adjacency(edge_index, num_nodes)
    step = adjacency / adjacency.sum(1, keepdim=True).clamp(min=1)
    returns = [torch.linalg.matrix_power(step, k).diagonal() for k in times]
    return torch.stack(returns, 1).float()


def laplacian_eigenpairs(
    edge_index: Tensor, num_nodes: int, max_freqs: int, *, laplacian_norm: str = "sym", eigvec_norm: str = "L2"
) -> tuple[Tensor, Tensor]:
    """Eigenvalues [N, max_freqs, 1], the same for every node, and eigenvectors [N, max_freqs].

    Both are NaN beyond the N-th. laplacian_norm: "none" (D - A), "sym" or "rw". Signs are arbitrary.
    """
    if eigvec_norm not in _NORMS:
        raise TersorError(f"eigvec_norm is one of {', '.join(_NORMS)}, not {eigvec_norm!r}")
    values, vectors = torch.linalg.eigh(_laplacian(edge_index, num_nodes, laplacian_norm))
    if laplacian_norm == "rw":  # similar to the symmetric one, which is what eigh has seen
        vectors = vectors * _adjacency(edge_index, num_nodes).sum(1, keepdim=True).clamp(min=1).rsqrt()
    values, vectors = values[:max_freqs].clamp(min=0), vectors[:, :max_freqs]
    size = {"L1": vectors.norm(p=1, dim=0), "L2": vectors.norm(dim=0), "abs-max": vectors.abs().amax(0)}[eigvec_norm]
    vectors = vectors / size.clamp(min=1e-12)
    missing = max(0, max_freqs - num_nodes)
    values = torch.nn.functional.pad(values, (0, missing), value=torch.nan)
    vectors = torch.nn.functional.pad(vectors, (0, missing), value=torch.nan)
    return values.float().expand(num_nodes, -1)[..., None].clone(), vectors.float()


def heat_kernel_encoding(edge_index: Tensor, num_nodes: int, times: Sequence[float]) -> Tensor:
    """[N, len(times)]: sum over the nonzero eigenvalues of exp(-t lambda) v^2."""
    values, vectors = torch.linalg.eigh(_laplacian(edge_index, num_nodes, "none"))
    nonzero = values > 1e-8
    decay = torch.exp(-torch.tensor(times, dtype=torch.float64) * values[nonzero, None])  # [freqs, times]
    encoding: Tensor = vectors[:, nonzero].square() @ decay
    return encoding.float()


def electrostatic_encoding(edge_index: Tensor, num_nodes: int) -> Tensor:
    """[N, 10] from V_ij = G_ij - G_jj, G the pseudo-inverse of D - A: min, max, mean, std over i, then over j, then the
    mean of V over a node's neighbours, both ways. The published column 5 repeats column 1 (max over i), so does ours.

    The published code inverts in float32 and does not cut the zero eigenvalue off, so its values carry rounding errors
    of the order of 1; these are the exact ones.
    """
    G = torch.linalg.pinv(_laplacian(edge_index, num_nodes, "none"), rtol=1e-9, hermitian=True)
    V = G - G.diagonal()
    adjacency = _adjacency(edge_index, num_nodes)
    among_neighbours = adjacency / adjacency.sum(1, keepdim=True).clamp(min=1) * V
    columns = [V.amin(0), V.amax(0), V.mean(0), V.std(0), V.amin(1), V.amax(0), V.mean(1), V.std(1)]
    return torch.stack([*columns, among_neighbours.sum(0), among_neighbours.sum(1)], 1).float()


def _adjacency(edge_index: Tensor, num_nodes: int) -> Tensor:
    adjacency = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
    return adjacency.index_put(tuple(edge_index.cpu()), torch.ones(1, dtype=torch.float64), accumulate=True)


def _laplacian(edge_index: Tensor, num_nodes: int, norm: str) -> Tensor:
    """Symmetric; for "rw" the symmetric one, which has the same eigenvalues."""
    adjacency = _adjacency(edge_index, num_nodes)
    degree = adjacency.sum(1)
    if norm == "none":
        return torch.diag(degree) - adjacency
    if norm not in ("sym", "rw"):
        raise TersorError(f"laplacian_norm is 'none', 'sym' or 'rw', not {norm!r}")
    scale = torch.where(degree > 0, degree, torch.inf).rsqrt()
    return torch.diag((degree > 0).double()) - scale[:, None] * adjacency * scale
