"""What a compressed language model lost: its predictions beside the original's on the same text, token by token.

For every predicted token, with p of the original and q of the other over the vocabulary:

    KL(p || q) = sum p (log p - log q)      in nats; 0 where both say the same
    flip: the likelier choice differs        harmful, where the original was right and the other is wrong

Tokens of one window are not independent, so every interval is that of the means of windows: 1.96 standard errors.
The noise floor is the same comparison of the original with itself in bfloat16: what is below it cannot be told from rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.load import load, load_tokenizer
from tersor.checkpoint.source import resolve
from tersor.errors import TersorError
from tersor.evaluate.perplexity import causal_windows, logits_of, tokens_of

BUCKETS = 5
OVERLAP = 10  # of the k likeliest tokens
SHOWN = 3  # passages
PASSAGE = 24  # tokens


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, and half the width of its 95 % interval (None where there is only one window)."""

    mean: float
    half_width: float | None


@dataclass(frozen=True)
class Bucket:
    """Tokens where the original gave its first choice a probability between `low` and `high`."""

    low: float
    high: float
    tokens: int
    kl: float
    same_top1: float


@dataclass(frozen=True)
class Passage:
    """Tokens in a row on which the two differ most."""

    text: str
    window: int
    kl: float


@dataclass(frozen=True)
class Divergence:
    """Everything that `tersor eval --against` prints. Shares are between 0 and 1, divergences in nats."""

    tokens: int
    windows: int
    seq_len: int
    perplexity: Estimate
    base_perplexity: Estimate
    ratio: Estimate  # of the perplexities, paired: exp of the mean difference of the losses
    kl: Estimate  # KL(original || other)
    kl_quantiles: dict[str, float]  # median, 90 %, 99 %, 99.9 %, max
    reverse_kl: Estimate  # KL(other || original)
    noise_floor: float | None  # KL(original || original in bfloat16); None where it was not asked for
    same_top1: Estimate
    overlap: float  # mean share of the original's ten likeliest tokens that are among the other's ten
    harmful_flips: float  # the original's first choice was the text's, the other's is not
    helpful_flips: float
    buckets: list[Bucket] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Tokens:
    """What is kept of each predicted token, a list of windows (n - 1,) each."""

    loss: list[Tensor] = field(default_factory=list)
    base_loss: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    reverse: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    overlap: list[Tensor] = field(default_factory=list)
    base_right: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def divergence(
    model: str | Path | nn.Module,
    against: str | Path | nn.Module,
    text: str | Path | Tensor | None = None,
    *,
    tokenizer: Any = None,
    seq_len: int = 1024,
    max_windows: int | None = None,
    noise_floor: bool = True,
    dtype: str = "auto",
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Divergence:
    """Compare `model` with `against`, the original, on windows of a text; both are in memory at once.

    model, against: names, directories or modules that return `.logits`. text: as for `perplexity`. Raises TersorError where
    the vocabularies differ, or the text is shorter than a window.
    """
    ids, decode = _ids(against, text, tokenizer)
    base, other = (
        each.eval() if isinstance(each, nn.Module) else load(each, dtype=dtype, device=device).eval()
        for each in (against, model)
    )
    how: dict[str, Any] = {"seq_len": seq_len, "max_windows": max_windows, "tokenizer": tokenizer}
    windows = causal_windows(base, ids, **how)
    causal_windows(other, ids, **how)
    kept = _Tokens()
    for number, window in enumerate(windows):
        p, q = _log_probabilities(base, window), _log_probabilities(other, window)
        if p.shape != q.shape:
            raise TersorError(
                f"the vocabularies differ: {p.shape[-1]} and {q.shape[-1]} tokens; --against is the model that was compressed"
            )
        _compare(kept, p, q, window[1:].to(p.device))
        if noise_floor:
            kept.noise.append(_kl(p, _log_probabilities(base, window, rounded=True)).cpu())
        if progress is not None:
            progress("comparing", number + 1, len(windows))
    return _summarized(kept, seq_len, _passages(kept.kl, windows, decode))


def _compare(kept: _Tokens, p: Tensor, q: Tensor, wanted: Tensor) -> None:
    """p, q: log-probabilities [tokens, vocabulary] of the original and the other; wanted: what the text says, [tokens]."""
    k = min(OVERLAP, p.shape[-1])
    first, second = p.topk(k).indices, q.topk(k).indices
    found = {
        "loss": -q.gather(-1, wanted[:, None])[:, 0],
        "base_loss": -p.gather(-1, wanted[:, None])[:, 0],
        "kl": _kl(p, q),
        "reverse": _kl(q, p),
        "confidence": p.amax(-1).exp(),
        "same": (first[:, 0] == second[:, 0]).double(),
        "overlap": (first[:, :, None] == second[:, None, :]).any(-1).double().mean(-1),
        "base_right": first[:, 0] == wanted,
        "right": second[:, 0] == wanted,
    }
    for name, values in found.items():
        getattr(kept, name).append(values.cpu())


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def _log_probabilities(module: nn.Module, window: Tensor, *, rounded: bool = False) -> Tensor:
    """[tokens - 1, vocabulary] in float64, of what follows each token. rounded: with products in bfloat16."""
    where = next(module.parameters(), torch.empty(0)).device
    with torch.autocast(where.type, torch.bfloat16, enabled=rounded):
        logits = logits_of(module, window[None].to(where))
    if not bool(torch.isfinite(logits).all()):
        raise TersorError(
            f"{type(module).__name__} gives logits that are not finite; nothing can be compared with them"
        )
    return logits[0, :-1].double().log_softmax(-1)


def _summarized(kept: _Tokens, seq_len: int, passages: list[Passage]) -> Divergence:
    kl, confidence, same = torch.cat(kept.kl), torch.cat(kept.confidence), torch.cat(kept.same)
    right, base_right = torch.cat(kept.right), torch.cat(kept.base_right)
    shares = {"median": 0.5, "90%": 0.9, "99%": 0.99, "99.9%": 0.999, "max": 1.0}
    order = kl.sort().values
    return Divergence(
        tokens=len(kl),
        windows=len(kept.kl),
        seq_len=seq_len,
        perplexity=_exp(_estimate(kept.loss)),
        base_perplexity=_exp(_estimate(kept.base_loss)),
        ratio=_exp(_estimate([a - b for a, b in zip(kept.loss, kept.base_loss, strict=True)])),
        kl=_estimate(kept.kl),
        kl_quantiles={name: float(order[min(len(order) - 1, int(s * len(order)))]) for name, s in shares.items()},
        reverse_kl=_estimate(kept.reverse),
        noise_floor=float(torch.cat(kept.noise).mean()) if kept.noise else None,
        same_top1=_estimate(kept.same),
        overlap=float(torch.cat(kept.overlap).mean()),
        harmful_flips=float((base_right & ~right).double().mean()),
        helpful_flips=float((~base_right & right).double().mean()),
        buckets=_buckets(confidence, kl, same),
        passages=passages,
    )


def _estimate(windows: Sequence[Tensor]) -> Estimate:
    """The mean over all tokens; windows are equally long, so it is that of their means."""
    means = torch.stack([each.double().mean() for each in windows])
    half = None if len(means) < 2 else 1.96 * float(means.std()) / math.sqrt(len(means))
    return Estimate(float(means.mean()), half)


def _exp(estimate: Estimate) -> Estimate:
    """exp of a mean loss, and to first order of its interval. Infinite above what a float holds."""
    mean = math.exp(estimate.mean) if estimate.mean < 700 else math.inf
    return Estimate(mean, None if estimate.half_width is None else mean * estimate.half_width)


def _buckets(confidence: Tensor, kl: Tensor, same: Tensor) -> list[Bucket]:
    """Equally many tokens each, from the least to the most confident."""
    order = confidence.argsort()
    parts = [part for part in order.tensor_split(BUCKETS) if len(part)]
    return [
        Bucket(
            float(confidence[part].min()),
            float(confidence[part].max()),
            len(part),
            float(kl[part].mean()),
            float(same[part].mean()),
        )
        for part in parts
    ]


def _passages(kl: Sequence[Tensor], windows: Tensor, decode: Callable[[list[int]], str] | None) -> list[Passage]:
    """The tokens in a row with the largest sums; one a window at most."""
    found = []
    for number, each in enumerate(kl):
        width = min(PASSAGE, len(each))
        sums = each.unfold(0, width, 1).mean(-1)
        start = int(sums.argmax())
        tokens = windows[number, start + 1 : start + 1 + width].tolist()
        found.append(Passage(decode(tokens) if decode else " ".join(map(str, tokens)), number, float(sums[start])))
    return sorted(found, key=lambda each: -each.kl)[:SHOWN]


def _ids(
    model: str | Path | nn.Module, text: str | Path | Tensor | None, tokenizer: Any
) -> tuple[Tensor, Callable[[list[int]], str] | None]:
    if isinstance(text, Tensor):
        return text, tokenizer.decode if tokenizer is not None else None
    if tokenizer is None and not isinstance(model, nn.Module):
        tokenizer = load_tokenizer(resolve(model))
    if tokenizer is None:
        raise TersorError("the original has no tokenizer: give token ids as a tensor")
    return tokens_of(text, tokenizer), tokenizer.decode
