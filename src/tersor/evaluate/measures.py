"""How far the predictions of one model are from another's, sample by sample: what attribution repeats for every layer.

KL(p || q) = Σ p (log p - log q) over the vocabulary or the classes, in nats, the mean over a window's tokens, or of one image;
for forecasts the mean squared difference, in scaled units. Equal predictions give exactly 0.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.hashes import bytes_of
from tersor.errors import TersorError
from tersor.evaluate.perplexity import causal_windows, logits_of

ROWS = 64  # tokens whose distributions are in memory in float64 at once
AT_ONCE = 50  # images


@dataclass(frozen=True)
class Measure:
    """A way to compare predictions."""

    name: str  # KL or MSE
    text: str  # what the samples are, in words
    key: str  # a hash of the samples
    calls: tuple[
        Callable[[nn.Module], Tensor], ...
    ]  # each gives what a module predicts for some samples, [samples, ...]
    distance: Callable[[Tensor, Tensor], Tensor]  # of two such tensors: [samples]

    def between(self, p: Tensor, q: Tensor) -> Tensor:
        """[samples], float64, on the CPU, of the original's predictions p. Raises TersorError where those of the other model
        are of another shape, or not finite."""
        if p.shape != q.shape:
            raise TersorError(
                f"the models predict unlike things: {q.shape[-1]} and {p.shape[-1]} tokens, classes or columns; "
                "--against is the model that was compressed"
            )
        if not bool(torch.isfinite(q).all()):
            raise TersorError("the compressed model predicts values that are not finite (NaN or Inf)")
        return self.distance(p, q.to(p.device)).double().cpu()


class Meter:
    """Distances of models from one whose predictions are kept, in its own dtype."""

    def __init__(self, measure: Measure, base: nn.Module) -> None:
        self.measure = measure
        self.first_call: dict[str, Any] | None = None
        with torch.no_grad(), base.register_forward_pre_hook(self._note, with_kwargs=True):
            self._reference = [call(base) for call in measure.calls]

    def __call__(self, module: nn.Module) -> Tensor:
        """[samples], float64, on the CPU. Raises TersorError as `Measure.between` does."""
        pairs = zip(self._reference, self.measure.calls, strict=True)
        with torch.no_grad():
            return torch.cat([self.measure.between(p, call(module)) for p, call in pairs])

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model's first call as named arguments."""
        if self.first_call is None:
            names = list(inspect.signature(module.forward).parameters)
            self.first_call = {**dict(zip(names, args, strict=False)), **kwargs}


def text_measure(
    base: nn.Module,
    texts: Sequence[str | Path] | Tensor,
    *,
    tokenizer: Any = None,
    seq_len: int,
    max_windows: int | None,
) -> Measure:
    """Next-token distributions on windows of texts. Raises TersorError as `perplexity` does."""
    windows = causal_windows(base, texts, seq_len=seq_len, max_windows=max_windows, tokenizer=tokenizer)
    return windows_measure(windows, "tokens" if isinstance(texts, Tensor) else ", ".join(map(str, texts)))


def windows_measure(windows: Tensor, told: str, device: torch.device | None = None) -> Measure:
    """Next-token distributions on windows [windows, tokens]. device: that of the model (None: of its first weight)."""

    def call(window: Tensor, module: nn.Module) -> Tensor:
        where = device or next(module.parameters(), torch.empty(0)).device
        return logits_of(module, window[None].to(where))[:, :-1].contiguous()

    count, seq_len = windows.shape
    calls = tuple(partial(call, window) for window in windows)
    return Measure("KL", f"{count} windows of {seq_len} tokens of {told}", key_of(windows), calls, _mean_kl)


def image_measure(pixels: Tensor, told: str) -> Measure:
    """Distributions over classes. pixels: as the model wants them, [images, 3, H, W]."""
    if len(pixels) == 0:
        raise TersorError("there are no images to measure on")

    def call(batch: Tensor, module: nn.Module) -> Tensor:
        first = next(module.parameters())
        return class_logits(module, batch.to(first.device, first.dtype))

    calls = tuple(partial(call, batch) for batch in torch.split(pixels, AT_ONCE))
    return Measure("KL", f"{len(pixels)} images of {told}", key_of(pixels), calls, _mean_kl)


def class_logits(module: nn.Module, images: Tensor) -> Tensor:
    """[images, classes]. Raises TersorError where the model gives something else."""
    output = module(images)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise TersorError(f"{type(module).__name__} is no image classifier: it gives no logits [images, classes]")
    return logits


def mean_square(p: Tensor, q: Tensor) -> Tensor:
    """[samples, ...] twice -> [samples]."""
    return (p.double() - q.double()).square().flatten(1).mean(1)


def kl_of(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of log-probabilities [..., classes] -> [...]; rounding does not take it below 0."""
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def _mean_kl(p: Tensor, q: Tensor) -> Tensor:
    """Logits [samples, (tokens,) classes] -> [samples]."""
    return torch.stack([_kl(a, b) for a, b in zip(p, q, strict=True)])


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Logits [(tokens,) classes] -> the mean over tokens."""
    p, q = p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1])
    sums = []
    for a, b in zip(torch.split(p, ROWS), torch.split(q, ROWS), strict=True):
        a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
        sums.append(kl_of(a, b).sum())
    return torch.stack(sums).sum() / len(p)


def key_of(samples: Tensor) -> str:
    return hashlib.sha256(f"{samples.dtype} {tuple(samples.shape)}".encode() + bytes(bytes_of(samples))).hexdigest()
