"""What a job did, in numbers: the part of a result that is printed and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tersor.compress.samples import compared_on
from tersor.compress.settings import Settings
from tersor.methods.method import Report


@dataclass(frozen=True)
class Summary:
    """What a job did. Sizes in bytes, times in seconds."""

    model: str
    method: dict[str, Any]
    format: str | None
    layers: Sequence[Report]
    left: list[str]
    seconds: float
    seconds_per_block: dict[str, float]
    peak_memory: int
    bits_per_weight: float
    quantization: dict[str, Any]  # what the checkpoint says of itself, as in its config.json
    size_before: int | None = None
    size_after: int | None = None
    # Mean KL divergence of the compressed model's predictions from the original's, in nats. This and the next three are left out
    # where the model's output is no prediction over classes.
    divergence: float | None = None
    agreement: float | None = None  # how often both predict the same
    divergences: Sequence[float] = ()  # of each window, where there are several
    compared_on: str | None = None  # what the predictions were made on
    resumed_blocks: int = 0  # those that an earlier run finished
    parameters_before: int | None = None
    parameters_after: int | None = None
    sparsity: float | None = None  # share of zeros in the layers that were made sparse
    steps: Sequence[dict[str, Any]] = ()  # of a recipe of several: the methods, in order
    memory_per_block: dict[str, int] = field(default_factory=dict)  # bytes held when each block was finished

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "layers": [layer.row() for layer in self.layers]}


def loss_of(asked: Settings, before: Tensor | None, after: Tensor | None) -> dict[str, Any]:
    """Divergence and agreement of two outputs [..., classes]; empty where there is nothing to compare."""
    if before is None or after is None or before.shape != after.shape or before.dim() < 2:
        return {}
    windows = [_divergence(p, q.to(p.device)) for p, q in zip(before, after, strict=True)]
    agreement = (before.argmax(-1) == after.to(before.device).argmax(-1)).double().mean()
    return {
        "divergence": sum(windows) / len(windows),
        "agreement": float(agreement),
        "divergences": windows if len(windows) > 1 else [],
        "compared_on": compared_on(asked, before),
    }


def _divergence(before: Tensor, after: Tensor) -> float:
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
