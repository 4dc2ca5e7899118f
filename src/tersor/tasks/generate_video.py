"""Videos out of noise: Gaussian diffusion with masks (VDT), as a GIF, a PNG with the frames side by side, or an .npy.

A model of 1 or 3 channels makes pixels, -1 black and 1 white; one of other channels makes the latents of an image autoencoder,
which are written as .npy. Training data are an .npz with `frames` (N, T, C, H, W): whole numbers 0 to 255, or values as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.data.arrays import load_arrays
from tersor.data.clips import from_frames, read_clip, write_clip
from tersor.data.video_masks import VideoMasks
from tersor.errors import TersorError
from tersor.files import replacing
from tersor.progress import Progress
from tersor.tasks.task import Generator, Order, Sets, Task, numbers_of
from tersor.train.diffusion import DiffusionConfig, GaussianDiffusion
from tersor.train.objectives import Batch
from tersor.untrusted import read_npy

STEPS = 50  # of 1000
PIXELS = (1, 3)  # channels that are pixels


@dataclass(frozen=True)
class Clip:
    path: Path
    shape: tuple[int, ...]  # frames, channels, height, width
    given: int  # frames at the start that came from the condition

    def line(self) -> str:
        frames, _, height, width = self.shape
        told = f", the first {self.given} given" if self.given else ""
        return f"{self.path}: {frames} {'frame' if frames == 1 else 'frames'} of {width} x {height}{told}"

    def as_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "shape": list(self.shape), "given": self.given}


def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The diffusion's loss at a drawn step, with one of the training masks for each sample: generation, prediction,
    interpolation and completion in one model."""
    config: Any = getattr(model, "module", model).config  # DistributedDataParallel holds the model as `module`
    x = batch["x"]
    diffusion = GaussianDiffusion(DiffusionConfig(learn_sigma=config.learn_sigma))
    mask = None
    if config.video:
        frames, side = x.shape[1], x.shape[-1]
        given = max(1, frames // 2)
        drawer = VideoMasks(frames=frames, height=side, width=side, predict_given=given, backward_given=given)
        mask = torch.stack([drawer.draw_for_training() for _ in x]).to(x)
    t = torch.randint(diffusion.steps, (len(x),)).to(x.device)
    terms = diffusion.losses(model, x, t, mask=mask)
    return {"loss": terms.loss.mean(), "mse": terms.mse.mean()}


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    if table:
        raise TersorError(f"an .npz of frames has no settings; leave data.{next(iter(table))} out")
    wanted = list(model.example_inputs(1)["x"].shape[1:])
    sets = []
    for path in (data, validation):
        if path is None:
            continue
        arrays = load_arrays(path, {"frames": "x"})
        x = arrays.arrays["x"]
        if list(x.shape[1:]) != wanted:
            raise TersorError(f"{path}: frames of a clip are {list(x.shape[1:])}, the model takes {wanted}")
        if not x.is_floating_point():
            if int(x.min()) < 0 or int(x.max()) > 255:
                raise TersorError(
                    f"{path}: frames of whole numbers are 0 to 255, these reach {int(x.min())} and {int(x.max())}"
                )
            arrays.arrays["x"] = x.float() / 127.5 - 1
        sets.append(arrays)
    return Sets(sets[0], sets[1] if validation is not None else None)


@torch.no_grad()
def sample(generator: Generator, order: Order, progress: Progress) -> Clip:
    module = generator.module
    config, like = module.config, numbers_of(module)
    kind = order.out.suffix.lower()
    for name in ("prompt", "guidance", "resolution"):
        if getattr(order, name) is not None:
            raise TersorError(f"this model takes no --{name}; frames to go on from are its --condition")
    if config.in_channels not in PIXELS and kind != ".npy":
        raise TersorError(
            f"this model makes latents of {config.in_channels} channels, for an image autoencoder; --out NAME.npy keeps them"
        )
    shape = (config.num_frames, config.in_channels, config.input_size, config.input_size)
    given, mask, count = None, None, 0
    if order.condition is not None:
        first = _condition(order.condition, shape)
        count = len(first)
        given, mask = torch.zeros(1, *shape), torch.ones(1, shape[0], *shape[2:])
        given[0, :count], mask[0, :count] = first, 0
        given, mask = given.to(like), mask.to(like)
    chance = torch.Generator().manual_seed(order.seed)
    diffusion = GaussianDiffusion(
        DiffusionConfig(timestep_respacing=str(order.steps or STEPS), learn_sigma=config.learn_sigma)
    )
    done = 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal done
        found: Tensor = module(x, t)
        done += 1
        progress("steps", done, diffusion.steps)
        return found

    def noise() -> Tensor:  # drawn on the CPU: a seed means the same on every device
        return torch.randn(1, *shape, generator=chance).to(like)

    start = noise()
    drawn = (noise() for _ in range(diffusion.steps))
    made = diffusion.sample(model, start, given=given, mask=mask, paste_given=given is not None, noise=drawn)
    clip = made[0].float().cpu()
    if not bool(torch.isfinite(clip).all()):
        raise TersorError("the model made NaN or Inf; has it been trained?")
    with replacing(order.out) as partial:
        write_clip(clip, partial, kind=kind)
    return Clip(order.out, shape, count)


def _condition(path: Path, shape: tuple[int, int, int, int]) -> Tensor:
    """(k, C, H, W), fewer frames than the model makes."""
    frames, channels, side, _ = shape
    if path.suffix.lower() == ".npy":
        values = read_npy(path)
        if values.ndim != 4 or values.shape[1:] != shape[1:] or values.dtype.kind != "f":
            raise TersorError(
                f"{path} holds {values.dtype} {list(values.shape)}; (frames, {', '.join(map(str, shape[1:]))}) of "
                "fractions is needed"
            )
        found = torch.from_numpy(values.astype(np.float32))
    elif channels not in PIXELS:
        raise TersorError(
            f"this model goes on from latents, an .npy (frames, {', '.join(map(str, shape[1:]))}), not {path}"
        )
    else:
        found = from_frames(read_clip(path, frames), side=side, channels=channels)
    if not 1 <= len(found) < frames:
        raise TersorError(
            f"{path} has {'' if len(found) < frames else 'at least '}{len(found)} frames; the model makes {frames}, so 1 to "
            f"{frames - 1} can be given"
        )
    return found


TASK = Task(objective, load_data, sample=sample, makes=frozenset({".gif", ".png", ".npy"}))
