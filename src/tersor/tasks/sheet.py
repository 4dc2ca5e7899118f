"""A picture of what a trained model says: a row a sample with the input, what it should give, and what it gives.

    write_sheet(model, data, panels, sets, Path("run/samples.png"))

A task says in `panels(sample, output, sets)` what the three are: pictures (H, W, 3) of uint8, or words.
"""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.data.images import FILTERS, from_pixels
from tersor.files import replacing
from tersor.tasks.task import Sets, numbers_of

SAMPLES = 8
TILE = 192  # pixels to a side; smaller pictures are enlarged so that their pixels are seen
GAP = 8
HEADS = ("input", "truth", "prediction")
Panels = Callable[[Mapping[str, Tensor], Any, Sets], Sequence[Any]]


@torch.no_grad()
def write_sheet(model: nn.Module, data: Any, panels: Panels, sets: Sets, path: Path) -> None:
    """Up to SAMPLES of the data, evenly spaced. The model is run in eval mode, and left as it was."""
    device = numbers_of(model).device
    was_training = model.training
    model.eval()
    rows = []
    for index in torch.linspace(0, len(data) - 1, min(SAMPLES, len(data))).long().tolist():
        sample = data[index]
        inputs = {name: value[None].to(device) for name, value in sample.items() if name != "target"}
        output = model(**inputs)
        rows.append(panels(sample, output[0].cpu(), sets))
    model.train(was_training)
    with replacing(path) as partial:
        drawn(rows).save(partial, format="PNG")


def drawn(rows: Sequence[Sequence[Any]]) -> Any:
    """The sheet, a picture of Pillow."""
    image, draw = (importlib.import_module(f"PIL.{name}") for name in ("Image", "ImageDraw"))
    step = TILE + GAP
    sheet = image.new("RGB", (len(HEADS) * step + GAP, len(rows) * step + 3 * GAP), "white")
    pen = draw.Draw(sheet)
    for column, head in enumerate(HEADS):
        pen.text((GAP + column * step, GAP // 2), head, fill="black")
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            left, top = GAP + column * step, 3 * GAP + row * step
            if isinstance(cell, str):
                words = "\n".join(textwrap.wrap(cell, 28)).encode("latin-1", "replace").decode("latin-1")
                pen.multiline_text((left, top), words, fill="black")
            else:
                sheet.paste(_tile(cell), (left, top))
    return sheet


def _tile(pixels: Any) -> Any:
    """A picture whose longer side is TILE pixels."""
    height, width = pixels.shape[:2]
    scale = TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return from_pixels(pixels).resize(size, FILTERS.index("nearest" if scale > 1 else "bicubic"))


def levels(picture: Tensor) -> Any:
    """(3 or 1, H, W) in [0, 1] -> (H, W, 3), uint8."""
    values: Any = (picture.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(values.expand(3, -1, -1).permute(1, 2, 0).numpy())


def shown(image: Tensor, preprocessing: Mapping[str, Any]) -> Any:
    """A normalised image (3, H, W) as a picture, by the mean and the standard deviation of preprocessor_config.json."""
    mean, std = (torch.tensor(preprocessing[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    return levels(image * std + mean)
