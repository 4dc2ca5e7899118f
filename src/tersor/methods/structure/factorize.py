"""Linear maps and convolutions as products of two with lower rank: the published function, its rank rule, its solvers.

Greenformers (Cahyawijaya, arXiv 2108.10808). A weight seen as the matrix W [out, in] (of a convolution: in · kernel) becomes
D E with E [r, in] and D [out, r]. `greenformers.py` is the method that chooses ranks and uses calibration samples.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.layers.ced import CED
from tersor.layers.led import LED
from tersor.layers.linear_map import is_conv1d, weight_matrix

SOLVERS = ("svd", "snmf", "nmf", "random")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TINY = 1e-9  # added to denominators, as published


def factorize(
    model: nn.Module,
    rank: float,
    *,
    solver: str = "svd",
    num_iter: int = 10,
    submodules: Sequence[nn.Module] | None = None,
    deepcopy: bool = False,
    fact_led_unit: bool = False,
) -> nn.Module:
    """Replace layers of `model` by LED and CED modules, in place, and return it: the published `auto_fact`.

    rank: below 1 a share of the rank at which nothing is saved, else a rank (`rank_of`).
    solver: "svd", "snmf", "nmf", or "random" (the published default), which keeps nothing of the old weight or bias.
    num_iter: of snmf and nmf.
    submodules: take these and the layers inside them. By default, as published, all but the direct children of `model`.
    deepcopy: change a copy.
    fact_led_unit: go into LED and CED units too.

    Only the exact classes Linear, Conv1d, Conv2d, Conv3d and transformers' Conv1D are taken. As published, a layer that would
    not become smaller is kept with a warning. A layer whose weight is shared is kept too; the published code loses the tie. svd
    is exact; the published one is randomized. In a grouped convolution all groups share a factor, as published, although this
    does not approximate it. Raises TersorError on bad arguments.
    """
    _check(rank, solver, num_iter)
    if deepcopy:
        model, submodules = copy.deepcopy((model, submodules))
    if is_factorizable(model):
        return _lower(model, "the model", rank, solver, num_iter)
    listed = None if submodules is None else {id(each) for each in submodules}
    if listed is not None and not listed <= {id(each) for each in model.modules()}:
        raise TersorError("submodules holds a module that is no part of the model")
    shared = shared_layers(model)
    made: dict[int, nn.Module] = {}
    for owner, key, name in list(_places(model, "", listed, id(model) in (listed or ()), fact_led_unit)):
        layer = owner.get_submodule(key)
        if name in shared:
            warnings.warn(f"{name} shares its weight and is kept", stacklevel=2)
            continue
        if id(layer) not in made:
            made[id(layer)] = _lower(layer, name, rank, solver, num_iter)
        owner.add_module(key, made[id(layer)])
    return model


def is_factorizable(module: nn.Module) -> bool:
    """Whether it is one of the exact classes; subclasses may compute something else."""
    return type(module) in (nn.Linear, *CONVOLUTIONS) or is_conv1d(module)


def rank_of(layer: nn.Module, rank: float) -> int:
    """The published rule: the rank that `rank` means for this layer, or 0 where the layer is kept.

    limit = ⌊in · out / (in + out)⌋, of a convolution in channels, whatever its kernel (with out / groups for out). rank < 1 is
    ⌊limit · rank⌋, else ⌊rank⌋, rounded up to a multiple of the groups; at 0, and from the limit on, the layer is kept.
    """
    if isinstance(layer, CONVOLUTIONS):
        return rank_within(layer.out_channels // layer.groups, layer.in_channels, rank, layer.groups)
    outputs, inputs = weight_matrix(layer).shape
    return rank_within(outputs, inputs, rank)


def rank_within(outputs: int, inputs: int, rank: float, multiple: int = 1) -> int:
    """`rank_of` for a matrix [outputs, inputs]."""
    limit = inputs * outputs // (inputs + outputs)
    found = math.ceil(int(limit * rank if rank < 1 else rank) / multiple) * multiple
    return found if found < limit else 0


def shared_layers(model: nn.Module) -> set[str]:
    """Names of layers that share their weight with another module, or are used in several places."""
    everything = list(model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for _, module in everything for p in module._parameters.values() if p is not None)
    return {name for name, module in everything if is_factorizable(module) and owners[id(module.weight)] > 1}


@dataclass(frozen=True)
class Factors:
    """encoder E [r, in], decoder D [out, r]: W ≈ D E."""

    encoder: Tensor
    decoder: Tensor


def svd(W: Tensor, rank: int, H: Tensor | None = None) -> Factors:
    """The best factors of a rank: E = Dᵀ W, with D the leading left singular vectors of W H^½.

    Without H they minimise ‖W - D E‖ (Eckart and Young). With H, a multiple of Σ x xᵀ, they minimise ‖(W - D E) X‖, the error
    of the outputs for the inputs x. This is the optimum that SVD-LLM (arXiv 2403.07378) reaches by a Cholesky factor L of H as
    (W L)_r L⁻¹; as a projection it needs no inverse, and H may be singular. Computed in float64: with W = Q R, the vectors are
    Q times the eigenvectors of R H Rᵀ.
    """
    W = W.double()
    Q, R = torch.linalg.qr(W)
    _, vectors = torch.linalg.eigh(
        R @ R.t() if H is None else R @ H.double() @ R.t()
    )  # ascending: the largest come last
    D = Q @ vectors[:, -rank:].flip(1)
    return Factors(D.t() @ W, D)


def snmf(M: Tensor, F: Tensor, H: Tensor, num_iter: int) -> tuple[Tensor, Tensor, list[float]]:
    """Semi-NMF (Ding, Li and Jordan, 2010): M ≈ F H with H ≥ 0, from a start F, H; and ‖M - F H‖ after each iteration."""
    errors: list[float] = []
    for _ in range(num_iter):
        F = M @ H.t() @ torch.linalg.pinv(H @ H.t(), hermitian=True)
        A, B = M.t() @ F, F.t() @ F
        up = A.clamp(min=0).t() + (-B).clamp(min=0) @ H
        down = (-A).clamp(min=0).t() + B.clamp(min=0) @ H
        H = H * (up / (down + TINY)).sqrt()
        if _settled(errors, M, F, H):
            break
    return F, H, errors


def nmf(M: Tensor, F: Tensor, H: Tensor, num_iter: int) -> tuple[Tensor, Tensor, list[float]]:
    """NMF (Lee and Seung, 2001) of M ≥ 0, with the columns of F at unit length; and ‖M - F H‖ after each iteration."""
    errors: list[float] = []
    for _ in range(num_iter):
        F = F * (M @ H.t()) / (F @ H @ H.t() + TINY)
        F = F / F.norm(dim=0)
        H = H * (F.t() @ M) / (F.t() @ F @ H + TINY)
        if _settled(errors, M, F, H):
            break
    return F, H, errors


def solve(name: str, layer: nn.Module, rank: int, solver: str, num_iter: int, H: Tensor | None = None) -> Factors:
    """Factors of a layer's weight by any solver but "random", in float64. H: of its inputs, for svd. Raises TersorError where
    nmf cannot."""
    W = weight_matrix(layer).detach().double()
    if solver == "svd":
        return svd(W, rank, H)
    if solver == "nmf" and bool((W < 0).any()):
        raise TersorError(f"{name} has negative weights, which nmf cannot factorize: use the solver snmf or svd")
    start = torch.Generator().manual_seed(0)
    F, H = (
        (torch.rand(shape, generator=start, dtype=W.dtype) + 1e-4).to(W.device)
        for shape in ((W.shape[1], rank), (rank, W.shape[0]))
    )
    F, H, _ = (snmf if solver == "snmf" else nmf)(W.t(), F, H, num_iter)
    return Factors(F.t(), H.t())


def low_rank_layer(layer: nn.Module, rank: int, factors: Factors | None = None) -> nn.Module:
    """The LED or CED to put in place of a layer: with these factors and the layer's bias, or freshly initialised."""
    unit: LED | CED
    if isinstance(layer, CONVOLUTIONS):
        unit = CED.in_place_of(layer, rank)
        encoder, decoder = unit.ced_unit
    else:
        unit = LED.in_place_of(layer, rank)
        encoder, decoder = unit.led_unit
    if factors is not None:
        with torch.no_grad():
            for part, matrix in ((encoder, factors.encoder), (decoder, factors.decoder)):
                assert isinstance(part.weight, Tensor)
                part.weight.copy_(matrix.view_as(part.weight))
        decoder.bias = layer.bias
    return unit.train(layer.training)


def _lower(layer: nn.Module, name: str, rank: float, solver: str, num_iter: int) -> nn.Module:
    r = rank_of(layer, rank)
    if r == 0:
        warnings.warn(f"{name} would not become smaller at rank {rank:g} and is kept", stacklevel=3)
        return layer
    return low_rank_layer(layer, r, None if solver == "random" else solve(name, layer, r, solver, num_iter))


def _places(
    module: nn.Module, path: str, listed: Collection[int] | None, inside: bool, units_too: bool
) -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, key, full name) of every layer to replace."""
    for key, child in module._modules.items():
        if child is None or (isinstance(child, LED | CED) and not units_too):
            continue
        name = f"{path}.{key}" if path else key
        if is_factorizable(child):
            if inside or id(child) in (listed or ()):
                yield module, key, name
        else:
            yield from _places(child, name, listed, inside or listed is None or id(child) in listed, units_too)


def _check(rank: float, solver: str, num_iter: int) -> None:
    if not 0 < rank < math.inf:
        raise TersorError(f"rank={rank!r} is not allowed: a positive number, below 1 a share of what saves nothing")
    if solver not in SOLVERS:
        raise TersorError(f"solver={solver!r} is not one of {', '.join(SOLVERS)}")
    if num_iter < 1:
        raise TersorError(f"num_iter={num_iter!r} is not allowed: at least 1")


def _settled(errors: list[float], M: Tensor, F: Tensor, H: Tensor) -> bool:
    errors.append(float(torch.linalg.norm(M - F @ H)))
    return len(errors) > 1 and abs(errors[-1] - errors[-2]) / M.shape[1] < 1e-10
