"""What a compressed sentence encoder lost: whether it still orders pairs of sentences as the original does.

Every line is embedded: the mean of the last hidden states over its tokens, at unit length. Of all pairs of lines the cosines
are taken, by each model; Spearman's rank correlation of the two lists is 1 where the order is the same. Lines are in many pairs,
so the interval is that of the jackknife over lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.load import load, load_tokenizer
from tersor.checkpoint.positions import positions_of
from tersor.checkpoint.source import Checkpoint, Openable, open_checkpoint
from tersor.data.text import builtin_text, read_text
from tersor.devices import DType
from tersor.errors import TersorError
from tersor.evaluate.interval import Estimate, half_width
from tersor.progress import Progress

LINES = 200  # at most, evenly spread
FEWEST = 4


@dataclass(frozen=True)
class Similarities:
    """How alike the embeddings of two encoders are."""

    lines: int
    rank_correlation: Estimate  # of the similarities of all pairs of lines
    cosine: float  # the mean, of the two embeddings of one line
    least_cosine: float  # the least of these
    moved: float  # the largest change of the cosine of any two lines

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def similarities(
    model: Openable,
    against: Openable,
    text: str | Path | None = None,
    *,
    dtype: DType = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Similarities:
    """text: a file whose lines are embedded, or "builtin" (also None). One model is in memory at a time. Raises TersorError where
    the text has too few lines, or a model gives no hidden states."""
    lines = lines_of(builtin_text("evaluation") if text is None or text == "builtin" else read_text(text))
    model, against = open_checkpoint(model), open_checkpoint(against)
    tokenizer = load_tokenizer(against.directory)
    if tokenizer is None:
        raise TersorError(f"{against} has no tokenizer")
    p, q = (
        _embedded(each, name, tokenizer, lines, dtype, device, progress)
        for each, name in ((against, "the original"), (model, "comparing"))
    )
    if p.shape != q.shape:
        raise TersorError(
            f"the embeddings have {q.shape[1]} and {p.shape[1]} numbers; --against is the model that was compressed"
        )
    return compared(p, q)


def lines_of(text: str) -> list[str]:
    """Lines with words in them, each once; at most LINES of them, evenly spread."""
    found = list(dict.fromkeys(line.strip() for line in text.splitlines() if any(map(str.isalpha, line))))
    if len(found) < FEWEST:
        raise TersorError(f"the text has {len(found)} lines with words; similarities need at least {FEWEST}")
    return found if len(found) <= LINES else [found[n * len(found) // LINES] for n in range(LINES)]


def compared(p: Tensor, q: Tensor) -> Similarities:
    """p, q: embeddings [lines, hidden] of unit length."""
    a, b = p @ p.t(), q @ q.t()
    cosine = (p * q).sum(1)
    n = len(p)
    whole = _of_pairs(a, b)
    rest = torch.arange(n)
    left_out = torch.tensor([_of_pairs(a[k][:, k], b[k][:, k]) for k in (rest[rest != i] for i in range(n))])
    found = Estimate(whole, half_width((n - 1) * left_out))  # pseudo-values vary so: n · whole - (n - 1) · left_out
    return Similarities(n, found, float(cosine.mean()), float(cosine.min()), float((a - b).abs().max()))


def _of_pairs(a: Tensor, b: Tensor) -> float:
    upper = torch.ones_like(a, dtype=torch.bool).triu(1)
    return spearman(a[upper], b[upper])


def spearman(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of theirs. Of constant lists: whether they are equal."""
    r, s = (ranks(each) - (len(each) - 1) / 2 for each in (x, y))
    size = float(r.norm() * s.norm())
    return float(torch.equal(x, y)) if size == 0 else float(r @ s) / size


def ranks(values: Tensor) -> Tensor:
    """float64, from 0."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    mean: Tensor = (last - 1).double() - (count - 1).double() / 2
    return mean[place]


def _embedded(
    model: Checkpoint,
    name: str,
    tokenizer: Any,
    lines: Sequence[str],
    dtype: DType,
    device: str,
    progress: Progress | None,
) -> Tensor:
    """[lines, hidden] in float64 on the CPU."""
    module = load(model, dtype=dtype, device=device).eval()
    where, most = next(module.parameters()).device, positions_of(module)
    found = []
    for number, line in enumerate(lines):
        ids = tokenizer(line, return_tensors="pt", truncation=most is not None, max_length=most)["input_ids"]
        found.append(_mean_state(module, ids.to(where)))
        if progress is not None:
            progress(name, number + 1, len(lines))
    made = torch.stack(found).double().cpu()
    if not bool(torch.isfinite(made).all()):
        raise TersorError(
            f"{type(module).__name__} gives embeddings that are not finite; nothing can be compared with them"
        )
    return nn.functional.normalize(made, dim=-1)


def _mean_state(module: nn.Module, ids: Tensor) -> Tensor:
    try:
        hidden = getattr(module(input_ids=ids), "last_hidden_state", None)
    except (TypeError, ValueError) as error:
        raise TersorError(
            f"{type(module).__name__} does not run on tokens alone ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise TersorError(
            f"{type(module).__name__} is no sentence encoder: it gives no hidden states [1, tokens, hidden]"
        )
    return hidden[0].float().mean(0)
