"""Accuracy of the built-in vision transformer with few bits for weights and activations.

    TERSOR_DATA=../shared/data python benchmarks/vision.py

demo-vit on 1,000 test images of CIFAR-10; grids are fitted on 32 training images (128 for GPTQ), drawn with seed 0, and with
seeds 1 and 2 where three numbers are given. WnAm: n bits a weight, m bits an activation (the image: 8 bits).

"round to nearest": weights by rows and activations by tensors, from minimum to maximum, with no reparameterization. "RepQ-ViT":
as published. "dual clipping" and "reconstruction": what RepQuant adds, as its page describes it. "DopQ-ViT": with the tangent
grid and the median; "+ blocks": with 100 learning steps a block. "Q-HyViT": granularity and zero points chosen a layer, with 50
steps and one round where the published search has 100 and three (at W4A4 the long one gave 86.90 in four times the time, in
another run). GPTQ leaves the activations in float32. Half the width of the 95 % confidence interval of one accuracy is about 2
points; the rows share their images, so differences between them are surer than that. Size: of the saved
model.safetensors; of the original in float32 (its file, in float16, has half of that).
"""

from __future__ import annotations

import platform
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import DATA, processor, versions, write_table
from torch import Tensor, nn

import tersor
from tersor.calibrate.batches import call, without_target
from tersor.evaluate.accuracy import read_images
from tersor.formats.activation_grid import grid_of_range
from tersor.formats.grid import Grid
from tersor.layers.linear_map import weight_matrix
from tersor.methods.activations.calibrated import InputGrid, each_operand
from tersor.methods.activations.dopq_vit import DopQViT
from tersor.methods.activations.q_hyvit import QHyViT
from tersor.methods.activations.repquant import RepQuant, freeze, one_batch, wrap
from tersor.methods.method import Method, ModelMethod, Work

IMAGES = DATA / "images"
Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Nearest(ModelMethod):
    """The plain baseline, on RepQuant's places."""

    name: ClassVar[str] = "nearest"
    w_bits: int = 4
    a_bits: int = 4

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        batch = one_batch(work.samples[:32])
        plain = RepQuant(w_bits=self.w_bits, a_bits=self.a_bits)
        places = wrap(model, plain, without_target(dict(work.samples[0])), work.wanted)
        places.pairs.clear()
        for each in places.maps.values():
            width = each.input.bits
            each.input = InputGrid(width, partial(_whole_range, bits=width))
            W = weight_matrix(each.original)
            each.grid = grid_of_range(W.amin(1, keepdim=True), W.amax(1, keepdim=True), self.w_bits)
            each.codes = each.grid.quantize(W).to(torch.uint8)
        for product in places.products.values():
            product.fit = each_operand(partial(_whole_range, bits=self.a_bits))
        call(model, batch)
        freeze(model, places)
        return model


def _whole_range(x: Tensor, *, bits: int) -> Grid:
    return grid_of_range(x.min(), x.max(), bits)


def methods(w_bits: int, a_bits: int) -> dict[str, Method]:
    repquant = partial(RepQuant, w_bits=w_bits, a_bits=a_bits)
    dopq = partial(DopQViT, w_bits=w_bits, a_bits=a_bits)
    return {
        "round to nearest": Nearest(w_bits, a_bits),
        "RepQ-ViT": repquant(dual_clipping=False, reconstruct=False),
        "RepQ-ViT + dual clipping": repquant(dual_clipping=True, reconstruct=False),
        "RepQ-ViT + reconstruction": repquant(dual_clipping=False, reconstruct=True),
        "both": repquant(dual_clipping=True, reconstruct=True),
        "DopQ-ViT": dopq(),
        "DopQ-ViT + blocks": dopq(tune_blocks=True),
        "Q-HyViT": QHyViT(w_bits=w_bits, a_bits=a_bits, num_candidates=50, rounds=1),
    }


WIDTHS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A4": (4, 4), "W3A4": (3, 4)}
FIRST = ("RepQ-ViT", "DopQ-ViT", "Q-HyViT")  # at all widths
THEN = ("round to nearest", "both", "DopQ-ViT + blocks")  # at the two smallest widths, and then at the others


def main() -> None:
    started, processor_started = time.perf_counter(), time.process_time()
    model = tersor.load("demo-vit")
    test = read_images("demo-vit", IMAGES / "cifar10_test_1000.npz")
    train, _ = read_images("demo-vit", IMAGES / "cifar10_train_512.npz")
    found: dict[tuple[str, str], list[float]] = {}
    sizes: dict[tuple[str, str], float] = {}

    def measure(bits: str, name: str, method: Any, seed: int, images: int = 32) -> None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:images]
        samples = [{"image": train[n : n + 1]} for n in order.tolist()]
        result = tersor.compress(model, method, calibration=samples)
        found.setdefault((bits, name), []).append(tersor.accuracy(result.model, test).top1)
        with tempfile.TemporaryDirectory() as folder:
            sizes[bits, name] = (result.save(Path(folder) / "model") / "model.safetensors").stat().st_size / 1e6
        print(bits, name, found[bits, name], round(sizes[bits, name], 3), flush=True)
        write()

    def write() -> None:
        lines = ["# Vision transformers in few bits", "", *(__doc__ or "").splitlines()[4:], ""]
        lines += ["", "| bits | method | top-1, % | MB |", "| --- | --- | --- | --- |"]
        lines.append(
            f"| float32 | original | {original:.2f} | {sum(p.numel() for p in model.parameters()) * 4e-6:.2f} |"
        )
        for (bits, name), values in sorted(found.items(), key=lambda item: (-len(item[0][0]), item[0][0])):
            shown = " / ".join(f"{value:.2f}" for value in values)
            lines.append(f"| {bits} | {name} | {shown} | {sizes[bits, name]:.2f} |")
        minutes = (time.perf_counter() - started) / 60
        lines += [
            "",
            f"{(time.process_time() - processor_started) / 60:.1f} minutes of one processor core ({minutes:.0f} on the clock, "
            f"shared), {processor()}; {platform.system()}; {versions()}.",
            "`python benchmarks/vision.py`",
        ]
        write_table("vision", "\n".join(lines))

    original = tersor.accuracy(model, test).top1
    print("original", original, flush=True)
    for bits in ("W4A4", "W3A4", "W6A6", "W8A8"):
        for name in FIRST:
            measure(bits, name, methods(*WIDTHS[bits])[name], 0)
    for bits in ("W4A4", "W3A4", "W6A6", "W8A8"):
        for name in THEN:
            measure(bits, name, methods(*WIDTHS[bits])[name], 0)
    for seed in (1, 2):
        for bits in ("W4A4", "W3A4"):
            for name in FIRST:
                measure(bits, name, methods(*WIDTHS[bits])[name], seed)
    for bits in ("W4A4", "W3A4"):
        for name in ("RepQ-ViT + dual clipping", "RepQ-ViT + reconstruction"):
            measure(bits, name, methods(*WIDTHS[bits])[name], 0)
    for width in (4, 3):
        measure(f"W{width}", "GPTQ, weights only", tersor.GPTQ(bits=width), 0, images=128)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
