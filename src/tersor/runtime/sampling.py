"""The choice of the next token from its logits: the likeliest, or a draw with temperature, top-k and top-p (nucleus)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.untrusted import check_seed

NOT_FINITE = "the model's logits are not finite (NaN or Inf); its activations overflow: try --dtype float32"
COLDEST = 1e-4  # below it differences of logits are beyond float32's range


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int = 0  # draw from the k likeliest only; 0: from all
    # Draw from the fewest tokens whose probabilities sum to p at least (Holtzman et al., arXiv 1904.09751).
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0  # draw from tokens that have this share of the likeliest one's probability
    # Positive logits of tokens that were there already are divided by it, negative ones multiplied (Keskar et al., arXiv
    # 1909.05858); 1 changes nothing.
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise TersorError(f"temperature {self.temperature} must be 0 or above")
        if 0 < self.temperature < COLDEST:
            raise TersorError(
                f"temperature {self.temperature} must be at least {COLDEST}, or 0, which takes the likeliest token"
            )
        if self.top_k < 0:
            raise TersorError(f"top_k {self.top_k} must be 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            raise TersorError(f"top_p {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise TersorError(f"min_p {self.min_p} must be between 0 and 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise TersorError(f"repetition_penalty {self.repetition_penalty} must be above 0")
        check_seed(self.seed)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What tokens are drawn with, [batch, vocabulary], for a temperature above 0. top-k comes before top-p."""
    scaled = (logits.float() - logits.float().amax(-1, keepdim=True)) / sampling.temperature  # so that none overflows
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    p = scaled.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # a token stays where those before it do not reach top_p yet
        p = torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(before >= sampling.top_p, 0.0))
    if sampling.min_p > 0:
        p = p.masked_fill(p < sampling.min_p * p.amax(dim=-1, keepdim=True), 0.0)
    return p / p.sum(dim=-1, keepdim=True)


def finite(logits: Tensor) -> Tensor:
    """bool [batch, 1]: whether a token can be chosen from logits [batch, vocabulary]."""
    return torch.isfinite(logits.amax(-1, keepdim=True))


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [batch, vocabulary] with those of the tokens seen [batch, tokens] made less likely."""
    found = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(found < 0, found * penalty, found / penalty))


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each sequence, int64 [batch, 1], from logits [batch, vocabulary]. Raises TersorError for NaN or Inf."""
    if not bool(finite(logits).all()):
        raise TersorError(NOT_FINITE)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator)
