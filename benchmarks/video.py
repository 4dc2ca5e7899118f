"""Moving shapes: what a small VDT knows of the frames that it is not shown, and what few bits cost.

    python benchmarks/video.py --device cuda --out film         learns, keeps film/ (a model), pictures, and the table

Clips of 9 frames of 32 x 32 pixels, one or two discs, squares or triangles of 5 to 8 pixels' radius that move 1 to 3 pixels a
frame and bounce off the walls; drawn anew for each step of learning, so no clip comes twice. The model makes pixels: width 192,
6 blocks, patches of 4, 5.3 million weights; it learns with the masks and the loss of VDT.

"forward": the first 4 frames are given, the other 5 made. "between": frames 1, 5 and 9 are given, the 6 between are made.
Errors: mean squared error of the made frames' pixels, black -1 and white 1, over 128 clips that were not learned from; one
sample each, or the mean of 8 of them: a sample is one of the clips that may be, their mean is the guess of least squared error.
"copy": the last given frame before; "blend": the mean of the given frames before and after, weighted by their distance in time.

W8A8: RepQuant, weights and activations in 8 bits. W4A16: weights of the blocks in 4 bits with one scale for 32 of them, by GPTQ
and rounded to the nearest level, activations as they are. Calibrated on noised clips with masks, 64 for GPTQ and 32 for
RepQuant. Sampled from the same noise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from common import gpu, learn, machine, write_table
from torch import Tensor, nn

import tersor
import tersor.models
from tersor.data.clips import write_clip
from tersor.data.video_masks import VideoMasks
from tersor.layers.quantized_linear import QuantizedLinear
from tersor.methods.activations.repquant import RepQuant
from tersor.methods.weights.gptq import GPTQ
from tersor.methods.weights.rtn import RTN
from tersor.train.diffusion import DiffusionConfig, GaussianDiffusion

FRAMES, SIDE, BATCH, TESTS = 9, 32, 96, 128
MODEL = {
    "input_size": SIDE,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 192,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 1,
    "class_dropout_prob": 0.0,
    "num_frames": FRAMES,
}
TASKS = {"forward": "predict", "between": "interpolation"}
MASKS = VideoMasks(frames=FRAMES, height=SIDE, width=SIDE, predict_given=4, backward_given=4, interpolation_step=4)


def clips(count: int, chance: torch.Generator | None, device: str = "cpu") -> Tensor:
    """(count, FRAMES, 1, SIDE, SIDE) in [-1, 1]."""

    def drawn(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=chance, device=device)

    r = 5 + 3 * drawn(2, 1)
    kind = (3 * drawn(2, 1)).long()
    shown = torch.stack((torch.ones_like(r[:, 0]), drawn(1)), 1) > 0.5  # the second in half of the clips
    angle, speed = 2 * math.pi * drawn(2, 1), 1 + 2 * drawn(2, 1)
    place, room = drawn(2, 2), SIDE - 1 - 2 * r
    when = torch.arange(FRAMES, device=device)
    centre = []
    for axis, velocity in ((0, speed * angle.cos()), (1, speed * angle.sin())):
        way = place[..., axis, None] * room + velocity * when  # (count, 2, FRAMES)
        way = way.remainder(2 * room)
        centre.append(r + torch.where(way > room, 2 * room - way, way))  # back from the wall
    pixel = torch.arange(SIDE, device=device)
    dx = pixel - centre[0][..., None, None]  # (count, 2, FRAMES, 1, SIDE)
    dy = pixel[:, None] - centre[1][..., None, None]
    r = r[..., None, None]
    disc = r - (dx.square() + dy.square()).sqrt()
    square = 0.8 * r - torch.maximum(dx.abs(), dy.abs())
    triangle = torch.minimum(0.6 * r - dy, (dy + r - math.sqrt(3) * dx.abs()) / 2).expand_as(disc)
    depth = torch.stack((disc, square.expand_as(disc), triangle), -1)
    depth = depth.gather(-1, kind[..., None, None, None].expand(*disc.shape, 1))[..., 0]
    ink = (depth + 0.5).clamp(0, 1) * shown[..., None, None]
    return (2 * ink.amax(1) - 1)[:, :, None]


def learn_video(model: nn.Module, *, device: str, seconds: float, steps: int) -> int:
    diffusion = GaussianDiffusion(DiffusionConfig()).to(device)
    drawn = torch.Generator().manual_seed(0)
    masks = torch.stack([MASKS.draw_for_training(drawn) for _ in range(2048)]).to(device)

    def predicted(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found: Tensor = model(x, t)
        return found.float()

    def loss() -> Tensor:
        rows = torch.randint(len(masks), (BATCH,), device=device)
        t = torch.randint(diffusion.steps, (BATCH,), device=device)
        return diffusion.losses(predicted, clips(BATCH, None, device), t, mask=masks[rows]).loss.mean()

    return learn([model.to(device)], loss, rate=1e-3, seconds=seconds, steps=steps, told="video", record=True)


def mask_of(task: str, like: Tensor) -> Tensor:
    return MASKS.draw(TASKS[task]).to(like).expand(len(like), -1, -1, -1)


@torch.no_grad()
def completed(model: Any, x: Tensor, task: str, *, sampler: str, steps: int, seed: int = 2) -> Tensor:
    diffusion = GaussianDiffusion(DiffusionConfig(timestep_respacing=str(steps))).to(x.device)
    chance = torch.Generator().manual_seed(seed)  # of the CPU: the same on every device

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=chance).to(x)

    drawn = (noise() if sampler == "ddpm" else torch.zeros_like(x) for _ in range(steps))
    return diffusion.sample(
        model, noise(), given=x, mask=mask_of(task, x), sampler=sampler, clip=True, paste_given=True, noise=drawn
    )


def error(made: Tensor, x: Tensor, task: str) -> float:
    m = mask_of(task, x)[:, :, None]
    return float(((made - x).square() * m).sum() / m.expand_as(x).sum())


def copied(x: Tensor, task: str) -> Tensor:
    given = mask_of(task, x)[0, :, 0, 0] == 0
    before = [max(at for at in range(frame + 1) if given[at]) for frame in range(FRAMES)]
    return x[:, before]


def blended(x: Tensor) -> Tensor:
    """Of every fourth frame."""
    when = torch.arange(FRAMES, device=x.device)
    before = (when // 4) * 4
    after, share = (before + 4).clamp(max=FRAMES - 1), ((when - before) / 4).reshape(-1, 1, 1, 1)
    return (1 - share) * x[:, before] + share * x[:, after]


def calibration(x: Tensor) -> list[dict[str, Tensor]]:
    """Noised clips, as sampling shows them."""
    diffusion, chance = GaussianDiffusion(DiffusionConfig()), torch.Generator().manual_seed(3)
    found = []
    for row in x:
        m = MASKS.draw_for_training(chance)[:, None].to(x)
        t = torch.randint(diffusion.steps, (1,), generator=chance)
        noise = torch.randn(row.shape, generator=chance).to(x)
        noised = diffusion.add_noise(row[None], t.to(x.device), noise[None])
        found.append({"x": row * (1 - m) + noised * m, "t": t.to(x.device)})
    return found


def few_bits(model: nn.Module, x: Tensor) -> Iterator[tuple[str, nn.Module]]:
    samples, inside = calibration(x[:64]), ["blocks.*"]
    yield "W4A16, rounded", dense(tersor.compress(model, RTN(bits=4, group_size=32), include=inside).model)
    gptq = tersor.compress(model, GPTQ(bits=4, group_size=32), calibration=samples, include=inside)
    yield "W4A16, GPTQ", dense(gptq.model)
    yield "W8A8, RepQuant", tersor.compress(model, RepQuant(w_bits=8, a_bits=8), calibration=samples).model


def dense(model: nn.Module) -> nn.Module:
    """Packed layers as plain ones with the same numbers: what is measured here is their error alone."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            W = layer.weight
            plain = nn.Linear(W.shape[1], W.shape[0], bias=layer.bias is not None, device=W.device)
            plain.load_state_dict({"weight": W} | ({} if layer.bias is None else {"bias": layer.bias}))
            model.set_submodule(name, plain)
    return model


def strip(parts: Mapping[str, Tensor]) -> Tensor:
    """Clips (FRAMES, 1, SIDE, SIDE) one below the other, with grey lines between."""
    rows: list[Tensor] = []
    for clip in parts.values():
        rows += [clip, torch.zeros(FRAMES, 1, 2, SIDE)]
    return nn.functional.pad(torch.cat(rows[:-1], 2), (0, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of learning, at most")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--tests", type=int, default=TESTS)
    parser.add_argument("--samples", type=int, default=50, help="steps of sampling")
    asked = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    asked.out.mkdir(parents=True, exist_ok=True)
    model: Any = tersor.models.create("vdt", **MODEL)
    done = learn_video(model, device=asked.device, seconds=asked.seconds, steps=asked.steps)
    torch.save({name: value.half() for name, value in model.state_dict().items()}, asked.out / "vdt.pt")
    x = clips(asked.tests, torch.Generator().manual_seed(1)).to(asked.device)
    where = gpu() if asked.device.startswith("cuda") else machine()
    command = f"`python benchmarks/video.py --device {asked.device} --out film --seconds {asked.seconds:.0f}`"
    described = (__doc__ or "").strip()
    text = ["# Moving shapes", "", described[described.index("Clips of 9") :], ""]
    lines = ["| | steps of sampling | forward | between |", "| --- | ---: | ---: | ---: |"]

    def row(name: str, steps: str, forward: float | None, between: float) -> None:
        lines.append(f"| {name} | {steps} | {'' if forward is None else f'{forward:.4f}'} | {between:.4f} |")
        print(lines[-1], flush=True)
        write_table(
            "video", "\n".join([*text, *lines, "", f"Learned in {done:,} steps of {BATCH} clips. {where}.", command])
        )

    def measured(name: str, module: Any, sampler: str, steps: int, *, samples: int = 1) -> dict[str, Tensor]:
        made = {task: torch.stack([completed(module, x, task, sampler=sampler, steps=steps, seed=2 + n)
                                   for n in range(samples)]).mean(0) for task in TASKS}  # fmt: skip
        row(name, f"{sampler.upper()}, {steps}", *(error(made[task], x, task) for task in TASKS))
        return made

    row("copy", "", *(error(copied(x, task), x, task) for task in TASKS))
    row("blend", "", None, error(blended(x), x, "between"))
    kept = measured("VDT", model, "ddim", asked.samples)
    parts = {"truth": x[0].cpu()} | {task: made[0].cpu() for task, made in kept.items()}
    write_clip(strip(parts), asked.out / "vdt-moving-shapes.png", kind=".png")
    measured("VDT", model, "ddpm", asked.samples)
    measured("VDT, mean of 8 samples", model, "ddpm", asked.samples, samples=8)
    for name, module in few_bits(model, x):
        measured(name, module, "ddim", asked.samples)
    measured("VDT", model, "ddpm", 5 * asked.samples)


if __name__ == "__main__":
    main()
