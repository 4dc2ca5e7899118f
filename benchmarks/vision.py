"""Accuracy of vision transformers, and of a hybrid of convolution and attention, with few bits for weights and activations.

    TERSOR_DATA=../shared/data python benchmarks/vision.py --processes 12 --write
    ... --train-hybrid mobilevit.pt             trains the hybrid and writes its weights
    ... --hybrid mobilevit.pt --models hybrid   measures it; kept rows are not measured again
    ... --again                                 the table from the kept numbers
    ... --quick                                 one width, few images: whether it runs, not what it is worth

1,000 test images of CIFAR-10. Grids are fitted on 32 training images (GPTQ: 128), drawn with seed 0, and with seeds 1 and 2 where
three numbers are given; BCT looks at no images. WnAm: n bits a weight, m bits an activation (the image: 8 bits). Half the width
of the 95 % confidence interval of one accuracy is about 2 points; the rows share their images, so differences between them are
surer. A row without seconds was read from an earlier table.

demo-vit is the built-in vision transformer. The hybrid is a MobileViT (`mobilevit_xxs` with ten classes, 0.95 million
parameters), trained here by tersor's own loop on the first 20,000 training pictures of CIFAR-10 scaled to 64 x 64 pixels, 40
epochs; its last weights count.

"round to nearest": weights by rows and activations by tensors, from minimum to maximum, with no reparameterization.
"RepQ-ViT": as published; "RepQuant" adds dual clipping and reconstruction, as its page describes them. "DopQ-ViT": with the
tangent grid and the median; "+ blocks": with 100 learning steps a block. These leave 8 bits to what a convolution reads, and
grouped convolutions as they are; "convolutions too" is RepQ-ViT with m bits for what all convolutions read but the first.
"Q-HyViT", which takes grouped convolutions too: granularity and zero points chosen a layer, with 50 steps and one round where
the published search has 100 and three. "BCT": blocks of 64 with shifts, without data. "GPTQ, then": GPTQ rounds the weights
it can pack to n bits by rows (it has no grid of 6), and the method that is named quantizes the activations, and these weights
once more to 8 bits. Size: of the saved model.safetensors; of the original in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import (
    DATA,
    gpu,
    kept_numbers,
    machine,
    refuse_to_keep_quick,
    results_of,
    runs_with_this,
    write_numbers,
    write_table,
)
from torch import Tensor, nn
from vision_training import Held

import tersor
from tersor.calibrate.batches import call, without_target
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.source import open_checkpoint
from tersor.data.images import ImageConfig, load_images
from tersor.devices import pick_device
from tersor.errors import TersorError
from tersor.evaluate.accuracy import read_images
from tersor.formats.activation_grid import fit_uniform, grid_of_range
from tersor.formats.grid import Grid
from tersor.layers.linear_map import weight_matrix
from tersor.methods.activations.bct import BCT
from tersor.methods.activations.calibrated import InputGrid, each_operand
from tersor.methods.activations.dopq_vit import DopQViT
from tersor.methods.activations.q_hyvit import QHyViT
from tersor.methods.activations.repquant import (
    RepQuant,
    fit_weights_again,
    freeze,
    one_batch,
    reparameterize,
    wrap,
)
from tersor.methods.method import Method, ModelMethod, Work
from tersor.train.config import TrainConfig
from tersor.train.objectives import classification
from tersor.train.trainer import train

NAME = "vision"
IMAGES = DATA / "images"
VIT, HYBRID = "demo-vit", "hybrid"
DEVICE = pick_device("auto")
DRAWS, SAMPLES = 3, 32
WIDTHS = {"W4A4": (4, 4), "W6A6": (6, 6), "W3A4": (3, 4), "W8A8": (8, 8)}
FIRST = "GPTQ, then "
ORIGINAL = "original"


@dataclass(frozen=True)
class Row:
    model: str
    bits: str
    method: str
    draw: int
    top1: float | None  # None: refused
    megabytes: float | None  # of the saved model; None where the stack has no file of its own
    seconds: float | None = None
    refused: str = ""


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
            least, most = W.amin(1, keepdim=True).clamp(max=0), W.amax(1, keepdim=True).clamp(min=0)
            each.grid = grid_of_range(least, most, self.w_bits)
            each.codes = each.grid.quantize(W).to(torch.uint8)
        for product in places.products.values():
            product.fit = each_operand(partial(_whole_range, bits=self.a_bits))
        call(model, batch)
        freeze(model, places)
        return model


def _whole_range(x: Tensor, *, bits: int) -> Grid:
    """Zero lies within, so that what is constant has a grid too."""
    return grid_of_range(x.min().clamp(max=0), x.max().clamp(min=0), bits)


@dataclass(frozen=True)
class Throughout(RepQuant):
    """RepQ-ViT with inputs of a_bits for convolutions too, but for the one that reads the image. RepQuant gives them 8 bits."""

    name: ClassVar[str] = "throughout"

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        batch = one_batch(work.samples[:SAMPLES])
        places = wrap(model, self, without_target(dict(work.samples[0])), work.wanted)
        convolutions = [each for each in places.maps.values() if isinstance(each.original, nn.Conv2d)]
        for each in convolutions[1:]:
            each.input = InputGrid(self.a_bits, partial(fit_uniform, bits=self.a_bits))
        with torch.no_grad():
            call(model, batch)
            reparameterize(model, places)
            fit_weights_again(places, reconstruct=False)
            call(model, batch)
        freeze(model, places)
        return model


def methods(w_bits: int, a_bits: int) -> dict[str, Method]:
    repquant = partial(RepQuant, w_bits=w_bits, a_bits=a_bits)
    dopq = partial(DopQViT, w_bits=w_bits, a_bits=a_bits)
    return {
        "round to nearest": Nearest(w_bits, a_bits),
        "RepQ-ViT": repquant(dual_clipping=False, reconstruct=False),
        "convolutions too: RepQ-ViT": Throughout(w_bits=w_bits, a_bits=a_bits),
        "RepQuant": repquant(dual_clipping=True, reconstruct=True),
        "DopQ-ViT": dopq(),
        "DopQ-ViT + blocks": dopq(tune_blocks=True),
        "Q-HyViT": QHyViT(w_bits=w_bits, a_bits=a_bits, num_candidates=50, rounds=1),
        "BCT": BCT(w_bits=w_bits, a_bits=a_bits),
    }


NAMES = (*methods(4, 4), *(FIRST + name for name in ("RepQ-ViT", "DopQ-ViT", "Q-HyViT", "BCT")))


def hybrid() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "widths": (16, 24, 48, 64, 80),
        "dims": (64, 80, 96),
        "bottle_ratio": 2.0,
        "num_features": 320,
    }
    return tersor.models.create("mobilevit", num_classes=10, **sizes)


def pictures(name: str) -> Any:
    return load_images(IMAGES / f"cifar10_{name}.npz", ImageConfig(size=64))


def train_hybrid(file: Path, epochs: int, *, quick: bool) -> None:
    """On all pictures (quick: 512 of them), the rate falling along a cosine."""
    data: Any = Held(pictures("train_512" if quick else "train_20000"))
    model = hybrid()
    steps = epochs * (len(data) // 128)
    config = TrainConfig(
        batch_size=128,
        lr=2e-3,
        weight_decay=0.05,
        max_grad_norm=1.0,
        epochs=epochs + 1,
        max_steps=steps,
        warmup_steps=steps // 20,
        workers=4,
        device=str(DEVICE),
        log_every=100,
    )
    started = time.perf_counter()

    def told(what: str, done: int, total: int) -> None:
        if done % 500 == 0:
            print(f"{what} {done} of {total}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        train(model, data, objective=classification, out=Path(folder) / "run", config=config, progress=told)
    torch.save(model.cpu().state_dict(), file)
    print(f"{steps} steps in {time.perf_counter() - started:.0f} s", file=sys.stderr)


def read(name: str, file: str) -> tuple[nn.Module, Tensor, tuple[Tensor, Tensor]]:
    """A model, training images, test images and their classes."""
    if name == VIT:
        model = tersor.load(VIT, dtype="float32").to(DEVICE).eval()
        training, _ = read_images(VIT, IMAGES / "cifar10_train_512.npz")
        pixels, classes = read_images(VIT, IMAGES / "cifar10_test_1000.npz")
        return model, training.to(DEVICE), (pixels.to(DEVICE), classes.to(DEVICE))
    model = hybrid()
    model.load_state_dict(torch.load(file, weights_only=True))
    training = torch.stack([each["image"] for each in pictures("train_512")])
    test = list(pictures("test_1000"))
    pixels, classes = (torch.stack([each[key] for each in test]) for key in ("image", "target"))
    return model.to(DEVICE).eval(), training.to(DEVICE), (pixels.to(DEVICE), classes.to(DEVICE))


def measure(name: str, bits: str, label: str, draw: int, file: str, count: int) -> Row:
    """count: images to fit on."""
    torch.set_num_threads(1)
    model, training, test = read(name, file)
    if label == ORIGINAL:
        full = sum(p.numel() for p in model.parameters()) * 4e-6
        return Row(name, bits, label, draw, tersor.accuracy(model, test).top1, full)
    started, (w_bits, a_bits) = time.perf_counter(), WIDTHS[bits]
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(draw))
    samples = [{"image": training[n : n + 1]} for n in order[:count].tolist()]
    try:
        with tempfile.TemporaryDirectory() as folder:
            if label.startswith(FIRST):
                more = [{"image": training[n : n + 1]} for n in order[: 4 * count].tolist()]
                model = solved(model, w_bits, more, Path(folder) / "solved")
            made = methods(8 if label.startswith(FIRST) else w_bits, a_bits)[label.removeprefix(FIRST)]
            result = tersor.compress(model, made, calibration=samples)
            seconds = time.perf_counter() - started
            size: float | None = None
            if not label.startswith(FIRST):
                size = (result.save(Path(folder) / "model") / "model.safetensors").stat().st_size / 1e6
    except TersorError as error:
        return Row(name, bits, label, draw, None, None, None, str(error))
    return Row(name, bits, label, draw, tersor.accuracy(result.model, test).top1, size, seconds)


def solved(model: nn.Module, bits: int, samples: Sequence[dict[str, Tensor]], folder: Path) -> nn.Module:
    """The model with GPTQ's weights as plain numbers."""
    tersor.compress(model, tersor.GPTQ(bits=bits, group_size=-1), calibration=samples).save(folder)
    return LazyModel(open_checkpoint(folder), dtype=torch.float32, device=DEVICE).load_all().to(DEVICE).eval()


def place(row: Row) -> tuple[Any, ...]:
    order = (ORIGINAL, *NAMES)
    return (
        row.model != VIT,
        ["float32", "W8A8", "W6A6", "W4A4", "W3A4"].index(row.bits),
        order.index(row.method),
        row.draw,
    )


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | bits | method | top-1, % | each draw | MB | seconds |",
        "| --- | --- | --- | ---: | --- | ---: | ---: |",
    ]
    for key in dict.fromkeys((row.model, row.bits, row.method) for row in rows):
        each = [row for row in rows if (row.model, row.bits, row.method) == key]
        values = [row.top1 for row in each if row.top1 is not None]
        if not values:
            lines.append(f"| {' | '.join(key)} | refused | | | |")
            continue
        spread = " / ".join(f"{value:.1f}" for value in values) if len(values) > 1 else ""
        size = "" if each[0].megabytes is None else f"{each[0].megabytes:.2f}"
        took = [row.seconds for row in each if row.seconds is not None]
        seconds = f"{statistics.mean(took):.0f}" if took else ""
        lines.append(f"| {' | '.join(key)} | {statistics.mean(values):.2f} | {spread} | {size} | {seconds} |")
    said = dict.fromkeys(f"- {row.model}, {row.method}: {row.refused}" for row in rows if row.refused)
    return "\n".join([*lines, "", *said]).rstrip("\n")


def write(rows: Sequence[Row], runs: Sequence[str]) -> None:
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    said = "\n".join(f"- {run}" for run in runs)
    write_table(NAME, f"# Vision models in few bits\n\n{about}\n\n{table(rows)}\n\n{said}\n")
    write_numbers(NAME, {"runs": list(runs), "rows": [asdict(row) for row in rows]})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="*", default=[VIT], choices=(VIT, HYBRID))
    parser.add_argument("--only", nargs="*", default=[""], help="methods whose name begins so")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--hybrid", default="", help="the hybrid's weights")
    parser.add_argument("--train-hybrid", type=Path, help="train it, write its weights there, and measure nothing")
    parser.add_argument("--epochs", type=int, default=40, help="of its training")
    parser.add_argument("--processes", type=int, default=1, help="how many jobs at once")
    parser.add_argument("--minutes", type=float, default=600, help="begins no job after so many")
    parser.add_argument("--again", action="store_true", help="the table from the kept numbers")
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    asked = parser.parse_args()
    refuse_to_keep_quick(asked)
    if asked.train_hybrid:
        train_hybrid(asked.train_hybrid, 1 if asked.quick else asked.epochs, quick=asked.quick)
        return
    if asked.again:
        kept = kept_numbers(NAME)
        write(sorted((Row(**each) for each in kept["rows"]), key=place), kept["runs"])
        return
    if HYBRID in asked.models and not Path(asked.hybrid).is_file():
        parser.error("the hybrid's weights are missing: --train-hybrid FILE makes them, --hybrid FILE names them")
    rows = [Row(**each) for each in kept_numbers(NAME).get("rows", [])] if asked.write else []
    runs = runs_with_this(NAME, gpu() if DEVICE.type == "cuda" else machine())
    known = {(row.model, row.bits, row.method, row.draw) for row in rows}
    tasks = [(model, "float32", ORIGINAL, 0) for model in asked.models]
    for draw in range(1 if asked.quick else asked.draws):
        for bits in list(WIDTHS)[: 1 if asked.quick else None]:
            names = [name for name in NAMES if name.startswith(tuple(asked.only)) and (draw == 0 or name != "BCT")]
            names = [
                name for name in names if bits != "W6A6" or not name.startswith(FIRST)
            ]  # GPTQ has no grid of 6 bits
            tasks += [(model, bits, name, draw) for name in names for model in asked.models]
    left = [(*task, asked.hybrid, 4 if asked.quick else SAMPLES) for task in tasks if task not in known]
    for row in results_of(measure, left, at_once=asked.processes, minutes=asked.minutes):
        print(row, flush=True)
        rows = sorted([*rows, row], key=place)
        if asked.write:  # as they come, so that a run that is stopped leaves what it has
            write(rows, runs)
    print(table(rows))


if __name__ == "__main__":
    main()
