"""Q-HyViT: weights and activations of mixes of convolution and attention in few bits, from 32 images and without training.

What it is for: MobileViT, EfficientFormer and other hybrids, whose depthwise convolutions, many kinds of norm and few
parameters make the quantizers of plain vision transformers collapse (RepQ-ViT needs a LayerNorm in front of linear layers). It
takes plain ViTs and Swins too. The saved file is smaller, because its weights are packed. The arithmetic is simulated in
floating point, so nothing runs faster.

    tersor compress q-hyvit mobilevit --w-bits 6 --a-bits 6 --calibration images --out small
    tersor eval small --images images

    result = tersor.compress(model, QHyViT(w_bits=8, a_bits=8), calibration=[{"image": x} for x in images])

Lee et al., IEEE Internet of Things Journal 2024, arXiv 2303.12557. Its code extends PTQ4ViT (arXiv 2111.12293):

- BatchNorms are folded into their convolutions. Grids are signed, x^ = I clamp(round(x / I), -2^(b-1), 2^(b-1) - 1).
- A step I is a multiple of max |x| / (2^(b-1) - 1/2), searched among 100 from 0.01 to 1.2; weights and input take turns three
  times. The least error Σ (g (o - o^))² wins, with o a layer's output and g its squared Hessian weight's root
  (`methods/activations/interval_search.py`).
- A bridge is where a convolution hands over to attention; it is found by running the model
  (`methods/activations/hybrid_parts.py`). Its layers stay quantized while those behind them are searched, so these see its error.
  All others are calibrated with exact inputs. `bridges` may be "all" (every layer sees the error of all layers before it) or
  "none".

The same error chooses three things for each layer (`choose_grid`, the default; the paper says what is chosen and not how, so
this is our reading):

- whether the input has one grid, or one per channel. Grids s_i of channels need no other integers: W_oi s_i / s̃ is rounded.
- whether grids are signed, or have a zero point. With a zero point, ranges are widened to hold 0, because a zero point outside
  the codes would clip everything. The paper found this in bridge blocks; the table says in how many grids ("overflows").
- whether a linear layer's weight has one step, or one per output.

Without `choose_grid` it is as published: grids are signed. A convolution's weight has a step per output, a linear layer's has one
(qkv: three). The inputs of grouped convolutions have a step per channel, all others one; products have one per head.

Hessian weights: g is the gradient of -log p(y) for a class y drawn from the exact model's prediction. The mean of g² is the
diagonal of the Hessian of the divergence from that prediction (`hessian="fisher"`). The published code differentiates the
divergence itself (`hessian="kl"`), which is zero up to rounding errors as long as no bridge is quantized. Outputs that are not
classes are weighted by a random direction.

`twin` uses PTQ4ViT's grids with two ranges for softmax and GELU outputs (`formats/twin_grid.py`); Q-HyViT switches them off.
Layers that read the image have `image_bits`. Elementwise products, as in MobileViTV2's attention, stay in floating point.

Origin: Q-HyViT's code was not available, and PTQ4ViT's has no licence; nothing is taken from either. Not reproduced: the
published depthwise branch divides its first input step by the number of levels of the weights. The published lists of bridges
are numbers. Those of MobileViT-S are our bridges. Those of EfficientFormer-L1 (26, 27, 28) would, in the order of running, be
the last downsampling and the first block of the last stage; ours are at the reshape to tokens, three blocks later.

Proven: the golden cases of PTQ4ViT's classes with these settings (linear with 8, 6, 4 bits and three blocks, convolution, both
products, twin grids) to 5e-7 in float64; the bridges of MobileViT-S are those that the published code lists; the search
never takes a step with a larger error than another that it tried. Measured on demo-vit and on a MobileViT, where it is not
ahead of RepQ-ViT at W4A4 nor at W6A6: benchmarks/results/vision.md. Not proven: ImageNet accuracies; that the choices for each
layer are the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import Batch, call, first_tensor, without_target
from tersor.errors import TersorError
from tersor.formats.activation_grid import at_least_float32
from tersor.formats.twin_grid import GeluGrid
from tersor.methods.activations.calibrated import is_softmax
from tersor.methods.activations.hybrid_parts import Trace, bridges, fold_norms, trace
from tersor.methods.activations.interval_search import (
    MapGrids,
    MapProblem,
    ProductGrids,
    ProductProblem,
    Search,
    looks_like_gelu,
    overflows,
)
from tersor.methods.activations.repquant import UNREACHED, one_batch, product_sites, quantizable_maps
from tersor.methods.activations.watched import WatchedMap, WatchedProducts
from tersor.methods.method import Method, ModelMethod, Report, Work, option, register

BATCH = 4  # images that run through the model together
MEMORY = 2**30  # bytes of records that are kept at once
BRIDGES, HESSIANS = ("auto", "all", "none"), ("fisher", "kl")
COARSE = 5  # while kinds of grids are compared, only every fifth step is tried
Part = WatchedMap | WatchedProducts


@dataclass(frozen=True)
class QHyViTReport(Report):
    """One row."""

    bits: str  # as in W8A8
    reads: str  # "layer", "channel" or "head": the part of the input that has a grid
    grid: str  # "signed", "zero point" or "twin"
    overflows: int  # grids whose zero point would lie outside the codes
    bridge: bool  # whether later layers were searched behind its error
    error: float  # ‖ô - o‖² / ‖o‖² of its output on the calibration images
    note: str = ""


@register
@dataclass(frozen=True)
class QHyViT(ModelMethod):
    """Quantize weights and activations of convolution-attention hybrids after training, from 32 images."""

    name: ClassVar[str] = "q-hyvit"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/quantization-ptq",
        "inference/quantization-vit",
        "inference/quantization-mixed",
        "practical/quantization",
    )

    w_bits: int = option(8, "bits a weight", least=2, most=8)
    a_bits: int = option(8, "bits an activation", least=2, most=8)
    image_bits: int = option(8, "bits of what reads the image", least=2, most=8)
    num_images: int = option(32, "calibration samples, of those given", least=1)
    choose_grid: bool = option(
        True, "choose granularity and zero point of every layer by its error; without it, as published"
    )
    bridges: str = option("auto", "layers whose error later ones see: auto, all or none", choices=BRIDGES)
    hessian: str = option("fisher", "weights of the error: fisher or kl (as published)", choices=HESSIANS)
    twin: bool = option(False, "two ranges for softmax and GELU outputs, as in PTQ4ViT")
    num_candidates: int = option(100, "steps of a grid that a search tries", least=2)
    rounds: int = option(3, "turns of weights and inputs", least=1)

    @classmethod
    def recipes(cls, kind: str) -> Sequence[Sequence[Method]]:
        return [[cls()]] if kind == "image" else []

    @property
    def search(self) -> Search:
        return Search(count=self.num_candidates, rounds=self.rounds)

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        samples = [without_target(dict(each)) for each in work.samples[: self.num_images]]
        batches = [one_batch(samples[n : n + BATCH]) for n in range(0, len(samples), BATCH)]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        plan = prepare(model, self, samples[0], work)
        with torch.no_grad():
            exact = [first_tensor(call(model, batch)) for batch in batches]
        done = 0
        for group in plan.groups(sum(_samples_in(batch) for batch in batches)):
            watch(model, [plan.parts[name] for name in group], list(zip(batches, exact, strict=True)), self.hessian)
            for name in group:
                work.progress("searching steps", done, len(plan.order))
                with torch.no_grad():
                    plan.reports[name] = solve(plan.parts[name], name, self, bridge=name in plan.seen)
                done += 1
        work.progress("searched", done, len(plan.order))
        finish(model, plan, work)
        for parameter in trained:
            parameter.requires_grad_(True)
        return model


@dataclass
class Plan:
    """What is quantized, and in which order."""

    parts: dict[str, Part]  # by name
    order: list[str]  # these names as they run
    seen: set[str]  # those that stay quantized while others are searched: the bridges' layers
    traced: Trace
    left: dict[str, str]
    reports: dict[str, QHyViTReport]

    def groups(self, samples: int) -> Iterator[list[str]]:
        """Parts whose records are gathered together. No part of a group lies behind a bridge's layer of the same group."""
        group: list[str] = []
        size = 0
        for name in self.order:
            needed = self.traced.sizes.get(name, 0) * samples * torch.float32.itemsize
            if group and (size + needed > MEMORY or group[-1] in self.seen):
                yield group
                group, size = [], 0
            group.append(name)
            size += needed
        if group:
            yield group


def prepare(model: nn.Module, method: QHyViT, probe: Batch, work: Work) -> Plan:
    """Fold the norms, and replace the model's parts by watched ones. Raises TersorError where there is nothing to quantize."""
    left: dict[str, str] = {}
    maps = quantizable_maps(model, work.wanted, left, grouped=True)
    products = product_sites(model, probe, work.wanted, left)
    if not maps and not products:
        raise TersorError(
            f"q-hyvit finds no linear layer, convolution or product of activations in {type(model).__name__}"
        )
    traced = trace(model, maps, probe)
    crossed = bridges(model, traced)
    if method.bridges == "auto" and not any(what != "map" for _, what in traced.events):
        raise TersorError(
            f"q-hyvit finds no attention in {type(model).__name__}, so it has no bridges; --bridges none quantizes it without"
        )
    fold_norms(model, maps, probe)
    parts: dict[str, Part] = {}
    for name, module in maps.items():
        bits = method.image_bits if name in traced.of_image else method.a_bits
        parts[name] = WatchedMap(module, method.w_bits, bits)
    for name, module in products.items():
        parts[name] = WatchedProducts(module, method.a_bits)
    order = traced.order(parts)
    left |= dict.fromkeys((name for name in parts if name not in order), UNREACHED)
    for name in sorted(order, key=lambda name: name.count("."), reverse=True):  # an attention after the maps inside it
        model.set_submodule(name, parts[name])
    seen = {
        "none": set[str](),
        "all": set(order),
        "auto": {name for bridge in crossed for name in bridge} & set(order),
    }[method.bridges]
    return Plan({name: parts[name] for name in order}, order, seen, traced, left, {})


def watch(
    model: nn.Module, parts: Sequence[Part], batches: Sequence[tuple[Batch, Tensor | None]], hessian: str
) -> None:
    """Fill the records of these parts: operands, outputs and gradients for all batches. exact: the original's predictions."""
    for part in parts:
        part.watching = True
    for n, (batch, exact) in enumerate(batches):
        with torch.enable_grad():
            found = first_tensor(call(model, batch))
            if found is None or exact is None:
                raise TersorError(
                    f"{type(model).__name__} gives no floating-point tensor, so no loss can weight its layers"
                )
            loss_of(found, exact, hessian, torch.Generator().manual_seed(n)).backward()  # type: ignore[no-untyped-call]
    for part in parts:
        part.watching = False


def loss_of(found: Tensor, exact: Tensor, hessian: str, random: torch.Generator) -> Tensor:
    """The loss to differentiate. found, exact: predictions; of classes where they are [samples, classes]."""
    exact = at_least_float32(exact.detach())
    if exact.dim() != 2:
        direction = torch.randn(exact.shape, generator=random).to(found)
        return (found * direction).sum()
    if hessian == "kl":
        return nn.functional.kl_div(found.log_softmax(-1), exact.softmax(-1).to(found.dtype), reduction="batchmean")
    drawn = torch.multinomial(exact.softmax(-1).cpu(), 1, generator=random)[:, 0]
    return nn.functional.cross_entropy(found, drawn.to(found.device), reduction="sum")


def solve(part: Part, name: str, method: QHyViT, *, bridge: bool) -> QHyViTReport:
    """Find a part's grids and drop its records. Returns its row."""
    note, calls = "", [part.records] if isinstance(part, WatchedMap) else part.records
    for records in calls:  # of the layer, or of one product
        if not any(bool(record.gradient.any()) for record in records):
            for record in records:
                record.gradient.fill_(1)
            note = "no gradient reaches it: all outputs count alike"
    if isinstance(part, WatchedMap):
        report = _solve_map(part, name, method)
    else:
        report = _solve_products(part, name, method)
    part.records.clear()
    part.quantized = bridge
    return replace(report, bridge=bridge, note=note)


def _solve_map(part: WatchedMap, name: str, method: QHyViT) -> QHyViTReport:
    problem, search = part.problem(), method.search
    ends = problem.ranges(channelwise=False)
    grouped = (problem.groups or 1) > 1
    twin = method.twin and looks_like_gelu(*ends)
    kinds = list(product((False, True), (False, True))) if method.choose_grid else [(grouped, False)]
    if twin:
        kinds = [(False, False)]
    sizes = _weight_blocks(problem, name, rows=method.choose_grid)
    coarse = search.factors()[COARSE - 1 :: COARSE] or search.factors()
    best: tuple[MapGrids, MapGrids, bool] | None = None
    for channelwise, zero_point in kinds:
        input = problem.first_gelu() if twin else problem.first_input(channelwise=channelwise, zero_point=zero_point)
        for blocks in sizes:
            first = problem.start(input, channelwise=channelwise, blocks=blocks)
            found = first
            if len(kinds) * len(sizes) > 1:
                found = problem.search_input(first, problem.search_weight(first, found, coarse), coarse)
            if best is None or found.error < best[1].error:
                best = first, found, zero_point
        assert best is not None
        sizes = [(len(best[0].weight), 1)]  # the weight's blocks are chosen with the first kind of input grid
    assert best is not None
    first, found, zero_point = best
    part.grids = problem.rounds(first, found, search)
    reads = "channel" if part.grids.channelwise else "layer"
    grid = "twin" if isinstance(part.grids.input, GeluGrid) else "zero point" if zero_point else "signed"
    outside = overflows(*problem.ranges(channelwise=part.grids.channelwise))
    return QHyViTReport(name, f"W{part.w_bits}A{part.a_bits}", reads, grid, outside, False, part.error())


def _weight_blocks(problem: MapProblem, name: str, *, rows: bool) -> list[tuple[int, int]]:
    """The ways to cut a weight into blocks with a step each that are tried: (blocks of rows, blocks of columns)."""
    out = len(problem.W)
    if problem.groups is not None:
        return [(out, 1)]
    published = 3 if name.rpartition(".")[2] == "qkv" and out % 3 == 0 else 1
    return [(published, 1), (out, 1)] if rows and out != published else [(published, 1)]


def _solve_products(part: WatchedProducts, name: str, method: QHyViT) -> QHyViTReport:
    problems, search = part.problems(), method.search
    kinds, outside = set(), 0
    for problem in problems:
        first, present, names = _first_pair(problem, method)
        part.grids.append(problem.rounds(first, present, search))
        kinds |= names
        outside += sum(overflows(*problem.ranges(operand)) for operand in (0, 1))
    reads = "head" if problems[0].heads > 1 else "layer"
    shown = "+".join(sorted(kinds))
    return QHyViTReport(name, f"A{part.bits}", reads, shown, outside, False, part.error())


def _first_pair(problem: ProductProblem, method: QHyViT) -> tuple[list[Any], ProductGrids, set[str]]:
    """The grids whose multiples are tried, the grids to begin with, and the names of their kinds."""
    first: list[Any] = [problem.first(operand, zero_point=False) for operand in (0, 1)]
    present, names = ProductGrids((first[0], first[1])), ["signed", "signed"]
    coarse = method.search.factors()[COARSE - 1 :: COARSE] or method.search.factors()
    for operand in (0, 1):
        if method.twin and operand == 0 and all(is_softmax(each.operands[0]) for each in problem.records):
            present = problem.search_split(present)
            first[0], names[0] = present.pair[0], "twin"
        elif method.choose_grid:
            grids = {"signed": first[operand], "zero point": problem.first(operand, zero_point=True)}
            tried = {}
            for kind, grid in grids.items():
                pair = (grid, present.pair[1]) if operand == 0 else (present.pair[0], grid)
                tried[kind] = problem.search(operand, grid, ProductGrids(pair), coarse)
            names[operand] = min(tried, key=lambda kind: tried[kind].error)
            first[operand], present = grids[names[operand]], tried[names[operand]]
    return first, present, set(names)


def finish(model: nn.Module, plan: Plan, work: Work) -> None:
    """Replace the watched layers by the stored ones."""
    frozen: Mapping[str, nn.Module] = {}
    maps = {name: part for name, part in plan.parts.items() if isinstance(part, WatchedMap)}
    for name, part in plan.parts.items():
        if isinstance(part, WatchedProducts):
            model.set_submodule(name, part.inner)
    for name, watched in maps.items():
        model.set_submodule(name, watched.freeze())
    frozen = {name: part.freeze() for name, part in plan.parts.items() if isinstance(part, WatchedProducts)}
    for name, module in frozen.items():
        model.set_submodule(name, module)
    for name in plan.order:
        work.report(plan.reports[name])
    for name, why in plan.left.items():
        work.report(QHyViTReport(name, "-", "-", "-", 0, False, 0.0, f"left as it is: {why}"))


def _samples_in(batch: Batch) -> int:
    tensors = (value for value in (*batch.values(), *batch.get("args", ())) if isinstance(value, Tensor))
    return len(next(tensors))
