"""What a compressed language model lost: its predictions beside the original's on the same text, token by token.

For every predicted token, with p of the original and q of the other over the vocabulary:

    KL(p || q) = sum p (log p - log q)      in nats; 0 where both say the same
    flip: the likelier choice differs        harmful, where the original was right and the other is wrong

Tokens of one window are not independent, so every interval is that of the means of windows, by Student's t.
The noise floor is the same comparison of the original with itself in bfloat16: what is below it cannot be told from rounding.

Models given by name are in memory one after the other, or a block at a time where one does not fit: the original's logits of as
many windows as the cache has room for wait on disk, exactly, while the other model runs.
"""

from __future__ import annotations

import math
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.load import load, load_tokenizer
from tersor.checkpoint.source import Checkpoint, Openable, open_checkpoint
from tersor.checkpoint.writer import model_fingerprint
from tersor.devices import DType, name_of_dtype, pick_device
from tersor.errors import TersorError
from tersor.evaluate.interval import Estimate, estimate
from tersor.evaluate.logit_cache import Kept, LogitCache, opened_folder
from tersor.evaluate.measures import kl_of
from tersor.evaluate.perplexity import check_windows, logits_of, windows_of
from tersor.evaluate.streamed import Walked, check_walked, fits, logits_of_windows
from tersor.progress import Progress, silent
from tersor.version import __version__

BUCKETS = 5
OVERLAP = 10  # of the k likeliest tokens
SHOWN = 3  # passages
PASSAGE = 24  # tokens
LEVELS = (0.1, 0.5, 1.5)  # nats of a token, from which it is shown in another colour
CACHE_SIZE = 4 * 10**9  # bytes on disk
STREAMED = 4  # windows that run through a model together, of which a block is in memory

Predict = Callable[
    [Tensor, bool], list[Tensor]
]  # windows; whether products are in bfloat16 -> logits [tokens - 1, vocabulary] each


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
    # The text of each token (empty where a letter goes on in the next), with its own KL.
    parts: list[tuple[str, float]] = field(default_factory=list)

    def levels(self) -> list[tuple[str, float, int]]:
        """Each part with its KL and how many of LEVELS that reaches."""
        return [(text, kl, bisect_right(LEVELS, kl)) for text, kl in self.parts]


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
    model: Openable | nn.Module,
    against: Openable | nn.Module,
    text: str | Path | Tensor | None = None,
    *,
    tokenizer: Any = None,
    seq_len: int = 1024,
    max_windows: int | None = None,
    noise_floor: bool = True,
    dtype: DType = "auto",
    device: str = "auto",
    cache: str | Path | None = None,
    cache_size: int = CACHE_SIZE,
    stream: bool | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """Compare `model` with `against`, the original, on windows of a text.

    model, against: names, directories or modules that return `.logits`. Of two names one is in memory at a time. text: as for
    `perplexity`. cache: a folder where the original's logits stay for the next call (None: they go); cache_size: bytes that
    they may take on disk. stream: a block of each named model in memory at a time (None: where the original does not fit).
    Raises TersorError where the vocabularies differ, or the text is shorter than a window.
    """
    model, against = (each if isinstance(each, nn.Module) else open_checkpoint(each) for each in (model, against))
    if tokenizer is None and isinstance(against, Checkpoint) and not isinstance(text, Tensor):
        tokenizer = load_tokenizer(against.directory)
    if tokenizer is None and not isinstance(text, Tensor):
        raise TersorError("the original has no tokenizer: give token ids as a tensor")
    windows = windows_of(text, tokenizer, seq_len=seq_len, max_windows=max_windows)
    decode = None if tokenizer is None else tokenizer.decode
    said = progress or silent
    check = partial(check_windows, tokenizer=tokenizer)
    if isinstance(model, nn.Module) or isinstance(against, nn.Module):
        if cache is not None:
            raise TersorError("a module has no files by which its logits could be found again: leave cache out")
        if stream:
            raise TersorError("a module is in memory already: give both models by name, or leave stream out")
        base, other = (
            each.eval() if isinstance(each, nn.Module) else load(each, dtype=dtype, device=device).eval()
            for each in (against, model)
        )
        check(base, windows)
        check(other, windows)
        kept = _Tokens()
        for number, window in enumerate(windows):
            (found,) = _kept(partial(_predict, base), window[None], noise=noise_floor)
            _take(kept, found, _logits(other, window), window)
            said("comparing", number + 1, len(windows))
        return _summarized(kept, seq_len, _passages(kept.kl, windows, decode))
    if stream is None:
        stream = not fits(against, copies=1, dtype=dtype, device=device)

    def opened(checkpoint: Checkpoint) -> Predict:
        if stream:
            walked = Walked(checkpoint, dtype=dtype, device=device)
            check_walked(walked, windows, tokenizer)
            return lambda some, rounded: _finite(logits_of_windows(walked, some, rounded=rounded), walked.module)
        module = load(checkpoint, dtype=dtype, device=device).eval()
        check(module, windows)
        return partial(_predict, module)

    with _cache(against, cache, cache_size, dtype=dtype, device=device) as store:
        kept = _one_after_another(
            lambda: opened(model),
            lambda: opened(against),
            windows,
            store,
            noise=noise_floor,
            at_once=STREAMED if stream else 1,
            progress=said,
        )
    return _summarized(kept, seq_len, _passages(kept.kl, windows, decode))


def _one_after_another(
    other: Callable[[], Predict],
    base: Callable[[], Predict],
    windows: Tensor,
    store: LogitCache,
    *,
    noise: bool,
    at_once: int,
    progress: Progress,
) -> _Tokens:
    """As many windows at a time as the cache has room for: the original's logits first, then the other's. Both are opened when
    they are needed, and let go. at_once: windows that run together."""
    kept, first = _Tokens(), 0
    while first < len(windows):
        predict: Predict | None = None
        last, used = first, 0
        while last < len(windows) and (used == 0 or used + used // (last - first) <= store.most):
            some = list(range(last, min(last + at_once, len(windows))))
            missing = [number for number in some if store.get(windows[number], noise=noise) is None]
            if missing:
                predict = predict or base()
                for number, found in zip(missing, _kept(predict, windows[missing], noise=noise), strict=True):
                    store.put(windows[number], found)
            used += sum(store.path_of(windows[number]).stat().st_size for number in some)
            last += len(some)
            store.trim(keep=frozenset(store.path_of(each) for each in windows[first:last]))
            progress("the original", last, len(windows))
        del predict
        predict = other()
        for start in range(first, last, at_once):
            numbers = range(start, min(start + at_once, last))
            for number, logits in zip(numbers, predict(windows[start : numbers.stop], False), strict=True):
                before = store.get(windows[number], noise=noise)
                if before is None:
                    raise TersorError(f"{store.folder} lost logits that were just written: another process uses it")
                _take(kept, before, logits, windows[number])
                progress("comparing", number + 1, len(windows))
        del predict
        first = last
    return kept


@contextmanager
def _cache(
    against: Checkpoint, folder: str | Path | None, most: int, *, dtype: DType, device: str
) -> Iterator[LogitCache]:
    """The cache of one original; in a temporary folder where none is given."""
    facts = [model_fingerprint(against), name_of_dtype(dtype), str(pick_device(device)), torch.__version__, __version__]
    with tempfile.TemporaryDirectory(prefix="tersor-") as temporary:
        place = Path(temporary) if folder is None else opened_folder(Path(folder))
        yield LogitCache(place, most, " ".join(facts))


def _kept(predict: Predict, windows: Tensor, *, noise: bool) -> list[Kept]:
    """What the original says of windows."""
    found = predict(windows, False)
    if not noise:
        return [Kept(logits, None) for logits in found]
    pairs = zip(found, predict(windows, True), strict=True)
    return [Kept(p, kl_of(_distribution(p), _distribution(q)).cpu()) for p, q in pairs]


def _take(kept: _Tokens, base: Kept, logits: Tensor, window: Tensor) -> None:
    """Note one window. base: what the original says of it; logits: what the other does."""
    if base.logits.shape != logits.shape:
        raise TersorError(
            f"the vocabularies differ: {base.logits.shape[-1]} and {logits.shape[-1]} tokens; --against is the model that was "
            "compressed"
        )
    p, q = _distribution(base.logits.to(logits.device)), _distribution(logits)
    _compare(kept, p, q, window[1:].to(p.device))
    if base.noise is not None:
        kept.noise.append(base.noise)


def _compare(kept: _Tokens, p: Tensor, q: Tensor, wanted: Tensor) -> None:
    """p, q: log-probabilities [tokens, vocabulary] of the original and the other; wanted: what the text says, [tokens]."""
    k = min(OVERLAP, p.shape[-1])
    first, second = p.topk(k).indices, q.topk(k).indices
    found = {
        "loss": -q.gather(-1, wanted[:, None])[:, 0],
        "base_loss": -p.gather(-1, wanted[:, None])[:, 0],
        "kl": kl_of(p, q),
        "reverse": kl_of(q, p),
        "confidence": p.amax(-1).exp(),
        "same": (first[:, 0] == second[:, 0]).double(),
        "overlap": (first[:, :, None] == second[:, None, :]).any(-1).double().mean(-1),
        "base_right": first[:, 0] == wanted,
        "right": second[:, 0] == wanted,
    }
    for name, values in found.items():
        getattr(kept, name).append(values.cpu())


def _predict(module: nn.Module, windows: Tensor, rounded: bool) -> list[Tensor]:
    return [_logits(module, window, rounded=rounded) for window in windows]


def _logits(module: nn.Module, window: Tensor, *, rounded: bool = False) -> Tensor:
    """[tokens - 1, vocabulary], of what follows each token. rounded: with products in bfloat16."""
    where = next(module.parameters(), torch.empty(0)).device
    with torch.autocast(where.type, torch.bfloat16, enabled=rounded):
        logits = logits_of(module, window[None].to(where))
    return _finite([logits[0, :-1]], module)[0]


def _finite(found: list[Tensor], module: nn.Module) -> list[Tensor]:
    if not all(bool(torch.isfinite(logits).all()) for logits in found):
        raise TersorError(
            f"{type(module).__name__} gives logits that are not finite; nothing can be compared with them"
        )
    return found


def _distribution(logits: Tensor) -> Tensor:
    """Log-probabilities in float64."""
    return logits.double().log_softmax(-1)


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
    return estimate(torch.stack([each.double().mean() for each in windows]))


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
        said = decode or (lambda ids: " ".join(map(str, ids)))
        parts = list(zip(_parts(tokens, said), each[start : start + width].tolist(), strict=True))
        found.append(Passage(said(tokens), number, float(sums[start]), parts))
    return sorted(found, key=lambda each: -each.kl)[:SHOWN]


def _parts(tokens: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to the text."""
    parts, before = [], ""
    for n in range(1, len(tokens) + 1):
        text = decode(tokens[:n])
        if text.endswith("\ufffd") and n < len(tokens):  # a letter of several tokens
            parts.append("")
            continue
        parts.append(text[len(before) :])
        before = text
    return parts
