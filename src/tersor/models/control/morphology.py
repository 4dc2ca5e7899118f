"""A body as a tree of limbs: what SET is told of it beside the limbs' states. parents: each limb's, -1 for the torso.

    relation = limb_relation([-1, 0, 1, 0])               # [L, L, 3]
    places = limb_places([-1, 0, 1, 0])                   # [3, L]

Children keep the order of their numbers. The left-child-right-sibling tree has a limb's first child at its left and its
next sibling at its right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.errors import TersorError

TRAVERSALS = ("pre", "inlcrs", "postlcrs")


def limb_relation(parents: Sequence[int], *, damping: float = 0.9) -> Tensor:
    """[L, L, 3]: personalised PageRank from limb i to j (on the tree with a loop at every limb), the symmetric
    Laplacian (without loops), and the number of joints between them over L."""
    _check(parents)
    n, A = len(parents), torch.zeros(len(parents), len(parents), dtype=torch.float64)
    for child, parent in enumerate(parents):
        if parent >= 0:
            A[child, parent] = A[parent, child] = 1
    eye = torch.eye(n, dtype=torch.float64)
    step = (A + eye) / (A + eye).sum(1, keepdim=True)
    pagerank = (1 - damping) * torch.linalg.inv(eye - damping * step)
    scale = A.sum(1).clamp(min=1).rsqrt()
    laplacian = torch.diag((A.sum(1) > 0).double()) - scale[:, None] * A * scale
    distance = torch.where(eye > 0, 0.0, torch.inf).double()
    reached = eye
    for hops in range(1, n):
        reached = ((reached @ (A + eye)) > 0).double()
        distance = torch.where((reached > 0) & distance.isinf(), float(hops), distance)
    return torch.stack((pagerank, laplacian, distance / n), -1).float()


def limb_places(parents: Sequence[int], traversals: Sequence[str] = TRAVERSALS) -> Tensor:
    """[traversals, L]: the place of each limb in each order of visits; the last two are of the left-child-right-sibling
    tree, in-order and post-order."""
    _check(parents)
    children: list[list[int]] = [[] for _ in parents]
    for limb, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(limb)
    places = torch.empty(len(traversals), len(parents), dtype=torch.int64)
    for row, name in enumerate(traversals):
        if name not in TRAVERSALS:
            raise TersorError(f"a traversal is one of {', '.join(TRAVERSALS)}, not {name!r}")
        places[row, _visits([list(parents).index(-1)], children, name)] = torch.arange(len(parents))
    return places


def _visits(siblings: list[int], children: list[list[int]], name: str) -> list[int]:
    """The first sibling with its children (left) and the other siblings (right), in the order of `name`."""
    if not siblings:
        return []
    first = siblings[0]
    left, right = _visits(children[first], children, name), _visits(siblings[1:], children, name)
    if name == "pre":
        return [first, *left, *right]
    return [*left, first, *right] if name == "inlcrs" else [*left, *right, first]


def _check(parents: Sequence[int]) -> None:
    if list(parents).count(-1) != 1:
        raise TersorError(f"a body has one limb without a parent (-1), the torso; parents are {list(parents)}")
    for limb, parent in enumerate(parents):
        seen = {limb}
        while parent != -1:
            if not 0 <= parent < len(parents) or parent in seen:
                raise TersorError(f"limb {limb} does not hang on the torso; parents are {list(parents)}")
            seen.add(parent)
            parent = parents[parent]
