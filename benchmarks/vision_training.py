"""Vision models trained from scratch by tersor's own loop, each for the same time, then quantized by GPTQ to 8 and 4 bits.

    TERSOR_DATA=../shared/data python benchmarks/vision_training.py [NAME...] [--seconds 90] [--device cuda]

All models named are trained at the same time, each in a process of its own, so they share the machine alike. A few steps are
timed first; then as many are trained as fit into the time, the rate falling along a cosine. The last weights count: nothing is
chosen on the test data.

Classification: the first 20,000 training pictures of CIFAR-10 scaled to 64 x 64 pixels, mirrored and shifted by chance;
accuracy on 1,000 test pictures (half of the 95 % interval is about 3 points). The plain ViT has about as many parameters as the
others. Super-resolution: twice the size, on crops of pictures that scikit-image carries; PSNR of luma on the middle of four
others, beside what bicubic enlarging gives. Segmentation: discs, squares, triangles and rings on 96 x 96 pixels of the same
pictures, 8,000 drawings made beforehand; mean of the classes' intersection over union on 200 drawings over the others. "at 192":
the same drawings enlarged, for a network whose logits have an eighth of the sides. The U-Net is a plain one with about
as many parameters (benchmarks/unet.py). Clips: a spot on noise that moves, grows, shrinks or stays, told from eight frames;
accuracy on 400 clips.

GPTQ: every weight matrix that it packs, one scale a row, calibrated on 64 training samples. Error: of the outputs (logits, or the
picture less its bicubic enlargement) on test data, as a share of their norm.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DATA, gpu, hardware, kept_numbers, versions, write_numbers, write_table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate
from unet import UNet

import tersor
from tersor.data.images import ImageConfig, Images, flip_and_shift, load_images
from tersor.data.masks import MaskConfig, normalised
from tersor.data.pictures import PictureConfig, load_pictures
from tersor.data.seeding import mixed_seed
from tersor.evaluate.fidelity import fidelity
from tersor.tasks.task import Sets
from tersor.train.config import TrainConfig
from tersor.train.objectives import Objective, classification, restoration, segmentation
from tersor.train.trainer import train

BITS = (8, 4)
CALIBRATION = 64  # samples
AT_ONCE = 50  # test samples
ENLARGED = 256  # pixels of a side of the test pictures for super-resolution
TIMED = 20  # steps, of which the second half is timed
HELD_OUT = ("astronaut.png", "coffee.png", "rocket.jpg", "chelsea.png")  # pictures of scikit-image, for tests
SEEN = (
    "hubble_deep_field.jpg", "ihc.png", "gravel.png", "motorcycle_left.png", "grass.png", "brick.png", "coins.png",
    "moon.png", "retina.jpg", "camera.png", "cell.png",
)  # fmt: skip
SHAPES = ("background", "disc", "square", "triangle", "ring")
MOTIONS = ("left", "right", "up", "down", "grows", "shrinks", "stays")


@dataclass(frozen=True)
class Training:
    """One row of the table."""

    system: str
    config: dict[str, Any]
    data: Callable[[Path], Sets]  # of a folder to draw in
    objective: Objective
    score: Callable[[Tensor, Tensor], float]  # of what the model gives and what it should
    what: str  # the score's name
    batch: int = 128
    lr: float = 1e-3
    workers: int = 1
    stride: int = 1  # of the logits of a segmentation, before they are enlarged


class Held(Dataset[dict[str, Tensor]]):
    """Images decoded once, and mirrored and shifted anew in each epoch as `Images` does it."""

    def __init__(self, images: Images) -> None:
        samples = [images[n] for n in range(len(images))]
        self.images, self.targets = (torch.stack([each[name] for each in samples]) for name in ("image", "target"))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        chance = torch.Generator().manual_seed(mixed_seed(0, self.epoch, index))
        return {"image": flip_and_shift(self.images[index], chance), "target": self.targets[index]}


def cifar(_: Path) -> Sets:
    training, test = (
        load_images(DATA / "images" / f"cifar10_{name}.npz", ImageConfig(size=64))
        for name in ("train_20000", "test_1000")
    )
    return Sets(Held(training), test=test)


def pictures() -> Path:
    """The folder of pictures that scikit-image carries; it is found without importing it."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "super-resolution and segmentation need the pictures of scikit-image: pip install scikit-image"
        )
    return Path(found.submodule_search_locations[0]) / "data"


def enlarging(folder: Path) -> Sets:
    parts = []
    for part, names in (("train", SEEN), ("test", HELD_OUT)):
        (folder / part).mkdir()
        for name in names:
            (folder / part / name).symlink_to(pictures() / name)
        config = PictureConfig(size=48 if part == "train" else ENLARGED // 2, crops=256)
        parts.append(load_pictures(folder / part, config, scale=2, chance=part == "train"))
    return Sets(parts[0], test=parts[1])


class Drawings(Dataset[dict[str, Tensor]]):
    """Drawings made beforehand, mirrored by chance and anew in each epoch where they are to be learned from."""

    def __init__(self, names: tuple[str, ...], count: int, *, times: int, chance: bool) -> None:
        """times: how many times as large the network sees them."""
        from PIL import Image

        random = np.random.RandomState(count)
        backgrounds = [np.asarray(Image.open(pictures() / name).convert("RGB")) for name in names]
        made = [drawn(backgrounds[random.randint(len(backgrounds))], random) for _ in range(count)]
        self.pictures, self.masks = ([each[n] for each in made] for n in range(2))
        self.times, self.chance, self.epoch = times, chance, 0
        self.config = MaskConfig(size=96 * times)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture, mask = self.pictures[index], self.masks[index]
        if self.chance and mixed_seed(0, self.epoch, index) % 2:
            picture, mask = picture[:, ::-1], mask[:, ::-1]
        image = normalised(picture, self.config.mean, self.config.std)
        target = torch.from_numpy(mask.astype(np.int64))
        if self.times > 1:
            image = F.interpolate(image[None], scale_factor=self.times, mode="bilinear", align_corners=False)[0]
            target = target.repeat_interleave(self.times, 0).repeat_interleave(self.times, 1)
        return {"image": image, "target": target}


def drawings(_: Path, *, times: int = 1) -> Sets:
    return Sets(Drawings(SEEN, 8000, times=times, chance=True), test=Drawings(HELD_OUT, 200, times=times, chance=False))


def drawn(background: Any, random: np.random.RandomState) -> tuple[Any, Any]:
    """A picture (96, 96, 3) and its classes (96, 96), uint8: shapes of one colour each, half through which the picture shows."""
    top, left = (random.randint(side - 96) for side in background.shape[:2])
    picture = background[top : top + 96, left : left + 96].astype(np.float32)
    mask = np.zeros((96, 96), np.uint8)
    y, x = np.mgrid[:96, :96].astype(np.float32)
    for _ in range(random.randint(1, 5)):
        kind, radius = random.randint(1, len(SHAPES)), random.randint(8, 22)
        cy, cx = random.randint(10, 86, 2)
        far = np.hypot(y - cy, x - cx)
        inside = {
            "disc": far < radius,
            "ring": (far < radius) & (far > 0.55 * radius),
            "square": np.maximum(abs(y - cy), abs(x - cx)) < 0.8 * radius,
            "triangle": (y - cy < 0.6 * radius) & (abs(x - cx) < (y - cy + radius) * 0.6),
        }[SHAPES[kind]]
        picture[inside] = 0.5 * picture[inside] + 0.5 * random.randint(0, 256, 3)
        mask[inside] = kind
    return picture.astype(np.uint8), mask


class Motions(Dataset[dict[str, Tensor]]):
    """clip (3, 8, 32, 32), noise with a spot on it, and how the spot moves. One frame does not tell."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        motion = index % len(MOTIONS)
        speed, radius, x, y, bright = torch.rand(5, generator=random).tolist()
        speed, radius, bright = 0.6 + 0.9 * speed, 3 + 3 * radius, 0.6 + bright
        dx, dy, growth = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, 0.5), (0, 0, -0.5), (0, 0, 0))[motion]
        t = torch.arange(8.0)[:, None, None] - 3.5
        cx, cy = 10 + 12 * x + dx * speed * t, 10 + 12 * y + dy * speed * t
        rows, columns = torch.arange(32.0)[None, :, None], torch.arange(32.0)[None, None, :]
        spot = torch.exp(-((rows - cy).square() + (columns - cx).square()) / (radius + growth * speed * t).square())
        clip = 0.5 * torch.randn(3, 8, 32, 32, generator=random) + bright * spot
        return {"clip": clip, "target": torch.tensor(motion)}


def motions(_: Path) -> Sets:
    return Sets(Motions(7000, 1), test=Motions(400, 2))


@torch.no_grad()
def outputs(model: nn.Module, data: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the model gives for all of the data, what it should give, and its inputs."""
    device = next(each for each in model.parameters() if each.is_floating_point()).device
    made, target, inputs = [], [], []
    for start in range(0, len(data), AT_ONCE):
        batch = default_collate([data[n] for n in range(start, min(start + AT_ONCE, len(data)))])
        target.append(batch.pop("target"))
        (given,) = batch.values()
        made.append(model.eval()(given.to(device)).float().cpu())
        inputs.append(given)
    return torch.cat(made), torch.cat(target), torch.cat(inputs)


def accuracy(logits: Tensor, target: Tensor) -> float:
    return 100 * float((logits.argmax(1) == target).float().mean())


def of_each_class(logits: Tensor, target: Tensor) -> list[float]:
    """Intersection over union, in percent."""
    found = logits.argmax(1)
    shares = [((found == n) & (target == n)).sum() / ((found == n) | (target == n)).sum() for n in range(len(SHAPES))]
    return [100 * float(each) for each in shares]


def at_stride(target: Tensor, stride: int) -> float:
    """Mean IoU of the truth itself, averaged over squares of `stride` pixels and enlarged again."""
    shares = F.avg_pool2d(F.one_hot(target, len(SHAPES)).permute(0, 3, 1, 2).float(), stride)
    return intersection_over_union(F.interpolate(shares, scale_factor=stride, mode="bilinear"), target)


def intersection_over_union(logits: Tensor, target: Tensor) -> float:
    return sum(of_each_class(logits, target)) / len(SHAPES)


def psnr(made: Tensor, target: Tensor) -> float:
    found = [fidelity(levels(each), levels(wanted), border=2).psnr for each, wanted in zip(made, target, strict=True)]
    return sum(found) / len(found)


def levels(picture: Tensor) -> Any:
    """(3, H, W) in [0, 1] -> (H, W, 3), uint8."""
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def bicubic(image: Tensor) -> Tensor:
    return F.interpolate(image, scale_factor=2, mode="bicubic", align_corners=False)


TRAININGS = {
    "plain ViT": Training(
        "vit",
        {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 6, "num_classes": 10},
        cifar, classification, accuracy, "accuracy, %",
    ),
    "SMT": Training(
        "smt",
        {"num_classes": 10, "embed_dims": (32, 64, 144, 320), "depths": (1, 1, 4, 1), "mlp_ratios": (4, 4, 4, 2),
         "sa_num_heads": (-1, -1, 4, 8), "drop_path_rate": 0.05},
        cifar, classification, accuracy, "accuracy, %",
    ),
    "VSSD": Training(
        "vssd",
        {"num_classes": 10, "embed_dim": 32, "depths": (1, 2, 4, 1), "num_heads": (1, 2, 4, 8), "d_state": 32,
         "drop_path_rate": 0.05},
        cifar, classification, accuracy, "accuracy, %",
    ),
    "STViT": Training(
        "stvit",
        {"num_classes": 10, "embed_dim": (32, 64, 160, 224), "depths": (1, 1, 4, 1), "num_heads": (1, 2, 5, 7),
         "stoken_size": (4, 2, 1, 1), "projection": 512, "drop_path_rate": 0.05},
        cifar, classification, accuracy, "accuracy, %",
    ),
    "DLGSANet": Training(
        "dlgsanet",
        {"dim": 48, "groups": 2, "buildblock_type": "sparseedge", "upsampler": "pixelshuffledirect", "upscale": 2,
         "tlc_kernel": 96},
        enlarging, restoration, psnr, "PSNR, dB", batch=16, lr=5e-4,
    ),
    "PP-MobileSeg": Training(
        "pp_mobileseg_tiny", {"num_classes": len(SHAPES)},
        drawings, segmentation, intersection_over_union, "mean IoU, %", batch=32, workers=3, stride=8,
    ),
    "PP-MobileSeg at 192": Training(
        "pp_mobileseg_tiny", {"num_classes": len(SHAPES)},
        functools.partial(drawings, times=2), segmentation, intersection_over_union, "mean IoU, %", batch=32, workers=3, stride=8,
    ),
    "U-Net": Training(
        "unet", {"num_classes": len(SHAPES), "widths": (26, 52, 104, 208)},
        drawings, segmentation, intersection_over_union, "mean IoU, %", batch=32, workers=3,
    ),
    "Driver (Video Swin)": Training(
        "driver",
        {"num_classes": len(MOTIONS), "embed_dim": 48, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "patch_size": (2, 4, 4),
         "window_size": (4, 4, 4), "patch_norm": True, "drop_path_rate": 0.05},
        motions, classification, accuracy, "accuracy, %", batch=64, lr=5e-4,
    ),
}  # fmt: skip


class LateError(Exception):
    """The time is over."""


def trained(name: str, seconds: float, device: str) -> Iterator[dict[str, Any]]:
    """Train one and quantize it. Yields its row as soon as it has a score, and again with each width."""
    how = TRAININGS[name]
    torch.manual_seed(0)
    model = UNet(**how.config) if how.system == "unet" else tersor.models.create(how.system, **how.config)
    with tempfile.TemporaryDirectory() as folder:
        sets = how.data(Path(folder))
        config: dict[str, Any] = {
            "batch_size": how.batch, "lr": how.lr, "weight_decay": 0.05, "max_grad_norm": 1.0, "epochs": 10**6,
            "workers": how.workers, "device": device, "log_every": TIMED // 2,
        }  # fmt: skip
        marks: list[float] = []
        fresh = {key: value.clone() for key, value in model.state_dict().items()}
        train(
            model, sets.train, objective=how.objective, out=Path(folder) / "timed",
            config=TrainConfig(max_steps=TIMED, **config), progress=lambda *_: marks.append(time.perf_counter()),
        )  # fmt: skip
        a_step = (marks[1] - marks[0]) / (TIMED - TIMED // 2)
        steps = max(TIMED, round(0.92 * seconds / a_step))  # others may slow it down a little
        model.load_state_dict(fresh)
        started = time.perf_counter()

        def watch(_: str, done: int, __: int) -> None:
            if time.perf_counter() - started > seconds:
                raise LateError(done)

        out, stopped = Path(folder) / "run", steps
        run = TrainConfig(max_steps=steps, warmup_steps=steps // 20, validate_every=max(1, steps // 20), **config)
        try:
            train(model, sets.train, objective=how.objective, out=out, config=run, progress=watch)
        except LateError as late:  # slower than what was timed
            stopped = int(late.args[0])
        took = time.perf_counter() - started
        row: dict[str, Any] = {
            "system": how.system, "what": how.what, "parameters": sum(each.numel() for each in model.parameters()),
            "steps": stopped, "planned": steps, "batch": how.batch, "seconds": round(took, 1),
        }  # fmt: skip
        with (out / "log.csv").open(encoding="utf-8") as log:
            losses = [float(each["loss"]) for each in csv.DictReader(log) if each["loss"]]
        row["losses"] = [losses[len(losses) * n // 10 - 1] for n in range(1, 11)] if len(losses) >= 10 else losses
        for found in quantized(model.eval(), how, sets):
            row |= found
            yield row


def quantized(model: nn.Module, how: Training, sets: Sets) -> Iterator[dict[str, Any]]:
    """Scores before and after, and the errors of the outputs."""
    base, target, inputs = outputs(model, sets.test)
    row: dict[str, Any] = {"before": how.score(base, target)}
    plain: Tensor | float = 0.0
    if how.score is psnr:
        plain = bicubic(inputs)
        row["bicubic"] = psnr(plain, target)
    if how.score is intersection_over_union:
        row["of each class"] = of_each_class(base, target)
        if how.stride > 1:
            row["limit"] = at_stride(target, how.stride)
    yield row
    chosen = torch.linspace(0, len(sets.train) - 1, CALIBRATION).int().tolist()
    calibration = [default_collate([sets.train[n] for n in chosen[s : s + 16]]) for s in range(0, CALIBRATION, 16)]
    for batch in calibration:
        batch.pop("target")
    for bits in BITS:
        result = tersor.compress(model, tersor.GPTQ(bits=bits, group_size=-1), calibration=calibration, format=None)
        assert result.model is not None
        found, _, _ = outputs(result.model, sets.test)
        row[f"{bits} bits"] = how.score(found, target)
        row[f"error {bits}"] = float((found - base).norm() / (base - plain).norm())
        row["layers"] = len(result.summary.layers)
        yield row


def table(rows: dict[str, dict[str, Any]]) -> str:
    described = (__doc__ or "").strip().split("\n\n")
    lines = [
        "# Vision models trained from scratch, and quantized by GPTQ",
        "",
        *"\n\n".join(described[2:]).splitlines(),
        "",
    ]
    for what in dict.fromkeys(row["what"] for row in rows.values()):
        lines += [f"## {what.partition(',')[0].capitalize() if what != 'mean IoU, %' else 'Mean IoU'}", ""]
        lines += [f"| model | parameters | steps x batch | seconds | {what} | 8 bits | 4 bits | error 8 | error 4 |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for name, row in rows.items():
            if row["what"] != what:
                continue
            steps = f"{row['steps']:,} x {row['batch']}"
            if row["steps"] < row["planned"]:
                steps += f" (of {row['planned']:,}: stopped by time)"
            scores = " | ".join(f"{row[each]:.2f}" if each in row else "" for each in ("before", "8 bits", "4 bits"))
            told = (row.get(f"error {bits}") for bits in BITS)
            errors = " | ".join("" if each is None else f"{100 * each:.2g} %" for each in told)
            lines += [
                f"| {name} (`{row['system']}`) | {row['parameters']:,} | {steps} | {row['seconds']} | {scores} | {errors} |"
            ]
            if "bicubic" in row:
                lines += [f"| bicubic | | | | {row['bicubic']:.2f} | | | | |"]
        lines += [""]
        for name, row in rows.items():
            if row["what"] == what and "of each class" in row:
                shares = ", ".join(f"{n} {share:.0f}" for n, share in zip(SHAPES, row["of each class"], strict=True))
                losses = ", ".join(f"{loss:.3f}" for loss in row["losses"])
                limit = f" The truth at the stride of its logits: {row['limit']:.0f} %." if "limit" in row else ""
                lines += [f"- {name}: {shares} %.{limit} Training loss after each tenth of the steps: {losses}."]
        lines += [""]
    for place in dict.fromkeys(f"{row['machine']}; {row['versions']}" for row in rows.values()):
        lines += [place + "."]
    lines += ["", *[f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows.values())]]
    return "\n".join(lines)


@contextmanager
def ended(children: dict[str, subprocess.Popen[str]]) -> Iterator[None]:
    """No child outlives this process."""
    try:
        yield
    finally:
        for child in children.values():
            if child.poll() is None:
                child.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TRAININGS))
    parser.add_argument("--seconds", type=float, default=90.0, help="of each training")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    given = parser.parse_args()
    if given.one:
        for row in trained(given.one, given.seconds, given.device):
            print("ROW " + json.dumps(row), flush=True)
        return
    names = given.names or list(TRAININGS)
    if unknown := set(names) - set(TRAININGS):
        parser.error(f"{sorted(unknown)[0]!r} is none of {', '.join(TRAININGS)}")
    command = f"python benchmarks/vision_training.py {' '.join(map(repr, given.names))} --seconds {given.seconds:g}"
    command += "" if given.device == "auto" else f" --device {given.device}"
    where = gpu() if torch.cuda.is_available() and given.device != "cpu" else f"{hardware()}; {versions()}"
    place = {"machine": where.partition(";")[0], "versions": versions(), "command": command.replace("  ", " ")}
    how = ["--seconds", str(given.seconds), "--device", given.device]
    children = {
        name: subprocess.Popen([sys.executable, __file__, "--one", name, *how], stdout=subprocess.PIPE, text=True)
        for name in names
    }
    rows = kept_numbers("vision_training")
    lock = threading.Lock()

    def follow(name: str, child: subprocess.Popen[str]) -> None:
        """Keep each row that a child prints, so that a run that is cut off has left what was done."""
        nonlocal rows
        assert child.stdout is not None
        for line in child.stdout:
            print(f"{name}: {line}", end="", flush=True)
            if line.startswith("ROW "):
                with lock:
                    rows[name] = json.loads(line[4:]) | place
                    rows = {each: rows[each] for each in TRAININGS if each in rows}
                    write_numbers("vision_training", rows)
                    write_table("vision_training", table(rows))
        if child.wait():
            print(f"{name} FAILED with status {child.returncode}", flush=True)

    with ended(children):
        threads = [threading.Thread(target=follow, args=each) for each in children.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
