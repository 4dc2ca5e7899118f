"""DopQ-ViT: RepQ-ViT with a grid for softmax outputs that is fine near 1, and merged scales that outliers do not pull.

What it is for: like RepQuant, a ViT, DeiT or Swin whose matrix products are to be computed by integers. Which of the two
loses less depends on the model: on demo-vit at 4 bits RepQuant does (benchmarks/results/vision.md), so measure both. The
saved file is smaller, because its weights are packed. The arithmetic is simulated in floating point, so nothing runs faster.

    tersor compress dopq-vit demo-vit --w-bits 4 --a-bits 4 --calibration cifar10_train.npz --out small
    tersor eval small --images cifar10_test.npz

    result = tersor.compress(model, DopQViT(w_bits=3, a_bits=4), calibration=[{"image": x} for x in images])

Yang et al., arXiv 2408.03291. The procedure is RepQ-ViT's (`methods/activations/repquant.py`), except for two things:

- TanQ (`softmax="tangent"`): a softmax output a becomes q = round(tan(k a) / s), a table of 2^b levels that lie closer
  towards 1, where the few numbers are that carry the attention (`formats/tangent_grid.py`). Largest level and k are those
  with the least error of (softmax output) · v on the calibration images, of 64 pairs.
- MOSF (`merge="median"`): a LayerNorm's channels with the scales s_i get the one scale s~ with the least mean absolute deviation,
  (1/C) Σ |s_i - s~|: their median (of an even number the lower of the two in the middle, so that it is some channel's own), where
  RepQ-ViT takes the mean. The zero point is the median of the channels' zero points too.

`softmax="logarithmic"` with `merge="mean"` is RepQ-ViT. `tune_blocks` adds reconstruction: block after block, weights learn so
that the quantized block computes what the original one did (`methods/activations/block_reconstruction.py`). They are fitted to
the 32 images: on demo-vit this cost 0.4 points at W4A4 and gained 1.7 at W3A4.

Origin: no code of the paper was found. The form of TanQ, the search for k, the zero point and the reconstruction are our own.

Proven: with RepQ-ViT's two choices put in, RepQ-ViT's golden cases to 5e-7 in float64; the properties of both quantizers (limits,
order, spacing, thresholds, optimal deviation; nearer to large attention weights than the logarithmic grid, and
farther from small ones); that the change of variables leaves the function as it is; that reconstruction never adds to a
block's error on its samples; accuracies of demo-vit in benchmarks/results/vision.md. Not proven: the paper's accuracies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import call, without_target
from tersor.formats.activation_grid import at_least_float32
from tersor.formats.tangent_grid import fit_tangent
from tersor.layers.quantized_products import OperandGrid
from tersor.methods.activations.block_reconstruction import reconstruct_blocks
from tersor.methods.activations.calibrated import fit_operand, is_softmax
from tersor.methods.activations.repquant import RepQuant, fit_weights_again, freeze, one_batch, reparameterize, wrap
from tersor.methods.method import Method, ModelMethod, Work, option, register

SOFTMAX, MERGES = ("tangent", "logarithmic"), ("median", "mean")


@register
@dataclass(frozen=True)
class DopQViT(ModelMethod):
    """Quantize weights and activations of a vision transformer after training, kind to large attention weights and outliers."""

    name: ClassVar[str] = "dopq-vit"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/quantization-ptq",
        "inference/quantization-nonuniform",
        "inference/quantization-vit",
        "practical/quantization",
    )

    w_bits: int = option(4, "bits a weight", least=2, most=8)
    a_bits: int = option(4, "bits an activation", least=2, most=8)
    softmax: str = option("tangent", "grid of softmax outputs: tangent or logarithmic (RepQ-ViT's)", choices=SOFTMAX)
    merge: str = option("median", "one scale of a LayerNorm's channels: median or mean (RepQ-ViT's)", choices=MERGES)
    tune_blocks: bool = option(False, "learn the weights of each block to give what the original block gave")
    block_steps: int = option(100, "steps of that learning", least=1)
    num_images: int = option(32, "calibration samples, of those given; they run as one batch", least=1)

    @classmethod
    def recipes(cls, kind: str) -> Sequence[Sequence[Method]]:
        return [[cls(w_bits=8, a_bits=8)]] if kind == "image" else []

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        batch = one_batch(work.samples[: self.num_images])
        plain = RepQuant(w_bits=self.w_bits, a_bits=self.a_bits)
        fit = partial(fit_tangent_pair, bits=self.a_bits) if self.softmax == "tangent" else None
        probe = without_target(dict(work.samples[0]))
        places = wrap(model, plain, probe, work.wanted, fit_products=fit, of=self.name)
        passes = 3 if self.tune_blocks else 2
        with torch.no_grad():
            work.progress("fitting grids", 0, passes)
            call(model, batch)
            reparameterize(model, places, centre=torch.median if self.merge == "median" else torch.mean)
            fit_weights_again(places, reconstruct=False)
            work.progress("fitting grids of changed weights", 1, passes)
            call(model, batch)
        notes: dict[str, str] = {}
        if self.tune_blocks:
            work.progress("reconstructing blocks", 2, passes)
            for each in reconstruct_blocks(model, places.everything(), batch, steps=self.block_steps):
                notes[each.name] = f"error of the block {each.before:.3g}, learned {each.after:.3g}"
        with torch.no_grad():
            for part in places.everything():
                part.measure = True
            call(model, batch)
            for report in freeze(model, places):
                block = next((name for name in notes if report.name.startswith(f"{name}.")), "")
                work.report(replace(report, note=report.note or notes.pop(block, "")))  # once a block
        work.progress("fitted", passes, passes)
        return model


def fit_tangent_pair(a: Tensor, b: Tensor, *, bits: int) -> tuple[OperandGrid, OperandGrid]:
    """Grids of a product's operands. A softmax output a gets the tangent grid that changes a @ b least."""
    if not is_softmax(a):
        return fit_operand(a, bits=bits), fit_operand(b, bits=bits)
    exact_a, exact_b = at_least_float32(a.detach()), at_least_float32(b.detach())
    multiplied = a.dim() == b.dim() and a.shape[-1] == b.shape[-2]

    def error(rounded: Tensor) -> Tensor:
        change = rounded - exact_a
        return (change @ exact_b if multiplied else change).square().mean()

    return fit_tangent(a, bits, error), fit_operand(b, bits=bits)
