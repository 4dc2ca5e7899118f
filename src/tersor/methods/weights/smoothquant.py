"""SmoothQuant's smoothing: outliers of the activations move into the weights (Xiao et al., ICML 2023, arXiv 2211.10438).

What it is for: a step before activations are quantized, with this project's methods or elsewhere. A grid for a whole tensor has
few levels left for ordinary channels beside outliers; after smoothing, channels are more alike. The result has the same
architecture and computes the same. Before weights alone are rounded, `awq-scale` is the better step: it looks at the error.

    tersor compress smoothquant demo --alpha 0.5 --out smooth
    tersor quantize smooth --method rtn --bits 8 --out smooth-8bit

    tersor.compress("demo", [SmoothQuant(alpha=0.5), RTN(bits=8)])

A place (`scale_places.py`) is a source of activations and the linear layers that read it. For each place, with max|x_j| over all
tokens of the samples and max|W_j| in column j over all readers:

    s_j = max|x_j|ᵅ / max|W_j|^(1-α), at least 1e-5        x ← x / s,  W ← W diag(s)

α = 0.5 makes both equally hard to round; 0.75 and more suit models with stronger outliers. A channel without activations or
without weights keeps s_j = 1.

Origin: mit-han-lab/smoothquant (MIT), not copied. There only norms are sources, as here with `--norms-only`. v -> o and up ->
down are scaled where both have the same width and what lies between scales each channel by itself.

Proven: the formula, and equal ranges of x and W at α = 0.5; equal outputs to 1e-5 in float32 on LLaMA, Gemma, GPT-2, OPT and a
ViT; saved results load in transformers. Not proven: the paper's W8A8 tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tersor.layers.linear_map import weight_matrix
from tersor.methods.method import ModelMethod, Report, Work, option, register
from tersor.methods.weights.scale_places import find_places, fold, sizes_of

SMALLEST = 1e-5  # a lower bound of scales, and of a column's largest weight


@dataclass(frozen=True)
class SmoothedPlace(Report):
    """One place, by the name of its source."""

    readers: str  # the layers that read it; none where nothing was done, with the reason in `note`
    before: float | None  # the largest activation of all channels, divided by the median channel's
    after: float | None
    note: str = ""


@register
@dataclass(frozen=True)
class SmoothQuant(ModelMethod):
    """Move outliers from activations into weights; computes the same. A step before quantization."""

    name: ClassVar[str] = "smoothquant"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/quantization-ptq",
        "inference/quantization-llm",
    )
    keeps_size: ClassVar[bool] = True

    alpha: float = option(0.5, "how much of the outliers goes into the weights", least=0, most=1)
    linears: bool = option(
        True, "scale between two linear layers too, such as v and o, up and down", flag="--linears/--norms-only"
    )

    @torch.no_grad()
    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        places, left = find_places(model, work, of=self.name, linears=self.linears)
        sizes = sizes_of(model, places, work)
        for place in places:
            if place not in sizes:
                left[place.source] = "no calibration sample reached it"
                continue
            x = sizes[place].largest
            s = scales(x, [weight_matrix(model.get_submodule(name)) for name in place.readers], self.alpha)
            fold(model, place, s)
            work.report(SmoothedPlace(place.source, ", ".join(place.readers), _peak(x), _peak(x / s)))
        for name, why in left.items():
            work.report(SmoothedPlace(name, "", None, None, why))
        return model


def scales(x: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """s [channels] in float32. x: the largest |activation| of each channel; weights: of the readers, each [out, channels]."""
    W = torch.stack([each.float().abs().amax(0) for each in weights]).amax(0)
    s = x.pow(alpha) / W.clamp(min=SMALLEST).pow(1 - alpha)
    return torch.where((x == 0) | (W == 0), torch.ones_like(s), s.clamp(min=SMALLEST))


def _peak(x: Tensor) -> float | None:
    middle = float(x.median())
    return float(x.max()) / middle if middle > 0 else None
