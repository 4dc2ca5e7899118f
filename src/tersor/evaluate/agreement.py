"""What a compressed image classifier lost: its classes beside the original's on the same labelled images.

Images are independent, so every interval is over images, by Student's t; that of the change of accuracy is paired.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.load import load
from tersor.checkpoint.source import Checkpoint, Openable, open_checkpoint
from tersor.devices import DType
from tersor.errors import TersorError
from tersor.evaluate.accuracy import read_images
from tersor.evaluate.interval import Estimate, estimate
from tersor.evaluate.measures import AT_ONCE, class_logits, kl_of
from tersor.progress import Progress


@dataclass(frozen=True)
class Agreement:
    """Shares are between 0 and 1, divergences in nats."""

    images: int
    accuracy: Estimate
    base_accuracy: Estimate
    change: Estimate  # accuracy - base_accuracy
    agreement: Estimate  # share of images for which both say the same class
    harmful_flips: float  # the original was right, the other is wrong
    helpful_flips: float
    kl: Estimate  # KL(original || other)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def agreement(
    model: Openable | nn.Module,
    against: Openable | nn.Module,
    images: str | Path | tuple[Tensor, Tensor],
    *,
    max_images: int | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Agreement:
    """model, against: names, directories or modules; one of them is in memory at a time. images: a folder with one subfolder a
    class or a packed .npz, prepared as `against` wants them; for modules the images [n, 3, H, W] and their labels [n].

    Raises TersorError where there are no images, or the two tell unlike numbers of classes apart.
    """
    model, against = (each if isinstance(each, nn.Module) else open_checkpoint(each) for each in (model, against))
    if isinstance(images, tuple):
        pixels, labels = images
    elif isinstance(against, nn.Module):
        raise TersorError("a module does not say how it wants its images: give (images, labels) as tensors")
    else:
        pixels, labels = read_images(against, images, limit=max_images)
    pixels, labels = pixels[:max_images], labels[:max_images]
    if len(pixels) == 0:
        raise TersorError("there are no images to evaluate on")
    p, q = (
        _classes(each, name, pixels, dtype, device, progress)
        for each, name in ((against, "the original"), (model, "comparing"))
    )
    if p.shape != q.shape:
        raise TersorError(
            f"the models tell {q.shape[1]} and {p.shape[1]} classes apart; --against is the model that was compressed"
        )
    if int(labels.max()) >= p.shape[1]:
        raise TersorError(f"a label is {int(labels.max())}, but the model has only {p.shape[1]} classes")
    return compared(p, q, labels)


def compared(p: Tensor, q: Tensor, labels: Tensor) -> Agreement:
    """p, q: log-probabilities [images, classes] of the original and the other; labels [images]."""
    first, second = p.argmax(-1), q.argmax(-1)
    base_right, right = first == labels, second == labels
    return Agreement(
        images=len(labels),
        accuracy=estimate(right),
        base_accuracy=estimate(base_right),
        change=estimate(right.double() - base_right.double()),
        agreement=estimate(first == second),
        harmful_flips=float((base_right & ~right).double().mean()),
        helpful_flips=float((~base_right & right).double().mean()),
        kl=estimate(kl_of(p, q)),
    )


def _classes(
    model: Checkpoint | nn.Module,
    name: str,
    pixels: Tensor,
    dtype: DType,
    device: str,
    progress: Progress | None,
) -> Tensor:
    """Log-probabilities [images, classes] in float64, on the CPU."""
    module = (model if isinstance(model, nn.Module) else load(model, dtype=dtype, device=device)).eval()
    first = next(module.parameters())
    found = []
    for batch in torch.split(pixels, AT_ONCE):
        logits = class_logits(module, batch.to(first.device, first.dtype))
        if not bool(torch.isfinite(logits).all()):
            raise TersorError(
                f"{type(module).__name__} gives logits that are not finite; nothing can be compared with them"
            )
        found.append(logits.double().log_softmax(-1).cpu())
        if progress is not None:
            progress(name, min(len(found) * AT_ONCE, len(pixels)), len(pixels))
    return torch.cat(found)
