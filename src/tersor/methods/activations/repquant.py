"""RepQuant: weights and activations of a vision transformer in few bits, from 32 images and without training.

What it is for: a ViT, DeiT or Swin whose matrix products are to be computed by integers. Weights are rounded to grids of
2^w_bits levels; the inputs of every layer and of both products of the attention to grids of 2^a_bits levels. The saved file is
smaller, because its weights are packed. The arithmetic is simulated in floating point, so nothing runs faster. If only the
weights must be small, GPTQ (`tersor quantize`) loses less.

    tersor compress repquant demo-vit --w-bits 6 --a-bits 6 --calibration cifar10_train.npz --out small
    tersor eval small --images cifar10_test.npz

    result = tersor.compress(model, RepQuant(w_bits=4, a_bits=4), calibration=[{"image": x} for x in images])

The defaults are RepQ-ViT as published (Li, Xiao, Yang, Gu, ICCV 2023, arXiv 2212.08254, whose code is Apache-2.0):

- A uniform grid has x̂ = s (q - z), q = clamp(round(x / s) + z, 0, 2^b - 1), its range chosen among quantiles; softmax outputs
  have a logarithmic one, D · √2^(-k) (`formats/activation_grid.py`). Weights have one grid per output, activations one in all. A
  convolution reads the image, which always has 8 bits.
- Every grid is fitted when the first batch reaches it, so to the outputs of the quantized layers before it.
- The channels of a LayerNorm's output have very different ranges, so each gets a grid of its own (s_i, z_i) at first.
  Then, with s̃, z̃ their means, r_i = s_i / s̃ and b_i = s̃ (z̃ - z_i), an exact change of variables makes it one grid (s̃, z̃):
  γ_i ← γ_i / r_i, β_i ← β_i / r_i - b_i, W_oi ← W_oi r_i, c ← c + W b. z̃ is a fraction, added after rounding. A second pass
  fits the grids of the changed weights.

RepQuant (arXiv 2402.05628), whose code is not public, adds two things, which are options here, in our reading of the paper:

- `dual_clipping` learns both ends of each channel's range after a LayerNorm (`methods/activations/dual_clipping.py`).
- `reconstruct` chooses, in the second pass, the codes of all weights on the same grids so that ‖(Q - W) x̂‖² is small on the
  quantized inputs x̂: by GPTQ's solver, and by rounding for those outputs where that is better.

The places of grids are found by running the model, not by names: `norm_pairs.py` finds LayerNorms and their readers, and
`layers/products.py` the products (PyTorch's fused attention is then computed step by step). The final norm, outside the
repeated blocks, is not touched. Parts that cannot be quantized are listed with the reason: nn.MultiheadAttention, tied weights,
layers that no image reaches. The table shows each part's error on the calibration images.

Proven: the golden cases (grids at 3, 4, 6 and 8 bits; the whole procedure on ViT and DeiT-tiny at 4 and 6 bits) to 5e-7 of what
the published code computes, in float64; the function is unchanged by the change of variables, on our ViT and on transformers'
ViT and Swin; accuracies of demo-vit in benchmarks/results/vision.md. Not proven: ImageNet accuracies; that the two
additions reach the paper's numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import Batch, call, without_target
from tersor.errors import TersorError
from tersor.formats.activation_grid import at_least_float32, fit_uniform
from tersor.formats.grid import Grid
from tersor.layers.linear_map import computes_its_own, linear_maps, weight_matrix
from tersor.layers.products import Products
from tersor.methods.activations.calibrated import (
    CalibratedMap,
    CalibratedProducts,
    FitPair,
    InputGrid,
    each_operand,
    fit_operand,
)
from tersor.methods.activations.dual_clipping import learn_clipping
from tersor.methods.activations.norm_pairs import NormPair, find_norm_pairs
from tersor.methods.method import Method, ModelMethod, Report, Work, option, register

CONVOLUTION_BITS = 8  # of the image, which the patch embedding reads
UNREACHED = "no calibration sample reached it"


@dataclass(frozen=True)
class RepQuantReport(Report):
    """One row."""

    reads: str  # "layer norm", "tensor" or "products"
    bits: str  # as in W4A4
    # Of a layer ‖Q x̂ - W x‖² / ‖W x‖² on the calibration batch; of products ‖x̂ - x‖² / ‖x‖² of the worst operand.
    error: float
    note: str = ""


@register
@dataclass(frozen=True)
class RepQuant(ModelMethod):
    """Quantize weights and activations of a vision transformer after training, from 32 images."""

    name: ClassVar[str] = "repquant"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/quantization-ptq",
        "inference/quantization-nonuniform",
        "inference/quantization-vit",
        "practical/quantization",
    )

    w_bits: int = option(4, "bits a weight", least=2, most=8)
    a_bits: int = option(4, "bits an activation", least=2, most=8)
    dual_clipping: bool = option(False, "learn the ranges of what LayerNorms give out, each end by itself")
    reconstruct: bool = option(False, "choose weights by the layer's output on quantized inputs, not by rounding")
    num_images: int = option(32, "calibration samples, of those given; they run as one batch", least=1)

    @classmethod
    def recipes(cls, kind: str) -> Sequence[Sequence[Method]]:
        return [[cls(w_bits=bits, a_bits=bits)] for bits in (8, 6)] if kind == "image" else []

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        batch = one_batch(work.samples[: self.num_images])
        places = wrap(model, self, without_target(dict(work.samples[0])), work.wanted)
        with torch.no_grad():
            work.progress("fitting grids", 0, 2)
            call(model, batch)
            reparameterize(model, places)
            fit_weights_again(places, reconstruct=self.reconstruct)
            for each in places.everything():
                each.measure = True
            work.progress("fitting grids of changed weights", 1, 2)
            call(model, batch)
            for report in freeze(model, places):
                work.report(report)
        work.progress("fitted", 2, 2)
        return model


@dataclass
class Places:
    """What is quantized, by name; and what is left as it is, each with the reason."""

    maps: dict[str, CalibratedMap] = field(default_factory=dict)
    products: dict[str, CalibratedProducts] = field(default_factory=dict)
    pairs: list[NormPair] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def everything(self) -> list[CalibratedMap | CalibratedProducts]:
        return [*self.maps.values(), *self.products.values()]


def one_batch(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """The samples as one batch, without labels: every grid is fitted on all of them at once."""
    if not samples:
        raise TersorError("no calibration samples: give --calibration a folder of images or a packed .npz")
    first = without_target(dict(samples[0]))
    return {name: _joined(name, [sample.get(name) for sample in samples]) for name in first}


def _joined(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        shapes = {tuple(each.shape[1:]) if isinstance(each, Tensor) else None for each in values}
        if len(shapes) > 1 or first.dim() == 0:
            raise TersorError(f"the calibration samples' {name!r} differ in shape, so they make no batch: {shapes}")
        return torch.cat(values)
    if isinstance(first, tuple | list):
        return type(first)(_joined(name, list(each)) for each in zip(*values, strict=True))
    return first


def wrap(
    model: nn.Module,
    method: RepQuant,
    probe: Batch,
    wanted: Callable[[str], bool],
    *,
    fit_products: FitPair | None = None,
    of: str = "repquant",
) -> Places:
    """Replace the model's layers and products by calibrated ones. probe: inputs for the model, of any size.

    fit_products: fits the grids of a product's operands; None: as RepQ-ViT does. of: the method that asks. Raises TersorError
    where there is no LayerNorm that linear layers read.
    """
    places = Places()
    maps = quantizable_maps(model, wanted, places.left)
    products = product_sites(model, probe, wanted, places.left)
    places.pairs = find_norm_pairs(model, probe, maps)
    if not places.pairs:
        raise TersorError(
            f"{of} needs a LayerNorm whose output goes to linear layers alone, and finds none in the blocks of "
            f"{type(model).__name__}; for weights alone use tersor quantize"
        )
    inputs: dict[str, InputGrid] = {}
    for pair in places.pairs:
        readers = [maps[name] for name in pair.linears]
        fit = partial(_fit_norm_output, bits=method.a_bits, readers=readers if method.dual_clipping else None)
        inputs |= dict.fromkeys(pair.linears, InputGrid(method.a_bits, fit))
    for name, module in maps.items():
        bits = CONVOLUTION_BITS if isinstance(module, nn.Conv2d) else method.a_bits
        grid = inputs.get(name) or InputGrid(bits, partial(fit_uniform, bits=bits))
        places.maps[name] = CalibratedMap(module, method.w_bits, grid)
        model.set_submodule(name, places.maps[name])
    fit_products = fit_products or each_operand(partial(fit_operand, bits=method.a_bits))
    for name, module in products.items():
        places.products[name] = CalibratedProducts(module, method.a_bits, fit_products)
        model.set_submodule(name, places.products[name])
    return places


def quantizable_maps(
    model: nn.Module, wanted: Callable[[str], bool], left: dict[str, str], *, grouped: bool = False
) -> dict[str, nn.Module]:
    """The layers to quantize by name; in `left` those that cannot be. grouped: grouped convolutions too."""
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    candidates = dict(linear_maps(model))
    if grouped:
        candidates |= {name: each for name, each in model.named_modules() if _is_grouped_convolution(each)}
    for name, module in candidates.items():
        if not wanted(name):
            continue
        if not isinstance(module, nn.Module):
            left[name] = "an expert of a stack"
        elif computes_its_own(module):
            left[name] = f"{type(module).__name__} computes in a way of its own"
        elif names[id(module.weight)] > 1:
            left[name] = "its weight is used elsewhere too"
        else:
            found[name] = module
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            left[name] = "nn.MultiheadAttention hides its layers and products"
    return found


def _is_grouped_convolution(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return False
    return module.groups > 1


@torch.no_grad()
def product_sites(
    model: nn.Module, probe: Batch, wanted: Callable[[str], bool], left: dict[str, str]
) -> dict[str, nn.Module]:
    """The innermost modules that multiply activations, by name; in `left` those around others."""
    running: list[str] = []
    found: set[str] = set()

    def note(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        found.add(running[-1])
        return a, b

    with ExitStack() as hooks, Products(note):
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(lambda _m, _args, name=name: running.append(name)))
            hooks.enter_context(module.register_forward_hook(lambda *_: running.pop() and None))
        call(model, probe)
    modules = dict(model.named_modules())
    sites = {name: modules[name] for name in modules if name in found and wanted(name)}
    for name in list(sites):
        if not name or any(other.startswith(f"{name}.") for other in sites):
            left[name or "the model itself"] = "multiplies activations around a module that does so too"
            del sites[name]
    return sites


def _fit_norm_output(x: Tensor, *, bits: int, readers: Sequence[nn.Module] | None) -> Grid:
    """One grid per channel, scale and zero [channels]. readers: layers; the ranges learn from their output error."""
    tokens = at_least_float32(x.flatten(0, -2))
    grid = fit_uniform(tokens, bits, channel=1)
    grid = Grid(grid.scale[0], grid.zero[0], bits)
    if readers is None:
        return grid
    return learn_clipping(tokens, torch.cat([weight_matrix(each).detach() for each in readers]).to(tokens), grid)


def reparameterize(model: nn.Module, places: Places, centre: Callable[[Tensor], Tensor] = torch.mean) -> None:
    """Give each pair one grid for all channels, by an exact change of variables that leaves the model's function as it is.

    centre: from the channels' scales [channels] to the scale of the one grid, and the same for zero points.
    """
    for pair in places.pairs:
        norm, readers = model.get_submodule(pair.norm), [places.maps[name] for name in pair.linears]
        grid = readers[0].input.found
        if grid is None:  # no sample reached it
            continue
        scale, zero = centre(grid.scale), centre(grid.zero)
        r, b = grid.scale / scale, scale * (zero - grid.zero)
        for values in (norm.weight, norm.bias):
            assert isinstance(values, Tensor)
            values.div_(r.to(values.dtype))
        norm.bias.sub_(b)  # type: ignore[operator]
        for reader in readers:
            W = weight_matrix(reader.original)
            W.mul_(r.to(W.dtype))
            moved = W @ b.to(W.dtype)
            bias = reader.original.bias
            assert bias is None or isinstance(bias, Tensor)
            reader.original.bias = nn.Parameter(moved if bias is None else bias + moved, requires_grad=False)
        readers[0].input.found = Grid(scale, zero, grid.bits)


def fit_weights_again(places: Places, *, reconstruct: bool) -> None:
    """Let the next call fit the grids of changed weights again, or choose all weights anew."""
    changed = {name for pair in places.pairs for name in pair.linears}
    for name, each in places.maps.items():
        if reconstruct or name in changed:
            each.codes, each.reconstruct = None, reconstruct


def freeze(model: nn.Module, places: Places) -> list[RepQuantReport]:
    """Replace the calibrated layers by the stored ones. Returns a row for each."""
    reports = []
    normed = {name for pair in places.pairs for name in pair.linears}
    for name, products in places.products.items():
        model.set_submodule(name, products.inner)
    for name, each in places.maps.items():
        if each.codes is None:
            places.left[name] = UNREACHED
        else:
            reads = "layer norm" if name in normed else "image" if isinstance(each.original, nn.Conv2d) else "tensor"
            reports.append(RepQuantReport(name, reads, f"W{each.w_bits}A{each.input.bits}", each.error))
        model.set_submodule(name, each.original if each.codes is None else each.freeze())
    for name, products in places.products.items():
        model.set_submodule(name, products.freeze())
        reports.append(RepQuantReport(name, "products", f"A{products.bits}", products.error))
    order = {name: n for n, (name, _) in enumerate(model.named_modules())}
    reports.sort(key=lambda report: order.get(report.name, 0))
    return reports + [RepQuantReport(name, "-", "-", 0.0, f"left as it is: {why}") for name, why in places.left.items()]
