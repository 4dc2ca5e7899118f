"""AWQ's scaling: columns that see large activations are made larger before rounding (Lin et al., MLSys 2024, arXiv 2306.00978).

What it is for: a step before `rtn` or `gptq` that moves precision to the input channels that matter most. The result has the
same architecture and computes the same; only its weights round with less error. It is not a format: any reader of the rounded
model takes it.

    tersor compress awq-scale demo --bits 4 --group-size 128 --out scaled
    tersor quantize scaled --method rtn --bits 4 --group-size 128 --out scaled-4bit

    tersor.compress("demo", [AWQScale(bits=3), RTN(bits=3)])

Give both steps the same bits, group size and symmetry. A place (`scale_places.py`) is a source of activations and the linear
layers that read it. For each place, with a_i = mean |x_i| [channels] over all tokens of the samples and W [out, channels] of
each reader:

    s(α) = aᵅ / sqrt(max aᵅ · min aᵅ)            α = 0, 1/grid, ..., (grid - 1)/grid;   aᵅ at least 1e-4
    error(α) = Σ over readers ‖(Q(W diag(s)) diag(1/s) - W) X‖²    the least is taken; Q rounds to `bits` in groups
    W ← W diag(s), the source's output ← diag(1/s) of it

The error is computed on all tokens, as tr(E H Eᵀ) with H = Σ x xᵀ. α = 0 changes nothing, so no place gets worse than by plain
rounding of its own layers.

Origin: mit-han-lab/llm-awq (MIT), not copied. There the error is that of the whole attention or MLP behind the layers, here
that of the layers themselves; clipping, its second half, is not done here (`mse` of rtn searches for ranges by the weights
alone). The pair v -> o is scaled where both have the same width, so not with grouped queries. A place is skipped where
something else reads its norm, or a layer's weight is tied. In the end weights are rounded to the model's dtype; in bfloat16
this can be seen.

Proven: equal outputs to 1e-5 in float32 on LLaMA, Gemma, GPT-2, OPT and a ViT; the error against its definition; the choice is
the best of the grid; saved results load in transformers. Measured: benchmarks/results/scaling.md. Not proven: the paper's tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tersor.formats.grid import Bits
from tersor.layers.linear_map import matrix_shape, weight_matrix
from tersor.methods.method import Method, ModelMethod, Report, Work, from_options, option, register
from tersor.methods.structure.greenformers import input_hessians, turns
from tersor.methods.weights.gptq_solver import solve_rtn
from tersor.methods.weights.scale_places import find_places, fold, sizes_of
from tersor.methods.weights.uniform import bits_option, check_grid, group_size_option, sym_option

SMALLEST = 1e-4  # of aᵅ


@dataclass(frozen=True)
class ScaledPlace(Report):
    """One place, by the name of its source."""

    readers: str  # the layers that read it
    alpha: float | None  # that was chosen; None where nothing was done, with the reason in `note`
    plain: float | None  # ‖(Q - W) X‖² / ‖W X‖² of the readers together, rounded without scales
    scaled: float | None  # and with them
    note: str = ""


@register
@dataclass(frozen=True)
class AWQScale(ModelMethod):
    """Scale channels so that rounding loses less; computes the same. A step before rtn or gptq."""

    name: ClassVar[str] = "awq-scale"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/quantization-ptq",
        "inference/quantization-llm",
    )
    keeps_size: ClassVar[bool] = True

    bits: Bits = bits_option(4, "of the rounding that follows: {}")
    group_size: int = group_size_option(128)
    sym: bool = sym_option()
    grid: int = option(20, "how many values of alpha are tried", least=1)
    linears: bool = option(
        True, "scale between two linear layers too, such as v and o, up and down", flag="--linears/--norms-only"
    )

    @classmethod
    def recipes(cls, kind: str) -> Sequence[Sequence[Method]]:
        if kind != "text":
            return []
        rounding = from_options("rtn", {"bits": 4, "group_size": 128, "mse": True})
        return [[cls(bits=4, group_size=128), rounding]]

    @torch.no_grad()
    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        places, left = find_places(model, work, of=self.name, linears=self.linears)
        for place in places:
            for name in place.readers:
                shape = matrix_shape(model.get_submodule(name))
                check_grid(name, self.bits, self.group_size, self.sym, *shape, None)
        sizes = sizes_of(model, places, work)
        first = {place.readers[0]: place for place in places if place in sizes}
        done = 0
        for names in turns({name: model.get_submodule(name) for name in first}) if first else ():
            seen = input_hessians(model, {name: model.get_submodule(name) for name in names}, work)
            for name in names:
                place = first[name]
                weights = [weight_matrix(model.get_submodule(reader)).float() for reader in place.readers]
                alpha, s, plain, scaled = self.search(weights, sizes[place].mean, seen[name].float())
                fold(model, place, s)
                work.report(ScaledPlace(place.source, ", ".join(place.readers), alpha, plain, scaled))
                done += 1
                work.progress("searching scales", done, len(first))
        left |= {place.source: "no calibration sample reached it" for place in places if place not in sizes}
        for name, why in left.items():
            work.report(ScaledPlace(name, "", None, None, None, why))
        return model

    def search(self, weights: list[Tensor], a: Tensor, H: Tensor) -> tuple[float, Tensor, float, float]:
        """The best alpha, its scales [channels], and the relative errors at alpha 0 and at the best.

        weights: of the readers, each [out, channels]; a: mean |x| [channels]; H: Σ x xᵀ [channels, channels], times any number.
        """
        W = torch.cat(weights)
        H = H.to(W)
        whole = float((W @ H).mul(W).sum()) or 1.0
        found = [(self.error(W, H, s) / whole, alpha, s) for alpha, s in self.candidates(a)]
        error, alpha, s = min(found, key=lambda each: each[0])
        return alpha, s, found[0][0], error

    def candidates(self, a: Tensor) -> Iterator[tuple[float, Tensor]]:
        for n in range(self.grid):
            s = a.float().pow(n / self.grid).clamp(min=SMALLEST)
            yield n / self.grid, s / (s.max() * s.min()).sqrt()

    def error(self, W: Tensor, H: Tensor, s: Tensor) -> float:
        """tr(E H Eᵀ), where E is the error of rounding W [out, channels] with its columns scaled by s."""
        rounded = solve_rtn(W * s, bits=self.bits, group_size=self.group_size, sym=self.sym).dequantize() / s
        E = rounded - W
        return float((E @ H).mul(E).sum())
