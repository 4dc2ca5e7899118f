"""Greenformers: linear maps and convolutions factorized into two of lower rank (Cahyawijaya, arXiv 2108.10808).

What it is for: a model with fewer weights and fewer operations that runs on any device, at any precision, without special
kernels; and a small start for training on. The result is a plain model that the other methods take: quantize it
afterwards. Without training on, a trained model loses much at ranks that save much (see the measured numbers below).

    tersor compress demo --method greenformers --budget 0.8 --whiten --out smaller
    tersor quantize smaller --out smaller-4bit

    result = tersor.compress("demo", Greenformers(budget=0.8, whiten=True))
    model = factorize(model, 0.25, solver="random")       # the published function, to train a small model from scratch

A weight seen as the matrix W [out, in] becomes D E, of r (in + out) instead of in · out numbers:

    y = W x + b   ->   y = D (E x) + b        E [r, in], D [out, r];   keys: layer.led_unit.0.weight, layer.led_unit.1.*
    convolution   ->   the same with E a convolution to r channels and D one of kernel 1    keys: layer.ced_unit.*

How the ranks are chosen, one of:

    rank     from 1 on a rank; below 1 a share of the rank at which nothing is saved, in · out / (in + out): as published
    energy   the smallest rank that keeps this share of the squared singular values, layer by layer
    budget   the ranks for which the whole model keeps this share of its parameters, at the least sum over the layers of
             the shares of energy that are lost, greedily by energy per parameter

`whiten` counts by what a layer computes instead of by its weights: with H = Σ x xᵀ over calibration samples it minimises
‖(W - D E) X‖, the error of the outputs for the inputs X of the samples, which is never larger than that of plain SVD. It is
the optimum of SVD-LLM (arXiv 2403.07378), reached by a projection instead of a Cholesky factor's inverse, so that few samples
are enough. Solvers: svd (exact); snmf and nmf, semi-non-negative and non-negative factorization (nmf needs weights >= 0, which
trained layers hardly have); random begins anew, for training from scratch.

Taken are the exact classes Linear, Conv1d, Conv2d, Conv3d and transformers' Conv1D. Left as they are: layers that would not
become smaller; direct children of the model (stems and output heads, as published) unless `head`; layers whose weight is
shared, such as an output head tied to the embedding; grouped convolutions; routers, and experts that lie in one parameter.

Origin: SamuelCahyawijaya/greenformer at 154ca1f (MIT). There the default solver is random, an unknown one counts as
random, svd is randomized, a grouped convolution gets one factor for all groups, and ties are lost. `factorize` differs in
the first three and the last.

Proven: the golden cases of the published code (which layers are replaced, forward, products, semi-NMF and NMF to 1e-4; the
products of its randomized SVD to 1e-3, with an error that is ours to 1e-6); the parameter counts of BERT-base and GPT-2 at
ranks 100, 0.5 and 0.25; Eckart-Young; budgets met; equal outputs after saving and loading; quantizing afterwards. Measured:
benchmarks/results/greenformers.md. Not proven: the thesis' results after training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersor.calibrate.activations import Activations
from tersor.calibrate.batches import call, without_target
from tersor.calibrate.lockstep import Call
from tersor.calibrate.statistics import gather_hessians
from tersor.compress.block import STATISTICS_MEMORY
from tersor.compress.factorize import (
    CONVOLUTIONS,
    SOLVERS,
    Factors,
    is_factorizable,
    low_rank_layer,
    rank_of,
    shared_layers,
    solve,
    svd,
)
from tersor.compress.method import Method, Work, check_options, option, register
from tersor.compress.plan import ROUTERS
from tersor.errors import TersorError
from tersor.layers.ced import CED
from tersor.layers.led import LED
from tersor.layers.linear_map import is_linear_map, matrix_shape, weight_matrix


@dataclass(frozen=True)
class Factorized:
    """How one layer fared. rank: 0 where it was kept; lost: the share of the energy of its weight (whitened: of its outputs)
    that is gone; parameters: of its weight now."""

    name: str
    outputs: int
    inputs: int
    rank: int
    lost: float
    parameters: int
    note: str = ""

    def row(self) -> dict[str, Any]:
        return asdict(self)


@register
@dataclass(frozen=True)
class Greenformers(Method):
    """Factorize linear maps and convolutions into two of lower rank."""

    name: ClassVar[str] = "greenformers"
    whole_model: ClassVar[bool] = True

    rank: float | None = option(
        None,
        "of every layer; below 1 a share of the rank at which nothing is saved (0.5, where no other choice is made)",
        check=lambda v: v is None or 0 < v < float("inf"),
        allowed="a positive number",
    )
    energy: float | None = option(
        None,
        "instead of a rank: the share of the squared singular values that each layer keeps",
        check=lambda v: v is None or 0 < v < 1,
        allowed="between 0 and 1, exclusive",
    )
    budget: float | None = option(
        None,
        "instead of a rank: the share of its parameters that the model keeps",
        check=lambda v: v is None or 0 < v < 1,
        allowed="between 0 and 1, exclusive",
    )
    solver: str = option(
        "svd", "svd, snmf, nmf or random", check=lambda v: v in SOLVERS, allowed=f"one of {', '.join(SOLVERS)}"
    )
    num_iter: int = option(10, "iterations of snmf and nmf", check=lambda v: v >= 1, allowed="at least 1")
    whiten: bool = option(False, "count by the outputs for the calibration samples instead of by the weights")
    head: bool = option(False, "take the direct children of the model too, such as an output head")

    def __post_init__(self) -> None:
        check_options(self)
        given = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise TersorError(f"{given[0]} and {given[1]} exclude each other: give one of them")
        for name in ("energy", "budget", "whiten"):
            if getattr(self, name) and self.solver != "svd":
                raise TersorError(f"{name} needs the solver svd, not {self.solver!r}")

    @property
    def needs_samples(self) -> bool:
        return self.whiten

    @torch.no_grad()
    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        layers, kept = self._layers(model, work)
        factors: dict[str, Factors] = {}
        notes: dict[str, str] = {}
        if self.solver == "svd":
            factors, notes = self._svd(model, layers, work)
        ranks = self._ranks(model, layers, {name: _shares(each) for name, each in factors.items()})
        for n, (name, layer) in enumerate(layers.items(), 1):
            rank, shape = ranks[name], matrix_shape(layer)
            if rank == 0:
                kept[name] = "would not become smaller"
                continue
            if self.solver in ("snmf", "nmf"):
                factors[name] = solve(name, layer, rank, self.solver, self.num_iter)
            found = factors.pop(name, None)
            lost = 1.0 if found is None else _lost(layer, found, rank)
            lower = low_rank_layer(layer, rank, found and found.at(rank, weight_matrix(layer).dtype))
            model.set_submodule(name, lower)
            work.report(Factorized(name, *shape, rank, lost, rank * sum(shape), notes.get(name, "")))
            work.progress("replacing", n, len(layers))
        for name, why in kept.items():
            rows, columns = matrix_shape(model.get_submodule(name))
            work.report(Factorized(name, rows, columns, 0, 0.0, rows * columns, why))
        return model

    def _layers(self, model: nn.Module, work: Work) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """The layers to factorize, and why others of their kinds are kept."""
        shared = shared_layers(model)
        layers: dict[str, nn.Module] = {}
        kept: dict[str, str] = {}
        for name, module in _outside_units("", model):
            if not is_factorizable(module) or not work.wanted(name):
                continue
            if name in shared:
                kept[name] = "shares its weight with another module"
            elif ROUTERS.search(name):
                kept[name] = "chooses experts"
            elif isinstance(module, CONVOLUTIONS) and module.groups > 1:
                kept[name] = "grouped convolution"
            elif "." not in name and not self.head:
                kept[name] = "direct child of the model: head takes it too"
            else:
                layers[name] = module
        if not layers:
            why = "; ".join(f"{name}: {why}" for name, why in list(kept.items())[:1])
            raise TersorError(f"there is no layer to factorize in this {type(model).__name__}{why and f' ({why})'}")
        return layers, kept

    def _svd(
        self, model: nn.Module, layers: Mapping[str, nn.Module], work: Work
    ) -> tuple[dict[str, Factors], dict[str, str]]:
        """Factors of every layer, of as high a rank as can be of use; and notes on those that could not be whitened."""
        found: dict[str, Factors] = {}
        notes: dict[str, str] = {}
        for names in _turns(layers) if self.whiten else [list(layers)]:
            seen = _hessians(model, {name: layers[name] for name in names}, work) if self.whiten else {}
            for name in names:
                if self.whiten and name not in seen:
                    notes[name] = "not whitened: no sample reached it"
                    if not is_linear_map(layers[name]):
                        notes[name] = f"not whitened: {type(layers[name]).__name__}"
                W = weight_matrix(layers[name])
                found[name] = svd(W, seen.get(name)).at(break_even(*W.shape), W.dtype)
                work.progress("factorizing", len(found), len(layers))
        return found, notes

    def _ranks(
        self, model: nn.Module, layers: Mapping[str, nn.Module], spectra: Mapping[str, Tensor]
    ) -> dict[str, int]:
        """The rank of each layer; 0: it is kept."""
        shapes = {name: matrix_shape(layer) for name, layer in layers.items()}
        if self.energy is not None:
            return {name: rank_by_energy(spectrum, shapes[name], self.energy) for name, spectrum in spectra.items()}
        if self.budget is None:
            return {name: rank_of(layer, 0.5 if self.rank is None else self.rank) for name, layer in layers.items()}
        total = sum(parameter.numel() for parameter in model.parameters())
        ranks, saved = ranks_by_budget(spectra, shapes, total - int(self.budget * total))
        if saved < total - int(self.budget * total):
            raise TersorError(
                f"budget={self.budget:g} cannot be met: rank 1 in all {len(layers)} layers leaves "
                f"{1 - saved / total:.3f} of the parameters"
            )
        return ranks


def break_even(rows: int, columns: int) -> int:
    """The largest rank at which a layer is not larger than it was."""
    return rows * columns // (rows + columns)


def rank_by_energy(spectrum: Tensor, shape: tuple[int, int], energy: float) -> int:
    """The smallest rank whose directions add up to `energy`; 0 where it saves nothing. spectrum: shares, the largest first."""
    rank = min(int((spectrum.cumsum(0) < energy).sum()) + 1, len(spectrum))
    return rank if rank * sum(shape) < shape[0] * shape[1] else 0


def ranks_by_budget(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], to_save: int
) -> tuple[dict[str, int], int]:
    """Ranks (0: kept) that save at least `to_save` parameters at the least lost energy, and how many they save.

    A layer [out, in] at rank r saves out · in - r (out + in) and loses the sum of its spectrum past r. From one rank to the next
    lower one that is ever more energy for equally many parameters; the first step, from dense to low rank, is as large as makes
    it the cheapest. All layers' steps are taken in order of energy per parameter until enough is saved. What this saves cannot
    be saved at less energy; it may be more than asked for, by less than the last step.
    """
    steps: list[tuple[float, str, int, int]] = []  # (energy per parameter, layer, rank after it, parameters it saves)
    for name, (rows, columns) in shapes.items():
        ranks = torch.arange(1, break_even(rows, columns) + 1)
        saved = (rows * columns - ranks * (rows + columns)).double()
        lost = spectra[name].sum() - spectra[name].cumsum(0)[: len(ranks)].cpu()
        price = torch.where(saved > 0, lost / saved, torch.inf)
        if not bool((saved > 0).any()):
            continue
        first = int(price.argmin())
        steps.append((float(price[first]), name, first + 1, int(saved[first])))
        for rank in range(first, 0, -1):  # from rank + 1 to rank
            steps.append((float(spectra[name][rank]) / (rows + columns), name, rank, rows + columns))
    chosen, total = dict.fromkeys(shapes, 0), 0
    for _, name, rank, saves in sorted(steps, key=lambda step: (step[0], step[1], -step[2])):
        if total >= to_save:
            break
        chosen[name], total = rank, total + saves
    return chosen, total


def _shares(factors: Factors) -> Tensor:
    """Each direction's share of the energy."""
    assert factors.energies is not None
    return factors.energies / factors.energies.sum().clamp(min=1e-300)


def _lost(layer: nn.Module, factors: Factors, rank: int) -> float:
    if factors.energies is not None:
        return float(_shares(factors)[rank:].sum())
    W = weight_matrix(layer).double()
    return float((W - factors.decoder @ factors.encoder).square().sum() / W.square().sum())


def _outside_units(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by name, but for what is inside low-rank layers."""
    yield path, module
    if not isinstance(module, LED | CED):
        for key, child in module.named_children():
            yield from _outside_units(f"{path}.{key}" if path else key, child)


def _turns(layers: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Layers whose statistics fit together into the memory set aside for them."""
    turn: list[str] = []
    size = 0
    for name, layer in layers.items():
        needed = matrix_shape(layer)[1] ** 2 * torch.float64.itemsize
        if turn and size + needed > STATISTICS_MEMORY:
            yield turn
            turn, size = [], 0
        turn.append(name)
        size += needed
    yield turn


def _hessians(model: nn.Module, layers: Mapping[str, nn.Module], work: Work) -> dict[str, Tensor]:
    """Σ x xᵀ of the inputs of every layer that the samples reach."""

    def run(n: int, given: dict[str, Any]) -> Call:
        def forward() -> None:
            call(model, given)
            work.progress("running the samples", n + 1, len(work.samples))

        return Call(n, (), {}, forward, Activations("device"))

    maps = {name: layer for name, layer in layers.items() if is_linear_map(layer)}
    calls = [run(n, without_target(sample)) for n, sample in enumerate(work.samples)]
    gathered = gather_hessians(maps, calls, once=False) if maps else {}
    return {name: each.total for name, each in gathered.items() if each.tokens}
