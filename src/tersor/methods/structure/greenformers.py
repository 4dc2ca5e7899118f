"""Greenformers: linear maps and convolutions factorized into two with lower rank (Cahyawijaya, arXiv 2108.10808).

What it is for: a model with fewer weights and fewer operations, which runs on any device, at any precision, without special
kernels. It can also be the start of further training: without that, a trained model loses much at ranks that save much (see
the measured numbers below). The result is a plain model that the other methods take, so it can be quantized afterwards.

    tersor compress greenformers demo --rank 0.75 --whiten --multiple 32 --out smaller
    tersor quantize smaller --group-size 32 --out smaller-4bit

    result = tersor.compress("demo", Greenformers(rank=0.75, whiten=True))
    model = factorize(model, 0.25, solver="random")       # the published function, to train a small model from scratch

A weight seen as the matrix W [out, in] becomes D E, of r (in + out) instead of in · out numbers:

    y = W x + b   ->   y = D (E x) + b        E [r, in], D [out, r];   keys: layer.led_unit.0.weight, layer.led_unit.1.*
    convolution   ->   the same with E a convolution to r channels and D one of kernel 1    keys: layer.ced_unit.*

How the ranks are chosen, one of:

    rank     from 1 on a rank; below 1 a share of the rank at which nothing is saved, in · out / (in + out), as published. But
             for a convolution `in` is in · kernel here. `factorize` counts only the channels, as published, which leaves at
             most rank 2 to a patch embedding of 3 channels
    energy   the smallest rank that keeps this share of the squared singular values of W, layer by layer
    budget   the ranks at which the model keeps this share of its parameters and loses the least energy, each layer's being
             1 in all; chosen greedily by energy per parameter, which is optimal but for the last step

`whiten` fits D and E to a layer's outputs instead of its weights. With H = Σ x xᵀ over calibration samples they minimise ‖(W -
D E) X‖, the error of the outputs for the samples' inputs X. It is never larger than by plain SVD. This is the optimum of
SVD-LLM (arXiv 2403.07378), but reached by a projection instead of the inverse of a Cholesky factor, so few samples are enough.
The weights alone decide the ranks.

Solvers: svd (exact); snmf and nmf, semi-non-negative and non-negative factorization (nmf needs weights >= 0, which trained
layers hardly have); random begins anew, for training from scratch.

It takes the exact classes Linear, Conv1d, Conv2d, Conv3d and transformers' Conv1D. It leaves: layers that would not become
smaller; direct children of the model (stems and output heads, as published) unless `head`; layers whose weight is shared, such
as an output head tied to the embedding; grouped convolutions; routers, and experts that lie in one parameter.

Origin: SamuelCahyawijaya/greenformer at 154ca1f (MIT). There the default solver is random, an unknown one counts as
random, svd is randomized, a grouped convolution gets one factor for all groups, and ties are lost. `factorize` differs in
the first three and the last.

Proven: the golden cases of the published code (which layers are replaced, forward, products, semi-NMF and NMF to 1e-4; the
products of its randomized SVD to 1e-3, with an error that is ours to 1e-6); the parameter counts of BERT-base and GPT-2 at
ranks 100, 0.5 and 0.25; Eckart-Young; budgets met; equal outputs after saving and loading; quantizing afterwards. Measured:
benchmarks/results/greenformers.md. Not proven: the thesis' results after training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersor.calibrate.activations import Activations
from tersor.calibrate.batches import call, without_target
from tersor.calibrate.lockstep import Call
from tersor.calibrate.routing import Rows
from tersor.calibrate.statistics import gather_hessians
from tersor.errors import TersorError
from tersor.layers.ced import CED
from tersor.layers.led import LED
from tersor.layers.linear_map import is_linear_map, matrix_shape, weight_matrix
from tersor.layers.routers import ROUTERS
from tersor.methods.block import STATISTICS_MEMORY
from tersor.methods.method import Method, ModelMethod, Report, Work, option, register
from tersor.methods.structure.factorize import (
    CONVOLUTIONS,
    SOLVERS,
    is_factorizable,
    low_rank_layer,
    rank_within,
    shared_layers,
    solve,
)


@dataclass(frozen=True)
class Factorized(Report):
    """One layer."""

    outputs: int
    inputs: int
    rank: int  # 0: it was kept
    lost: float  # the share of its weight's energy (whitened: of its outputs for the samples) that is gone
    parameters: int  # of its weight now
    note: str = ""


@register
@dataclass(frozen=True)
class Greenformers(ModelMethod):
    """Factorize linear maps and convolutions into two of lower rank."""

    name: ClassVar[str] = "greenformers"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/lightweight-factorised",
        "practical/low-rank",
    )

    rank: float | None = option(
        None,
        "of every layer; below 1 a share of the rank at which nothing is saved (0.5, where no other choice is made)",
        above=0,
        below=float("inf"),
    )
    energy: float | None = option(
        None, "instead of a rank: the share of the squared singular values that each layer keeps", above=0, below=1
    )
    budget: float | None = option(
        None, "instead of a rank: the share of its parameters that the model keeps", above=0, below=1
    )
    solver: str = option("svd", "svd, snmf, nmf or random", choices=SOLVERS)
    num_iter: int = option(10, "iterations of snmf and nmf", least=1)
    whiten: bool = option(False, "fit to the outputs for the calibration samples instead of to the weights")
    multiple: int = option(
        1,
        "round ranks down to a multiple of this (up, where none is below): 32 or more to quantize afterwards",
        least=1,
    )
    head: bool = option(False, "take the direct children of the model too, such as an output head")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise TersorError(f"{given[0]} and {given[1]} exclude each other: give one of them")
        for name in ("energy", "budget", "whiten"):
            if getattr(self, name) and self.solver != "svd":
                raise TersorError(f"{name} needs the solver svd, not {self.solver!r}")

    @classmethod
    def recipes(cls, kind: str) -> Sequence[Sequence[Method]]:
        return [[cls(rank=share)] for share in (0.9, 0.7)]

    @property
    def needs_samples(self) -> bool:
        return self.whiten

    @torch.no_grad()
    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        layers, kept = self._layers(model, work)
        ranks = self._ranks(model, layers)
        lowered = {name: layer for name, layer in layers.items() if ranks[name] > 0}
        if not lowered:
            raise TersorError(f"none of the {len(layers)} layers would become smaller: give a lower rank or energy")
        done = 0
        for names in turns(lowered) if self.whiten else [list(lowered)]:
            seen = input_hessians(model, {name: lowered[name] for name in names}, work) if self.whiten else {}
            for name in names:
                work.report(self._replace(model, name, ranks[name], seen.get(name)))
                done += 1
                work.progress("factorizing", done, len(lowered))
        spared = "would not become smaller" if self.budget is None else "spared by the budget"
        kept |= dict.fromkeys(layers.keys() - lowered.keys(), spared)
        for name, why in sorted(kept.items()):
            rows, columns = matrix_shape(model.get_submodule(name))
            work.report(Factorized(name, rows, columns, 0, 0.0, rows * columns, why))
        return model

    def _replace(self, model: nn.Module, name: str, rank: int, H: Tensor | None) -> Factorized:
        """Replace a layer by one with low rank. H: Σ x xᵀ of its inputs, where outputs are fitted."""
        layer, note = model.get_submodule(name), ""
        if self.whiten and H is None:
            note = "no sample reached it" if is_linear_map(layer) else type(layer).__name__
            note = f"not whitened: {note}"
        W, factors, lost = weight_matrix(layer), None, 1.0
        rows, columns = W.shape
        if self.solver != "random":
            factors = solve(name, layer, rank, self.solver, self.num_iter, H)
            error = W.double() - factors.decoder @ factors.encoder
            lost = _energy(error, H) / max(_energy(W.double(), H), 1e-300)
        model.set_submodule(name, low_rank_layer(layer, rank, factors))
        return Factorized(name, rows, columns, rank, lost, rank * (rows + columns), note)

    def _layers(self, model: nn.Module, work: Work) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """The layers to factorize; and others of their kinds, each with the reason why it is kept."""
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

    def _ranks(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, int]:
        """The rank of each layer; 0: it is kept."""
        shapes = {name: matrix_shape(layer) for name, layer in layers.items()}
        if self.energy is None and self.budget is None:
            rank = 0.5 if self.rank is None else self.rank
            return {name: self._rounded(rank_within(*shape, rank), shape) for name, shape in shapes.items()}
        spectra = {name: spectrum(weight_matrix(layer)) for name, layer in layers.items()}
        if self.energy is not None:
            return {n: self._rounded(rank_by_energy(spectra[n], shapes[n], self.energy), shapes[n]) for n in layers}
        assert self.budget is not None
        total = sum(parameter.numel() for parameter in model.parameters())
        ranks, _ = ranks_by_budget(spectra, shapes, total - int(self.budget * total))
        ranks = {name: self._rounded(rank, shapes[name]) for name, rank in ranks.items()}
        left = total - sum(
            rank and o * i - rank * (o + i) for rank, (o, i) in zip(ranks.values(), shapes.values(), strict=True)
        )
        if left > self.budget * total:
            raise TersorError(
                f"budget={self.budget:g} cannot be met: the lowest ranks in all {len(layers)} layers leave "
                f"{left / total:.3f} of the parameters"
            )
        return ranks

    def _rounded(self, rank: int, shape: tuple[int, int]) -> int:
        found = max(rank // self.multiple, 1) * self.multiple if rank else 0
        return found if found * sum(shape) < shape[0] * shape[1] else 0


def spectrum(W: Tensor) -> Tensor:
    """The share of each singular direction in ‖W‖², the largest first."""
    energies: Tensor = torch.linalg.svdvals(W.double()).square()
    return energies / energies.sum().clamp(min=1e-300)


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

    A layer [out, in] at rank r saves out · in - r (out + in) and loses the sum of its spectrum past r. Each lower rank saves
    the same number of parameters for more energy. The first step, from dense to low rank, has the size with the least energy
    per parameter. The steps of all layers are taken in order of energy per parameter until enough is saved; then nothing saves
    as much at less energy. What the last step saves beyond `to_save` is given back to its layer.
    """
    steps: list[tuple[float, str, int, int]] = []  # (energy per parameter, layer, rank after it, parameters it saves)
    for name, (rows, columns) in shapes.items():
        energies, a_rank = spectra[name].cpu(), rows + columns
        saved = rows * columns - a_rank * torch.arange(1, break_even(rows, columns) + 1)
        saved = saved[saved > 0]
        if len(saved) == 0:
            continue
        prices = (energies.sum() - energies.cumsum(0)[: len(saved)]) / saved
        first = int(prices.argmin()) + 1
        price = float(prices[first - 1])
        steps.append((price, name, first, int(saved[first - 1])))
        for rank in range(first - 1, 0, -1):
            price = max(price, float(energies[rank]) / a_rank)  # never below the step before, even by rounding
            steps.append((price, name, rank, a_rank))
    chosen, total = dict.fromkeys(shapes, 0), 0
    for _, name, rank, saves in sorted(steps, key=lambda step: (step[0], step[1], -step[2])):
        if total >= to_save:
            break
        chosen[name], total = rank, total + saves
        last = name
    if total > to_save:
        back = (total - to_save) // sum(shapes[last])
        chosen[last], total = chosen[last] + back, total - back * sum(shapes[last])
    return chosen, total


def _energy(matrix: Tensor, H: Tensor | None) -> float:
    """‖matrix‖²; with H = X Xᵀ, ‖matrix X‖²."""
    return float((matrix if H is None else matrix @ H).mul(matrix).sum())


def _outside_units(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by name, without those inside low-rank layers."""
    yield path, module
    if not isinstance(module, LED | CED):
        for key, child in module.named_children():
            yield from _outside_units(f"{path}.{key}" if path else key, child)


def turns(layers: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Groups of layers whose statistics fit into memory together."""
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


def input_hessians(model: nn.Module, layers: Mapping[str, nn.Module], work: Work) -> dict[str, Tensor]:
    """Σ x xᵀ of the inputs of every layer that the samples reach."""

    def run(n: int, given: dict[str, Any]) -> Call:
        def forward() -> None:
            call(model, given)
            work.progress("running the samples", n + 1, len(work.samples))

        return Call(n, (n,), (), {}, forward, Activations("device"))

    maps = {name: layer for name, layer in layers.items() if is_linear_map(layer)}
    calls = [run(n, without_target(sample)) for n, sample in enumerate(work.samples)]
    gathered = gather_hessians(maps, calls, Rows(), once=False) if maps else {}
    return {name: each.total for name, each in gathered.items() if each.tokens}
